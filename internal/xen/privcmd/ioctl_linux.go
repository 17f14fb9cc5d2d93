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
