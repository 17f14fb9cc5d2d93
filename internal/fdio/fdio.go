// Package fdio reads and writes descriptors that never block, past what Go's
// scheduler does for a system call that may.
//
// That costs more than the call: the first one after a wait wakes the runtime's
// monitor thread (entersyscall in runtime/proc.go), whose own work and two changes
// of context are a fifth of a QMP round trip on a domain's one processor.
package fdio

import (
	"context"
	"io"
	"net"
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
func Write(conn syscall.RawConn, b []byte) (int, error) { return write(conn, b, true) }

// write with wait false writes what there is room for, perhaps nothing.
func write(conn syscall.RawConn, b []byte, wait bool) (written int, err error) {
	waitErr := conn.Write(func(fd uintptr) bool {
		for {
			var n int
			n, err = call(unix.SYS_WRITE, fd, b[written:])
			written += n
			switch {
			case err == unix.EAGAIN && wait:
				return false
			case err == unix.EAGAIN:
				err = nil
				return true
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

// Conn is a stream socket that is read and written so.
type Conn struct {
	*net.UnixConn
	raw syscall.RawConn
}

// DialUnix connects to the socket at path.
func DialUnix(ctx context.Context, path string) (*Conn, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	u := c.(*net.UnixConn)
	raw, err := u.SyscallConn()
	if err != nil {
		u.Close()
		return nil, err
	}
	return &Conn{UnixConn: u, raw: raw}, nil
}

// Read is net.Conn's.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := Read(c.raw, b)
	return n, c.opError("read", err)
}

// Write is net.Conn's.
func (c *Conn) Write(b []byte) (int, error) {
	n, err := write(c.raw, b, true)
	return n, c.opError("write", err)
}

// TryWrite writes what there is room for, perhaps nothing.
func (c *Conn) TryWrite(b []byte) (int, error) {
	n, err := write(c.raw, b, false)
	return n, c.opError("write", err)
}

// opError is the error that net gives: its own says raw-read and raw-write.
func (c *Conn) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	if inner, ok := err.(*net.OpError); ok {
		err = inner.Err
	}
	return &net.OpError{Op: op, Net: c.LocalAddr().Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}
