// Package gntalloc shares pages of this domain with another one through
// /dev/xen/gntalloc (Xen's public header sys/gntalloc.h, Linux drivers/xen/gntalloc.c).
package gntalloc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"syscall"
)

const (
	// Device is the kernel's grant allocation device.
	Device = "/dev/xen/gntalloc"
	// PageSize is the size of a granted page, Xen's own on every architecture.
	PageSize = 4096
	// MaxPages is the most that one Alloc takes: the kernel's default limit
	// for the whole domain (parameter xen_gntalloc.limit).
	MaxPages = 1024
)

// The ioctls of sys/gntalloc.h: _IOC(_IOC_NONE, 'G', nr, size).
const (
	ioctlAlloc        = 0x184705
	ioctlDealloc      = 0x104706
	ioctlUnmapNotify  = 0x104707
	flagWritable      = 1
	allocRefsOffset   = 16 // of gref_ids in struct ioctl_gntalloc_alloc_gref
	allocIndexOffset  = 8  // of index
	allocMinimum      = 24 // sizeof the struct, with one reference and padding
	referenceSize     = 4
	unmapNotifyStruct = 16
)

// Action is what the kernel does when a page is unmapped, however that comes about.
type Action uint32

// Actions may be combined.
const (
	ClearByte Action = 1 // set the byte at the offset to zero
	SendEvent Action = 2 // notify the event channel
)

// Error says which operation failed.
type Error struct {
	Op  string
	Err error
}

func (e *Error) Error() string { return Device + ": " + e.Op + ": " + e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// device is what Pages needs of the kernel. munmap works after Close too.
type device interface {
	ioctl(req uint, arg []byte) error
	mmap(offset int64, size int) ([]byte, error)
	munmap(mem []byte) error
	Close() error
}

// Pages are shared pages: granted by reference, mapped here.
type Pages struct {
	Refs []uint32 // one grant reference a page
	Mem  []byte   // the pages in order; not to be touched after Close

	mu    sync.Mutex
	dev   device
	index uint64 // byte offset of the pages in the device
	// detached says that dev is closed and the mapping alone holds the pages.
	detached bool
}

// Alloc makes count zeroed pages that the domain dom may map, read-only unless writable.
func Alloc(dom uint16, count int, writable bool) (*Pages, error) {
	dev, err := openDevice(Device)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return nil, &Error{Op: "open", Err: err}
	}
	return alloc(dev, dom, count, writable)
}

// alloc owns dev.
func alloc(dev device, dom uint16, count int, writable bool) (*Pages, error) {
	op := fmt.Sprintf("grant %d pages to domain %d", count, dom)
	fail := func(err error) (*Pages, error) {
		dev.Close() // gives back what was allocated
		return nil, &Error{Op: op, Err: err}
	}
	if count < 1 || count > MaxPages {
		return fail(fmt.Errorf("not 1 to %d: %w", MaxPages, syscall.EINVAL))
	}
	arg := allocArg(dom, count, writable)
	if err := dev.ioctl(ioctlAlloc, arg); err != nil {
		if errors.Is(err, syscall.ENOSPC) {
			err = fmt.Errorf("%w: the domain's limit is reached, raise kernel parameter xen_gntalloc.limit (default 1024)", err)
		}
		return fail(err)
	}
	p := &Pages{dev: dev, index: binary.LittleEndian.Uint64(arg[allocIndexOffset:])}
	for i := range count {
		p.Refs = append(p.Refs, binary.LittleEndian.Uint32(arg[allocRefsOffset+referenceSize*i:]))
	}
	mem, err := dev.mmap(int64(p.index), count*PageSize)
	if err != nil {
		return fail(fmt.Errorf("map: %w", err))
	}
	p.Mem = mem
	return p, nil
}

// allocArg is struct ioctl_gntalloc_alloc_gref: u16 domid, u16 flags, u32
// count, u64 index (out), u32 gref_ids[count] (out).
func allocArg(dom uint16, count int, writable bool) []byte {
	arg := make([]byte, max(allocMinimum, allocRefsOffset+referenceSize*count))
	binary.LittleEndian.PutUint16(arg[0:], dom)
	if writable {
		binary.LittleEndian.PutUint16(arg[2:], flagWritable)
	}
	binary.LittleEndian.PutUint32(arg[4:], uint32(count))
	return arg
}

// notifyArg is struct ioctl_gntalloc_unmap_notify: u64 index, u32 action, u32 event channel port.
func notifyArg(index uint64, action Action, port uint32) []byte {
	arg := make([]byte, 0, unmapNotifyStruct)
	arg = binary.LittleEndian.AppendUint64(arg, index)
	arg = binary.LittleEndian.AppendUint32(arg, uint32(action))
	return binary.LittleEndian.AppendUint32(arg, port)
}

// deallocArg is struct ioctl_gntalloc_dealloc_gref: u64 index, u32 count, padding.
func deallocArg(index uint64, count int) []byte {
	arg := binary.LittleEndian.AppendUint64(nil, index)
	arg = binary.LittleEndian.AppendUint32(arg, uint32(count))
	return append(arg, 0, 0, 0, 0)
}

// SetUnmapNotify tells the kernel what to do when the page that holds the byte
// at offset in Mem is unmapped, by Close or by this process's death. A page has
// one such order; a later one replaces it. The event channel port must be bound
// already (it is not looked at without SendEvent). Not possible after Detach.
func (p *Pages) SetUnmapNotify(offset int, action Action, port uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	op := fmt.Sprintf("set unmap notification at offset %d", offset)
	switch {
	case p.detached:
		return &Error{Op: op, Err: fs.ErrClosed}
	case offset < 0 || offset >= len(p.Mem):
		return &Error{Op: op, Err: fmt.Errorf("outside of %d bytes: %w", len(p.Mem), syscall.EINVAL)}
	}
	if err := p.dev.ioctl(ioctlUnmapNotify, notifyArg(p.index+uint64(offset), action, port)); err != nil {
		return &Error{Op: op, Err: err}
	}
	return nil
}

// Detach leaves the pages to the mapping alone and closes the device: the last
// step after Alloc and SetUnmapNotify. From then on they live until Close or
// this process's death. Close detaches by itself; Detach only frees the descriptor early.
func (p *Pages) Detach() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.detach()
}

func (p *Pages) detach() error {
	if p.detached {
		return nil
	}
	p.detached = true
	err := p.dev.ioctl(ioctlDealloc, deallocArg(p.index, len(p.Refs)))
	if err := errors.Join(err, p.dev.Close()); err != nil {
		return &Error{Op: fmt.Sprintf("give up %d grants", len(p.Refs)), Err: err}
	}
	return nil
}

// Close unmaps the pages, which carries out the unmap notifications, and frees
// them; the kernel keeps a page until the other domain has unmapped it too.
func (p *Pages) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.Mem == nil {
		return nil
	}
	err := p.detach()
	if unmapErr := p.dev.munmap(p.Mem); unmapErr != nil {
		err = errors.Join(err, &Error{Op: "unmap", Err: unmapErr})
	}
	p.Mem = nil
	return err
}
