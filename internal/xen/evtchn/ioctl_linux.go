package evtchn

import (
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/fdio"
)

// kernelDevice is the real device. SyscallConn keeps its descriptor with Go's
// poller, where Fd would make it blocking.
type kernelDevice struct {
	*os.File
	conn syscall.RawConn
	fd   uintptr // of calls that File makes with its lock held, by which it also closes
}

func openDevice(path string) (device, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	return newDevice(f)
}

// newDevice takes f over.
func newDevice(f *os.File) (*kernelDevice, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	d := &kernelDevice{File: f, conn: conn}
	_, err = d.control(func(fd uintptr) (int, error) {
		d.fd = fd
		return 0, nil
	})
	return d, err
}

// control runs call on the descriptor and returns what it returned.
func (d *kernelDevice) control(call func(fd uintptr) (int, error)) (n int, err error) {
	if ctlErr := d.conn.Control(func(fd uintptr) { n, err = call(fd) }); ctlErr != nil {
		return 0, os.ErrClosed // the one reason, under an error of package os's own
	}
	return n, err
}

func (d *kernelDevice) Read(b []byte) (int, error) { return fdio.Read(d.conn, b) }

// Write never waits: the kernel takes what it is given.
func (d *kernelDevice) Write(b []byte) (int, error) { return fdio.WriteNow(int(d.fd), b) }

// ioctl is one that does not block: none of this device's does.
func (d *kernelDevice) ioctl(req uint, args ...uint32) (int, error) {
	return fdio.Ioctl(int(d.fd), req, unsafe.Pointer(unsafe.SliceData(args)))
}

func (d *kernelDevice) readNow(b []byte) (int, error) { return fdio.ReadNow(int(d.fd), b) }

// watch stays for renew's descriptors too: what is watched is the open file.
func (d *kernelDevice) watch(p *fdio.Poller, ready func()) error {
	_, err := d.control(func(fd uintptr) (int, error) {
		_, err := p.Watch(int(fd), ready)
		return 0, err
	})
	return err
}

func (d *kernelDevice) renew() (device, error) {
	fd, err := d.control(func(fd uintptr) (int, error) {
		return unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0)
	})
	if err != nil {
		return nil, err
	}
	return newDevice(os.NewFile(uintptr(fd), d.Name()))
}
