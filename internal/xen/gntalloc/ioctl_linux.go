package gntalloc

import (
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernelDevice is the real device.
type kernelDevice struct{ *os.File }

func openDevice(path string) (device, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return kernelDevice{f}, nil
}

// control runs call on the descriptor, which stays open meanwhile.
func (d kernelDevice) control(call func(fd uintptr) error) error {
	conn, err := d.SyscallConn()
	if err != nil {
		return err
	}
	if ctlErr := conn.Control(func(fd uintptr) { err = call(fd) }); ctlErr != nil {
		return os.ErrClosed // the one reason, under an error of package os's own
	}
	return err
}

// ioctl passes a struct as its bytes; the kernel copies it and needs no alignment.
func (d kernelDevice) ioctl(req uint, arg []byte) error {
	return d.control(func(fd uintptr) error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(req), uintptr(unsafe.Pointer(unsafe.SliceData(arg)))); errno != 0 {
			return errno
		}
		return nil
	})
}

func (d kernelDevice) mmap(offset int64, size int) (mem []byte, err error) {
	err = d.control(func(fd uintptr) error {
		mem, err = unix.Mmap(int(fd), offset, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		return err
	})
	return mem, err
}

func (d kernelDevice) munmap(mem []byte) error { return unix.Munmap(mem) }
