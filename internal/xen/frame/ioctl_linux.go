package frame

import (
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/xen/privcmd"
)

// include/uapi/xen/privcmd.h
const (
	ioctlMmap = 0x105002 // struct privcmd_mmap
)

const (
	hypercallGrantTableOp = 20 // __HYPERVISOR_grant_table_op
	grantSetupTable       = 2  // GNTTABOP_setup_table
)

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
	f, err := os.OpenFile(privcmd.Device, os.O_RDWR, 0)
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
	f, err := privcmd.Open()
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// Xen reads and writes these through our page tables: pages of the heap are
	// present once written, and there is no swap. What is not pinned may be on the
	// stack, which moves.
	frames := make([]uint64, n)
	for i := range frames {
		frames[i] = ^uint64(0)
	}
	table := &setupTable{dom: domidSelf, nrFrames: n, status: -1, frames: uint64(uintptr(unsafe.Pointer(&frames[0])))}
	var pin runtime.Pinner
	defer pin.Unpin()
	pin.Pin(table)
	pin.Pin(&frames[0])
	_, err = f.Hypercall(hypercallGrantTableOp, grantSetupTable, uint64(uintptr(unsafe.Pointer(table))), 1)
	if err == nil && table.status != 0 {
		err = fmt.Errorf("GNTTABOP_setup_table: status %d", table.status)
	}
	return frames, err
}
