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

// ReadNow reads once from a descriptor that does not block; unix.EAGAIN if there is nothing.
func ReadNow(fd int, b []byte) (int, error) { return call(unix.SYS_READ, uintptr(fd), b) }

// WriteNow writes once to a descriptor that does not block; unix.EAGAIN if there is no room.
func WriteNow(fd int, b []byte) (int, error) { return call(unix.SYS_WRITE, uintptr(fd), b) }

// Open is open(2) of a device, whose open does not block.
func Open(path string, flags int) (int, error) {
	name, err := unix.BytePtrFromString(path)
	if err != nil {
		return -1, err
	}
	dir := unix.AT_FDCWD
	return result(unix.RawSyscall6(unix.SYS_OPENAT, uintptr(dir), uintptr(unsafe.Pointer(name)), uintptr(flags|unix.O_CLOEXEC), 0, 0, 0))
}

// Ioctl is ioctl(2) of a kind that does not block. The kernel knows arg's size.
func Ioctl(fd int, request uint, arg unsafe.Pointer) (int, error) {
	return result(unix.RawSyscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(arg)))
}

// Close is close(2) of what has nothing to wait for: devices, and sockets that do not linger.
func Close(fd int) error {
	_, err := result(unix.RawSyscall(unix.SYS_CLOSE, uintptr(fd), 0, 0))
	return err
}

// Map is mmap(2) of a device's memory, shared, to read and write. Unmap undoes it.
func Map(fd int, offset int64, size int) ([]byte, error) {
	addr, _, errno := unix.RawSyscall6(unix.SYS_MMAP, 0, uintptr(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED, uintptr(fd), uintptr(offset))
	if errno != 0 {
		return nil, errno
	}
	return unsafe.Slice(*(**byte)(unsafe.Pointer(&addr)), size), nil
}

// Unmap is munmap(2). Nobody uses mem afterwards.
func Unmap(mem []byte) error {
	_, err := result(unix.RawSyscall(unix.SYS_MUNMAP, uintptr(unsafe.Pointer(unsafe.SliceData(mem))), uintptr(len(mem)), 0))
	return err
}

func result(r, _ uintptr, errno unix.Errno) (int, error) {
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
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
