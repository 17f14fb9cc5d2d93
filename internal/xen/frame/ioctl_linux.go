package frame

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// include/uapi/xen/privcmd.h
const (
	ioctlHypercall = 0x305000 // struct privcmd_hypercall
	ioctlMmap      = 0x105002 // struct privcmd_mmap
)

const (
	hypercallGrantTableOp   = 20 // __HYPERVISOR_grant_table_op
	grantSetupTable         = 2  // GNTTABOP_setup_table
	hypercallEventChannelOp = 32 // __HYPERVISOR_event_channel_op
	eventSend               = 4  // EVTCHNOP_send, struct evtchn_send: u32 port
)

type privcmdHypercall struct {
	op  uint64
	arg [5]uint64
}

type privcmdMmap struct {
	num   int32
	dom   uint16
	_     uint16
	entry uint64 // to privcmdMmapEntry
}

type privcmdMmapEntry struct {
	va, mfn, npages uint64
}

// setupTable is struct gnttab_setup_table.
type setupTable struct {
	dom      uint16
	_        uint16
	nrFrames uint32
	status   int16
	_        [6]byte
	frames   uint64 // to nrFrames frame numbers
}

// kernel is the real mapper.
type kernel struct{}

func (kernel) mapFrame(mfn uint64, write bool) ([]byte, error) {
	f, err := os.OpenFile(Device, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	prot := unix.PROT_READ
	if write {
		prot |= unix.PROT_WRITE
	}
	var mem []byte
	var failed error
	err = c.Control(func(fd uintptr) {
		mem, failed = unix.Mmap(int(fd), 0, Size, prot, unix.MAP_SHARED)
		if failed != nil {
			return
		}
		entry := &privcmdMmapEntry{va: uint64(uintptr(unsafe.Pointer(&mem[0]))), mfn: mfn, npages: 1}
		arg := &privcmdMmap{num: 1, dom: domidSelf, entry: uint64(uintptr(unsafe.Pointer(entry)))}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlMmap, uintptr(unsafe.Pointer(arg)))
		runtime.KeepAlive(entry)
		if errno != 0 {
			_ = unix.Munmap(mem)
			mem, failed = nil, errno
		}
	})
	if err != nil {
		return nil, err
	}
	return mem, failed
}

func (kernel) unmap(mem []byte) error { return unix.Munmap(mem) }

func (kernel) grantTable(n uint32) ([]uint64, error) {
	f, err := os.OpenFile(Device, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	c, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	// Xen reads and writes these through our page tables: pages of the heap are
	// present once written, and there is no swap.
	frames := make([]uint64, n)
	for i := range frames {
		frames[i] = ^uint64(0)
	}
	table := &setupTable{dom: domidSelf, nrFrames: n, status: -1, frames: uint64(uintptr(unsafe.Pointer(&frames[0])))}
	call := &privcmdHypercall{op: hypercallGrantTableOp, arg: [5]uint64{grantSetupTable, uint64(uintptr(unsafe.Pointer(table))), 1}}
	var errno unix.Errno
	err = c.Control(func(fd uintptr) {
		_, _, errno = unix.Syscall(unix.SYS_IOCTL, fd, ioctlHypercall, uintptr(unsafe.Pointer(call)))
	})
	runtime.KeepAlive(table)
	runtime.KeepAlive(frames)
	if err == nil && errno != 0 {
		err = errno
	}
	if err == nil && table.status != 0 {
		err = fmt.Errorf("GNTTABOP_setup_table: status %d", table.status)
	}
	return frames, err
}

// A Port is one end of an event channel that the kernel has bound, such as a console's. /dev/xen/evtchn sends only on its own.
type Port struct {
	f    *os.File
	conn syscall.RawConn
	port *uint32
	call *privcmdHypercall
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
	p := &Port{f: f, conn: conn, port: &port}
	p.call = &privcmdHypercall{op: hypercallEventChannelOp, arg: [5]uint64{eventSend, uint64(uintptr(unsafe.Pointer(p.port)))}}
	return p, nil
}

// Send sends an event to the other end.
func (p *Port) Send() error {
	var errno unix.Errno
	err := p.conn.Control(func(fd uintptr) {
		// Raw: it never blocks (package fdio).
		_, _, errno = unix.RawSyscall(unix.SYS_IOCTL, fd, ioctlHypercall, uintptr(unsafe.Pointer(p.call)))
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
