// Package evtchn binds, notifies and waits for Xen event channels through
// /dev/xen/evtchn (Xen's public header sys/evtchn.h, Linux drivers/xen/evtchn.c).
package evtchn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/internal/fdio"
)

// Device is the kernel's event channel device.
const Device = "/dev/xen/evtchn"

// The ioctls of sys/evtchn.h: _IOC(_IOC_NONE, 'E', nr, size). Their arguments
// are arrays of u32; the binding ones return the local port.
const (
	ioctlBindInterdomain = 0x84501 // remote domain, remote port
	ioctlBindUnbound     = 0x44502 // remote domain
	ioctlUnbind          = 0x44503 // port
	ioctlNotify          = 0x44504 // port
	ioctlReset           = 0x4505
)

// ErrOverflow is wrapped by Wait's error after the kernel's ring of ports has
// overflowed. Events may be lost; the channels go on working.
var ErrOverflow = errors.New("event ring overflowed, events may be lost")

// Error says which operation failed on which port or domain.
type Error struct {
	Op  string
	Err error
}

func (e *Error) Error() string { return Device + ": " + e.Op + ": " + e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// device is what File needs of the kernel.
type device interface {
	Read([]byte) (int, error)
	Write([]byte) (int, error)
	SetReadDeadline(time.Time) error
	Close() error
	ioctl(req uint, args ...uint32) (int, error)
	// readNow is Read past Go's poller; syscall.EAGAIN if there is nothing.
	readNow([]byte) (int, error)
	// watch has p call ready as long as there is something to read, or an overflow.
	watch(p *fdio.Poller, ready func()) error
	// renew returns the same open file under a new descriptor, with a fresh
	// registration in Go's poller. The old one is to be closed.
	renew() (device, error)
}

// File is an open event channel device. The ports bound through it end with it.
// Its methods may be called by several goroutines; one at a time waits.
type File struct {
	waiting sync.Mutex // held by Wait; guards buf
	buf     []byte     // ports that were read and not yet returned
	space   [256]byte  // of buf
	taken   []uint32   // Take's

	mu          sync.Mutex
	written     []byte    // unmask's
	arg         [1]uint32 // Notify's
	dev         device
	ports       []uint32 // bound
	interrupted bool
	closed      bool
}

// Open opens Device.
func Open() (*File, error) {
	dev, err := openDevice(Device)
	if err != nil {
		return nil, &Error{Op: "open", Err: bare(err)}
	}
	return &File{dev: dev}, nil
}

// bare takes off the os package's own operation and path.
func bare(err error) error {
	var pe *fs.PathError
	if errors.As(err, &pe) {
		return pe.Err
	}
	return err
}

// BindUnbound makes a port that the domain remote may bind to.
func (f *File) BindUnbound(remote uint16) (uint32, error) {
	return f.bind(fmt.Sprintf("make a port for domain %d", remote), ioctlBindUnbound, uint32(remote))
}

// BindInterdomain binds to a port that the domain remote has made for this one.
func (f *File) BindInterdomain(remote uint16, remotePort uint32) (uint32, error) {
	return f.bind(fmt.Sprintf("bind to port %d of domain %d", remotePort, remote), ioctlBindInterdomain, uint32(remote), remotePort)
}

func (f *File) bind(op string, req uint, args ...uint32) (uint32, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	port, err := f.ioctl(req, args...)
	if err != nil {
		return 0, &Error{Op: op, Err: err}
	}
	f.ports = append(f.ports, uint32(port))
	return uint32(port), nil
}

// Unbind closes a port.
func (f *File) Unbind(port uint32) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.ioctl(ioctlUnbind, port); err != nil {
		return &Error{Op: fmt.Sprintf("unbind port %d", port), Err: err}
	}
	f.ports = slices.DeleteFunc(f.ports, func(p uint32) bool { return p == port })
	return nil
}

// Notify sends an event to the other end of port.
func (f *File) Notify(port uint32) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.arg[0] = port
	if _, err := f.ioctl(ioctlNotify, f.arg[:]...); err != nil {
		return &Error{Op: fmt.Sprintf("notify port %d", port), Err: err}
	}
	return nil
}

// ioctl runs with f.mu held: no call uses a descriptor that Close or resetRing has given back.
func (f *File) ioctl(req uint, args ...uint32) (int, error) {
	if f.closed {
		return 0, fs.ErrClosed
	}
	return f.dev.ioctl(req, args...)
}

// Close closes the device with all its ports and wakes Wait with an error that is fs.ErrClosed.
func (f *File) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil
	}
	f.closed = true
	if err := f.dev.Close(); err != nil {
		return &Error{Op: "close", Err: bare(err)}
	}
	return nil
}

// Wait waits for an event and returns its port, which it has unmasked again:
// an event that comes while the caller looks at its memory is seen by the next
// Wait. Events of one port that come close together are one.
// After an error that is ErrOverflow the caller should look at every channel
// and may go on.
func (f *File) Wait() (uint32, error) {
	f.waiting.Lock()
	defer f.waiting.Unlock()
	for {
		if port, ok := f.next(); ok {
			if err := f.unmask(port); err != nil {
				return 0, err
			}
			return port, nil
		}
		if err := f.fill(); err != nil {
			return 0, &Error{Op: "wait for an event", Err: err}
		}
	}
}

// Watch has p call ready when events have come, for Take. Nobody calls Wait then.
func (f *File) Watch(p *fdio.Poller, ready func()) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	err := error(fs.ErrClosed)
	if !f.closed {
		err = f.dev.watch(p, ready)
	}
	if err != nil {
		return &Error{Op: "watch", Err: bare(err)}
	}
	return nil
}

// Take takes events that have come and unmasks their ports, as Wait does, but never waits. It says whether there was one.
// After an error that is ErrOverflow the caller should look at every channel and may go on.
func (f *File) Take() (bool, error) {
	f.waiting.Lock()
	defer f.waiting.Unlock()
	dev, n, err := f.readNow()
	switch {
	case err == nil:
		err = f.keep(n)
	case errors.Is(err, syscall.EAGAIN):
		return false, nil
	case errors.Is(err, syscall.EFBIG):
		err = f.resetRing(dev)
	}
	if err != nil {
		return false, &Error{Op: "take events", Err: bare(err)}
	}
	ports := f.taken[:0]
	for port, ok := f.next(); ok; port, ok = f.next() {
		ports = append(ports, port)
	}
	if f.taken = ports; len(ports) == 0 {
		return false, nil
	}
	return true, f.unmask(ports...)
}

// readNow reads ports into space, if there are any.
func (f *File) readNow() (dev device, n int, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, 0, fs.ErrClosed
	}
	n, err = f.dev.readNow(f.space[:])
	return f.dev, n, err
}

// Interrupt ends Wait for good: it fails with an error that is fs.ErrClosed. All
// else goes on working.
func (f *File) Interrupt() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.interrupted = true
	f.dev.SetReadDeadline(time.Unix(1, 0)) // fails only when closed, which wakes Wait too
}

// next takes a port that is still bound from what was read.
func (f *File) next() (uint32, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for len(f.buf) >= 4 {
		port := binary.LittleEndian.Uint32(f.buf)
		f.buf = f.buf[4:]
		if slices.Contains(f.ports, port) {
			return port, true
		}
	}
	return 0, false
}

// unmask lets the kernel deliver the ports again. The write is never short:
// the kernel takes whole arrays of up to a page.
func (f *File) unmask(ports ...uint32) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written = f.written[:0]
	for _, port := range ports {
		f.written = binary.LittleEndian.AppendUint32(f.written, port)
	}
	err := fs.ErrClosed
	if !f.closed {
		_, err = f.dev.Write(f.written)
	}
	if err != nil {
		return &Error{Op: fmt.Sprintf("unmask ports %d", ports), Err: bare(err)}
	}
	return nil
}

// fill reads ports into buf.
func (f *File) fill() error {
	dev, err := f.reader()
	if err != nil {
		return err
	}
	n, err := dev.Read(f.space[:])
	if err == nil {
		return f.keep(n)
	}
	if _, over := f.reader(); over != nil {
		return over
	}
	err = bare(err)
	if errors.Is(err, syscall.EFBIG) {
		return f.resetRing(dev)
	}
	// An overflow makes poll report POLLERR alone, which Go's poller turns into
	// an error of its own without reading: ask the device.
	_, n, direct := f.readNow()
	switch {
	case direct == nil:
		return f.keep(n)
	case errors.Is(direct, syscall.EFBIG):
		return f.resetRing(dev)
	}
	return err
}

// reader gives the device to wait on.
func (f *File) reader() (device, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed || f.interrupted {
		return nil, fs.ErrClosed
	}
	return f.dev, nil
}

func (f *File) keep(n int) error {
	if n == 0 || n%4 != 0 {
		return fmt.Errorf("read gave %d bytes, not a number of ports", n)
	}
	f.buf = f.space[:n]
	return nil
}

// resetRing empties the kernel's ring and unmasks all ports, those that were in
// the ring among them. Go's poller remembers POLLERR until the next event, so
// the descriptor is replaced as well.
func (f *File) resetRing(dev device) error {
	f.mu.Lock()
	if f.closed {
		f.mu.Unlock()
		return fs.ErrClosed
	}
	_, err := dev.ioctl(ioctlReset)
	var renewed device
	if err == nil {
		renewed, err = dev.renew()
	}
	if err == nil {
		f.dev = renewed
		if f.interrupted {
			renewed.SetReadDeadline(time.Unix(1, 0))
		}
		err = dev.Close()
	}
	ports := slices.Clone(f.ports)
	f.mu.Unlock()
	if err == nil && len(ports) > 0 {
		err = f.unmask(ports...)
	}
	if err != nil {
		return fmt.Errorf("%w; recovery failed: %w", ErrOverflow, err)
	}
	return ErrOverflow
}
