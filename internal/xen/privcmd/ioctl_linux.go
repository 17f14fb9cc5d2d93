package privcmd

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"
	"runtime"
	"syscall"
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

func (d kernelDevice) ioctl(req uint, arg []byte) (value int, err error) {
	conn, err := d.SyscallConn()
	if err != nil {
		return 0, err
	}
	ctlErr := conn.Control(func(fd uintptr) {
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(req), uintptr(unsafe.Pointer(unsafe.SliceData(arg))))
		if value = int(n); errno != 0 {
			value, err = 0, errno
		}
	})
	if ctlErr != nil {
		return 0, os.ErrClosed // the one reason, under an error of package os's own
	}
	return value, err
}

func (d kernelDevice) dmOp(domid uint16, bufs [][]byte) error {
	if len(bufs) == 0 || len(bufs) > math.MaxUint16 {
		return fmt.Errorf("%d buffers: %w", len(bufs), syscall.EINVAL)
	}
	var pin runtime.Pinner
	defer pin.Unpin()
	_, err := d.ioctl(ioctlDMOp, dmOpArg(&pin, domid, bufs))
	return err
}

// dmOpArg is struct privcmd_dm_op: u16 dom, u16 num, u32 padding, pointer to
// num of struct privcmd_dm_op_buf: pointer, u64 size. The buffers and their
// array are pinned: the pointers to them are hidden from Go in bytes.
func dmOpArg(pin *runtime.Pinner, domid uint16, bufs [][]byte) []byte {
	var array []byte
	for _, b := range bufs {
		array = binary.LittleEndian.AppendUint64(array, address(pin, b))
		array = binary.LittleEndian.AppendUint64(array, uint64(len(b)))
	}
	arg := binary.LittleEndian.AppendUint16(nil, domid)
	arg = binary.LittleEndian.AppendUint16(arg, uint16(len(bufs)))
	arg = append(arg, 0, 0, 0, 0)
	return binary.LittleEndian.AppendUint64(arg, address(pin, array))
}

func address(pin *runtime.Pinner, b []byte) uint64 {
	if len(b) == 0 {
		return 0
	}
	p := &b[0]
	pin.Pin(p)
	return uint64(uintptr(unsafe.Pointer(p)))
}

const (
	hypercallEventChannelOp = 32 // __HYPERVISOR_event_channel_op, xen.h
	eventSend               = 4  // EVTCHNOP_send, event_channel.h; struct evtchn_send: u32 port
)

// A Port is one end of an event channel that the kernel has bound, such as a
// console's. /dev/xen/evtchn sends only on its own.
type Port struct {
	f    *os.File
	conn syscall.RawConn
	port *uint32 // struct evtchn_send; arg has its address
	arg  []byte
}

// OpenPort gives a local port to send events on.
func OpenPort(port uint32) (*Port, error) {
	f, err := os.OpenFile(Device, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	conn, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &Port{f: f, conn: conn, port: &port, arg: sendArg(&port)}, nil
}

func sendArg(port *uint32) []byte {
	return hypercallArg(hypercallEventChannelOp, []uint64{eventSend, uint64(uintptr(unsafe.Pointer(port)))})
}

// Send sends an event to the other end.
func (p *Port) Send() error {
	var errno unix.Errno
	err := p.conn.Control(func(fd uintptr) {
		// Raw: it never blocks (package fdio).
		_, _, errno = unix.RawSyscall(unix.SYS_IOCTL, fd, ioctlHypercall, uintptr(unsafe.Pointer(unsafe.SliceData(p.arg))))
	})
	runtime.KeepAlive(p)
	if err == nil && errno != 0 {
		err = errno
	}
	if err != nil {
		return fmt.Errorf("send an event on port %d: %w", *p.port, err)
	}
	return nil
}

// Close ends the use of the port; the kernel keeps it.
func (p *Port) Close() error { return p.f.Close() }
