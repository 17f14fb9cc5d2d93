package gntalloc

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/fdio"
)

// kernelDevice is the descriptor of the real device. Its calls are made between a client's sessions, and must not wake the
// runtime's monitor thread for the next one (see package fdio); none of them waits for anybody.
type kernelDevice int

func openDevice(path string) (device, error) {
	fd, err := fdio.Open(path, unix.O_RDWR)
	if err != nil {
		return nil, err
	}
	return kernelDevice(fd), nil
}

// ioctl passes a struct as its bytes; the kernel copies it and needs no alignment.
func (d kernelDevice) ioctl(req uint, arg []byte) error {
	_, err := fdio.Ioctl(int(d), req, unsafe.Pointer(unsafe.SliceData(arg)))
	return err
}

func (d kernelDevice) mmap(offset int64, size int) ([]byte, error) {
	return fdio.Map(int(d), offset, size)
}

func (d kernelDevice) munmap(mem []byte) error { return fdio.Unmap(mem) }

func (d kernelDevice) Close() error { return fdio.Close(int(d)) }
