package fdio

import (
	"errors"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lingerLimit is how long Wait keeps the processor after Linger. It is more than a tick of the kernel, so that its timer
// is never the next to expire: a timer that is costs two hypercalls a wait.
const lingerLimit = 5 * time.Millisecond

// A Poller waits for several descriptors at once on behalf of one goroutine, and calls who watches them.
//
// Go's own poller needs four system calls for a wait, and two goroutines to wait for two descriptors; in a PV domain
// each of these calls takes as long as a tenth of what QEMU needs to answer. A Poller needs one, as long as the conversation
// goes on; when it pauses, it waits in Go's poller like everybody else.
type Poller struct {
	epoll  *os.File // itself in Go's poller
	fd     uintptr  // its descriptor
	conn   syscall.RawConn
	events [8]unix.EpollEvent // Wait's

	linger      atomic.Bool // by the next wait
	interrupted atomic.Bool

	mu      sync.Mutex
	watched map[int32]func()
	last    int32
}

// NewPoller makes a Poller that watches nothing yet.
func NewPoller() (*Poller, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err == nil {
		err = unix.SetNonblock(fd, true) // so that package os takes it into Go's poller
	}
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	f := os.NewFile(uintptr(fd), "epoll")
	conn, err := f.SyscallConn()
	if err == nil {
		err = f.SetReadDeadline(time.Time{}) // fails if Go's poller has not taken it
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Poller{epoll: f, fd: uintptr(fd), conn: conn, watched: make(map[int32]func())}, nil
}

// A Watch is one descriptor that a Poller watches.
type Watch struct {
	p  *Poller
	fd int
	id int32
}

// Watch has ready called by Wait as long as fd is readable, at its end, or has failed. The descriptor is the caller's, who stops
// the Watch before it closes it.
func (p *Poller) Watch(fd int, ready func()) (*Watch, error) {
	p.mu.Lock()
	p.last++
	w := &Watch{p: p, fd: fd, id: p.last}
	p.watched[w.id] = ready
	p.mu.Unlock()
	if err := w.control(unix.EPOLL_CTL_ADD, unix.EPOLLIN); err != nil {
		w.forget()
		return nil, err
	}
	return w, nil
}

// Writable says whether ready is to be called as long as fd can be written, too.
func (w *Watch) Writable(too bool) error {
	events := uint32(unix.EPOLLIN)
	if too {
		events |= unix.EPOLLOUT
	}
	return w.control(unix.EPOLL_CTL_MOD, events)
}

// Stop ends the Watch. A call of ready may be under way, and is the last.
func (w *Watch) Stop() error {
	w.forget()
	return w.control(unix.EPOLL_CTL_DEL, 0)
}

func (w *Watch) forget() {
	w.p.mu.Lock()
	delete(w.p.watched, w.id)
	w.p.mu.Unlock()
}

func (w *Watch) control(op int, events uint32) error {
	var err error
	ctlErr := w.p.conn.Control(func(fd uintptr) {
		event := unix.EpollEvent{Events: events, Fd: w.id}
		_, err = result(unix.RawSyscall6(unix.SYS_EPOLL_CTL, fd, uintptr(op), uintptr(w.fd), uintptr(unsafe.Pointer(&event)), 0, 0))
	})
	if ctlErr != nil {
		return fs.ErrClosed
	}
	return os.NewSyscallError("epoll_ctl", err)
}

// Linger says that the next wait is likely to be a short one: it keeps the processor for some milliseconds, in which no other
// goroutine runs if it is the only one.
func (p *Poller) Linger() { p.linger.Store(true) }

// Wait waits until a descriptor is ready, and calls who watches it. One goroutine at a time waits. After Interrupt it fails with
// an error that is fs.ErrClosed.
func (p *Poller) Wait() error {
	n, err := 0, error(nil)
	if p.linger.Swap(false) && !p.interrupted.Load() {
		n, err = p.wait(lingerLimit)
	}
	if n == 0 && err == nil {
		n, err = p.pause()
	}
	if err != nil {
		return err
	}
	for i := range p.events[:n] {
		p.mu.Lock()
		ready := p.watched[p.events[i].Fd]
		p.mu.Unlock()
		if ready != nil {
			ready()
		}
	}
	return nil
}

// pause waits in Go's poller.
func (p *Poller) pause() (n int, err error) {
	waitErr := p.conn.Read(func(uintptr) bool {
		n, err = p.wait(0)
		return n > 0 || err != nil
	})
	if errors.Is(waitErr, os.ErrDeadlineExceeded) || errors.Is(waitErr, os.ErrClosed) {
		return 0, fs.ErrClosed
	}
	return n, errors.Join(waitErr, err)
}

// wait is epoll_pwait(2), which a signal may end early; then nothing is ready. It keeps the processor from other goroutines.
func (p *Poller) wait(limit time.Duration) (int, error) {
	n, err := result(unix.RawSyscall6(unix.SYS_EPOLL_PWAIT, p.fd, uintptr(unsafe.Pointer(&p.events)), uintptr(len(p.events)),
		uintptr(limit.Milliseconds()), 0, 0))
	if err == unix.EINTR {
		err = nil
	}
	return max(n, 0), os.NewSyscallError("epoll_pwait", err)
}

// Interrupt ends Wait for good.
func (p *Poller) Interrupt() {
	p.interrupted.Store(true)
	p.epoll.SetReadDeadline(time.Unix(1, 0)) // fails only when closed, which wakes Wait too
}

// Close is called when Wait has ended. Descriptors that are still watched stay open.
func (p *Poller) Close() error { return p.epoll.Close() }
