// Package fdio reads and writes descriptors that never block, past what Go's
// scheduler does for a system call that may.
//
// That costs more than the call: the first one after a wait wakes the runtime's
// monitor thread (entersyscall in runtime/proc.go), whose own work and two changes
// of context are a fifth of a QMP round trip on a domain's one processor.
package fdio

import (
	"io"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Read reads once, and waits in Go's poller until it can. The error is an errno, io.EOF,
// or that of conn: a deadline, or that it was closed.
func Read(conn syscall.RawConn, b []byte) (n int, err error) {
	waitErr := conn.Read(func(fd uintptr) bool {
		n, err = call(unix.SYS_READ, fd, b)
		return err != unix.EAGAIN
	})
	switch {
	case waitErr != nil:
		return 0, waitErr
	case n == 0 && err == nil && len(b) > 0:
		return 0, io.EOF
	}
	return n, err
}

// Write writes all of b, waiting in Go's poller for room. Errors are as Read's.
func Write(conn syscall.RawConn, b []byte) (written int, err error) {
	waitErr := conn.Write(func(fd uintptr) bool {
		for {
			var n int
			n, err = call(unix.SYS_WRITE, fd, b[written:])
			written += n
			switch {
			case err == unix.EAGAIN:
				return false
			case err != nil || written == len(b):
				return true
			}
		}
	})
	if waitErr != nil {
		return written, waitErr
	}
	return written, err
}

// ReadNow reads once from a descriptor that does not block; unix.EAGAIN if there is nothing.
func ReadNow(fd int, b []byte) (int, error) { return call(unix.SYS_READ, uintptr(fd), b) }

// WriteNow writes once to a descriptor that does not block; unix.EAGAIN if there is no room.
func WriteNow(fd int, b []byte) (int, error) { return call(unix.SYS_WRITE, uintptr(fd), b) }

// call is read(2) or write(2) on a descriptor that is known not to block.
func call(number, fd uintptr, b []byte) (int, error) {
	for {
		n, _, errno := unix.RawSyscall(number, fd, uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)))
		switch errno {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, errno
		}
	}
}

// Sleep sleeps for about d, which is short: no other goroutine gets the processor meanwhile. Signals may end it sooner.
func Sleep(d time.Duration) {
	ts := unix.NsecToTimespec(d.Nanoseconds())
	_, _, _ = unix.RawSyscall(unix.SYS_NANOSLEEP, uintptr(unsafe.Pointer(&ts)), 0, 0)
}
