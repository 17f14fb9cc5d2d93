package fdio

import (
	"io"
	"net"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// expectLimit is how long an expected read waits; the kernel rounds it up to its ticks.
const expectLimit = 4 * time.Millisecond

// A Conn is a connected unix stream socket whose calls never wait. A Poller says when they can go on.
type Conn struct {
	p    *Poller
	name string // of the other end

	mu       sync.Mutex // held by every call, so that none uses a descriptor that Close has given back
	fd       int        // -1 when closed
	watch    *Watch
	drained  bool // nothing to read until the Poller says so
	expected bool // the next TryRead waits for a moment
	blocked  bool // no room to write until the Poller says so
	finished bool // no more is read: at the end, or after an error
}

// DialUnix connects to the socket at path, whose server need not have accepted yet.
func DialUnix(p *Poller, path string) (*Conn, error) {
	fd, err := result(unix.RawSyscall(unix.SYS_SOCKET, unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0))
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := connect(fd, path); err != nil {
		Close(fd)
		return nil, &net.OpError{Op: "dial", Net: "unix", Addr: address(path), Err: os.NewSyscallError("connect", err)}
	}
	return NewConn(p, fd, path)
}

// connect is connect(2) of a socket that does not block.
func connect(fd int, path string) error {
	to := unix.RawSockaddrUnix{Family: unix.AF_UNIX}
	if len(path) >= len(to.Path) {
		return unix.EINVAL
	}
	for i, c := range []byte(path) {
		to.Path[i] = int8(c)
	}
	_, err := result(unix.RawSyscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&to)), unsafe.Sizeof(to)))
	return err
}

// NewConn takes over a connected socket. name is for messages.
func NewConn(p *Poller, fd int, name string) (*Conn, error) {
	// It blocks, for expected reads. All other calls say that they do not.
	_, err := result(unix.RawSyscall(unix.SYS_FCNTL, uintptr(fd), unix.F_SETFL, 0))
	if err == nil {
		limit := unix.NsecToTimeval(expectLimit.Nanoseconds())
		_, err = result(unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_RCVTIMEO,
			uintptr(unsafe.Pointer(&limit)), unsafe.Sizeof(limit), 0))
	}
	if err != nil {
		Close(fd)
		return nil, &net.OpError{Op: "dial", Net: "unix", Addr: address(name), Err: err}
	}
	return &Conn{p: p, fd: fd, name: name}, nil
}

// Notify has f called by the Poller's Wait whenever a TryRead or TryWrite that came short may do more. Each then has to be tried again.
func (c *Conn) Notify(f func()) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return c.opError("watch", net.ErrClosed)
	}
	w, err := c.p.Watch(c.fd, func() {
		c.ready()
		f()
	})
	if err != nil {
		return c.opError("watch", err)
	}
	c.watch = w
	return nil
}

func (c *Conn) ready() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.drained = false
	if c.blocked && c.watch != nil {
		c.blocked = false
		_ = c.watch.Writable(false) // at worst it is called again
	}
}

// TryRead reads what there is: 0 bytes and no error if that is nothing yet, io.EOF at the end.
func (c *Conn) TryRead(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.fd < 0:
		return 0, c.opError("read", net.ErrClosed)
	case c.finished:
		return 0, io.EOF
	case c.drained && !c.expected || len(b) == 0:
		return 0, nil
	}
	flags := unix.MSG_DONTWAIT
	if c.expected {
		c.expected, flags = false, 0
	}
	n, err := c.call(unix.SYS_RECVFROM, b, flags)
	switch {
	case err == unix.EAGAIN || err == unix.EINTR:
		c.drained = true
		return 0, nil
	case err == nil && n > 0:
		c.drained = n < len(b) && c.watch != nil
		return n, nil
	}
	// The Poller would go on saying so for ever.
	c.finished = true
	c.unwatch()
	if err == nil {
		return 0, io.EOF
	}
	return 0, c.opError("read", os.NewSyscallError("read", err))
}

// TryWrite writes what there is room for, perhaps nothing.
func (c *Conn) TryWrite(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return 0, c.opError("write", net.ErrClosed)
	}
	if c.blocked || len(b) == 0 {
		return 0, nil
	}
	n, err := c.call(unix.SYS_SENDTO, b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
	if err != nil && err != unix.EAGAIN {
		return 0, c.opError("write", os.NewSyscallError("write", err))
	}
	if n < len(b) && c.watch != nil {
		if err := c.watch.Writable(true); err != nil {
			return n, c.opError("watch", err)
		}
		c.blocked = true
	}
	return n, nil
}

// Expect says that the other end is about to answer: the next TryRead waits for that, for some milliseconds, in which no other
// goroutine runs on a domain's one processor. That saves the Poller's work.
func (c *Conn) Expect() {
	c.mu.Lock()
	c.expected = true
	c.mu.Unlock()
}

// Linger is the Poller's.
func (c *Conn) Linger() { c.p.Linger() }

// call is recvfrom(2) or sendto(2).
func (c *Conn) call(number uintptr, b []byte, flags int) (int, error) {
	n, err := result(unix.RawSyscall6(number, uintptr(c.fd), uintptr(unsafe.Pointer(unsafe.SliceData(b))), uintptr(len(b)), uintptr(flags), 0, 0))
	return max(n, 0), err
}

// Close ends the connection. f of Notify may be called once more.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fd < 0 {
		return nil
	}
	c.unwatch()
	fd := c.fd
	c.fd = -1
	return os.NewSyscallError("close", Close(fd))
}

func (c *Conn) unwatch() {
	if c.watch != nil {
		_ = c.watch.Stop() // closing the descriptor does it too
		c.watch = nil
	}
}

// opError is the error that package net gives.
func (c *Conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "unix", Addr: address(c.name), Err: err}
}

func address(path string) net.Addr { return &net.UnixAddr{Name: path, Net: "unix"} }
