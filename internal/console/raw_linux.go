package console

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// rawTermios is a tty that passes every byte unchanged both ways: no echo, no
// line editing, no signals, no flow control, no output processing.
func rawTermios() *unix.Termios {
	t := &unix.Termios{Cflag: unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B38400}
	t.Cc[unix.VMIN] = 1
	return t
}

// OpenRaw opens a console's tty in raw mode without a moment in which the
// kernel could pass bytes through the cooked line discipline.
//
// The state that dom0 sends is in the ring before the tty is opened. The open
// wakes the kernel thread khvcd, which moves the ring's bytes through the line
// discipline: in cooked mode they come out changed, are echoed, and those
// after 4096 are lost. The stubdomain has one vCPU, so a thread that runs under
// SCHED_FIFO from before the open until after TCSETS is not preempted by
// khvcd or the kworker behind it, both SCHED_OTHER. TCSETS takes effect at once
// and discards nothing, unlike TCSETSF.
//
// flag is os.O_RDONLY or os.O_WRONLY. The descriptor is blocking, for use by another process.
func OpenRaw(path string, flag int) (*os.File, error) {
	type result struct {
		f   *os.File
		err error
	}
	c := make(chan result, 1)
	// A thread of its own: it ends with the goroutine (never unlocked), so no
	// other goroutine can ever run on a thread left at SCHED_FIFO.
	go func() {
		f, err := openRawFIFO(path, flag)
		c <- result{f, err}
	}()
	r := <-c
	return r.f, r.err
}

func setFIFO() error {
	attr := &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 50}
	if err := unix.SchedSetAttr(0, attr, 0); err != nil {
		return fmt.Errorf("sched_setattr(SCHED_FIFO): %w", err)
	}
	return nil
}

func openRawFIFO(path string, flag int) (*os.File, error) {
	runtime.LockOSThread() // and never unlock: the thread ends here
	if err := setFIFO(); err != nil {
		return nil, &os.PathError{Op: "open console raw", Path: path, Err: err}
	}
	termios := rawTermios() // before the open: nothing but two system calls in between
	var fd int
	var err error
	for {
		fd, err = unix.Open(path, flag|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
		if err != unix.EINTR { // the runtime's preemption signal
			break
		}
	}
	if err != nil {
		return nil, &os.PathError{Op: "open console raw", Path: path, Err: err}
	}
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, termios); err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "set raw mode of console", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}
