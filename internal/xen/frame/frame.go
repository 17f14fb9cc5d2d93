// Package frame looks at memory frames of our own domain that the kernel has
// shared with a backend: the rings of the PV consoles. Linux gives user space no
// way to ask how full such a ring is, but a write to a full one spins in the kernel, and a
// tty counts as drained while 2 KiB are still in the ring.
//
// A PV domain may map its own frames: IOCTL_PRIVCMD_MMAP with DOMID_SELF
// (xen/include/public/xen.h) maps a machine frame number. With XSA-482 kernels
// the device must be unrestricted for that.
// The frame number of console 0 is in xenstore (console/ring-ref, written by the
// domain builder); that of console N is found through its grant reference
// (device/console/N/ring-ref) in our own grant table.
package frame

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/stubinit/stubinit/internal/xen/privcmd"
)

// Size is the size of a frame.
const Size = 4096

// domidSelf is DOMID_SELF of xen.h.
const domidSelf = 0x7ff0

// A mapper is what this package needs of the kernel; ioctl_linux.go has the real one.
type mapper interface {
	// mapFrame maps one of our frames and returns its Size bytes.
	mapFrame(mfn uint64, write bool) ([]byte, error)
	unmap(mem []byte) error
	// grantTable gives the first n frame numbers of our grant table.
	grantTable(n uint32) ([]uint64, error)
}

// A Frame is a mapping of one frame. What Map gives is read-only, and a write to it a fault.
type Frame struct {
	m     mapper
	mem   []byte
	close sync.Once
}

// Map maps machine frame mfn of our own domain, for reading.
func Map(mfn uint64) (*Frame, error) { return mapWith(kernel{}, mfn, false) }

// Of is a Frame of Size bytes of ordinary memory, aligned to 4. Its Close does nothing.
func Of(mem []byte) *Frame { return &Frame{m: ordinary{}, mem: mem[:Size:Size]} }

// ordinary has nothing to unmap.
type ordinary struct{ mapper }

func (ordinary) unmap([]byte) error { return nil }

func mapWith(m mapper, mfn uint64, write bool) (*Frame, error) {
	mem, err := m.mapFrame(mfn, write)
	if err != nil {
		return nil, fmt.Errorf("map own frame %#x through %s: %w", mfn, privcmd.Device, err)
	}
	return &Frame{m: m, mem: mem}, nil
}

// Uint32 reads the aligned 32-bit value at a byte offset, atomically.
func (f *Frame) Uint32(offset int) uint32 {
	return atomic.LoadUint32(f.word(offset))
}

// SetUint32 writes the aligned 32-bit value at a byte offset, atomically.
func (f *Frame) SetUint32(offset int, v uint32) {
	atomic.StoreUint32(f.word(offset), v)
}

func (f *Frame) word(offset int) *uint32 {
	return (*uint32)(unsafe.Pointer(unsafe.SliceData(f.mem[offset : offset+4])))
}

// Bytes is the frame's memory, which the other domain may change at any time.
func (f *Frame) Bytes() []byte { return f.mem }

// Close unmaps the frame; to use it after that is a fault.
func (f *Frame) Close() (err error) {
	f.close.Do(func() { err = f.m.unmap(f.mem) })
	return err
}

// Grant table entries, version 1 (xen/include/public/grant_table.h, struct grant_entry_v1):
// u16 flags, u16 domid, u32 frame. Linux uses version 2 only above 16 TiB of memory.
const (
	entrySize    = 8
	entriesFrame = Size / entrySize
	typeMask     = 3
	permitAccess = 1
)

// MapGranted maps the frame that grant reference ref of ours gives to domain
// to, for reading and writing. An entry that is not such a grant is an error.
func MapGranted(ref uint32, to uint16) (*Frame, error) { return mapGrantedWith(kernel{}, ref, to) }

func mapGrantedWith(m mapper, ref uint32, to uint16) (*Frame, error) {
	const maxFrames = 64 // Xen's default for gnttab_max_frames
	table := ref / entriesFrame
	if table >= maxFrames {
		return nil, fmt.Errorf("grant reference %d is beyond the grant table", ref)
	}
	frames, err := m.grantTable(table + 1)
	if err != nil {
		return nil, fmt.Errorf("find own grant table: %w", err)
	}
	t, err := mapWith(m, frames[table], false)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	at := int(ref % entriesFrame * entrySize)
	var e [entrySize]byte
	binary.LittleEndian.PutUint32(e[:], t.Uint32(at))
	flags, domid, mfn := binary.LittleEndian.Uint16(e[:]), binary.LittleEndian.Uint16(e[2:]), t.Uint32(at+4)
	if flags&typeMask != permitAccess || domid != to {
		return nil, fmt.Errorf("grant reference %d: flags %#x, domain %d: not a frame given to domain %d", ref, flags, domid, to)
	}
	return mapWith(m, uint64(mfn), true)
}
