// Package privcmd makes hypercalls through /dev/xen/privcmd (Xen's public
// header sys/privcmd.h, Linux drivers/xen/privcmd.c).
package privcmd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"syscall"
)

// Device is the kernel's hypercall device.
const Device = "/dev/xen/privcmd"

// The ioctls of sys/privcmd.h: _IOC(_IOC_NONE, 'P', nr, size), 64-bit sizes.
const (
	ioctlHypercall = 0x305000
	ioctlDMOp      = 0x105005
)

const (
	hypercallXenVersion  = 17 // __HYPERVISOR_xen_version, xen.h
	xenVersion           = 0  // XENVER_version, version.h: takes no buffer
	dmOpRemoteShutdown   = 16 // XEN_DMOP_remote_shutdown, hvm/dm_op.h
	dmOpSize             = 32 // sizeof(struct xen_dm_op)
	dmOpArgumentOffset   = 8  // of the union in struct xen_dm_op
	hypercallArguments   = 5
	hypercallStructBytes = 8 * (1 + hypercallArguments)
)

// Reason is why a domain was shut down: SHUTDOWN_* of Xen's sched.h.
type Reason uint32

// The toolstack acts on these as the guest's on_poweroff, on_reboot,
// on_crash, on_watchdog and on_soft_reset say.
const (
	Poweroff  Reason = 0
	Reboot    Reason = 1
	Suspend   Reason = 2
	Crash     Reason = 3
	Watchdog  Reason = 4
	SoftReset Reason = 5
)

func (r Reason) String() string {
	names := [...]string{"poweroff", "reboot", "suspend", "crash", "watchdog", "soft reset"}
	if int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("reason %d", uint32(r))
}

// Error says which operation failed.
type Error struct {
	Op  string
	Err error
}

func (e *Error) Error() string { return Device + ": " + e.Op + ": " + e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// device is what File needs of the kernel.
type device interface {
	// ioctl passes arg, a struct as its bytes, and returns the ioctl's value.
	ioctl(req uint, arg []byte) (int, error)
	// dmOp passes bufs as an array of privcmd_dm_op_buf.
	dmOp(domid uint16, bufs [][]byte) error
	Close() error
}

// File is an open hypercall device.
type File struct{ dev device }

// Open opens Device. In a domU, Linux since XSA-482 makes open wait until
// xenstore is reachable.
func Open() (*File, error) { return open(Device) }

func open(path string) (*File, error) {
	dev, err := openDevice(path)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: load kernel module xen_privcmd", err)
		}
		return nil, &Error{Op: "open", Err: err}
	}
	return &File{dev: dev}, nil
}

// Close closes the device.
func (f *File) Close() error {
	if err := f.dev.Close(); err != nil {
		return &Error{Op: "close", Err: err}
	}
	return nil
}

// Hypercall makes hypercall number op (__HYPERVISOR_* of xen.h) and returns its
// value. An argument that is an address must be of memory that stays in place.
// Refused with EPERM while the device is restricted.
func (f *File) Hypercall(op uint64, args ...uint64) (int, error) {
	name := fmt.Sprintf("hypercall %d", op)
	if len(args) > hypercallArguments {
		return 0, &Error{Op: name, Err: fmt.Errorf("%d arguments, the limit is %d: %w", len(args), hypercallArguments, syscall.EINVAL)}
	}
	value, err := f.dev.ioctl(ioctlHypercall, hypercallArg(op, args))
	if err != nil {
		return 0, &Error{Op: name, Err: err}
	}
	return value, nil
}

// hypercallArg is struct privcmd_hypercall: u64 op, u64 arg[5].
func hypercallArg(op uint64, args []uint64) []byte {
	b := make([]byte, hypercallStructBytes)
	binary.LittleEndian.PutUint64(b, op)
	for i, arg := range args {
		binary.LittleEndian.PutUint64(b[8*(i+1):], arg)
	}
	return b
}

// Restricted says whether the kernel lets this domain act on its target alone,
// as Linux does since XSA-482 unless xen_privcmd.unrestricted=1 is given; QEMU
// cannot start then. That parameter is not shown in sysfs, so this asks Xen's
// version: a hypercall without effect, which a restricted device refuses.
func (f *File) Restricted() (bool, error) {
	_, err := f.Hypercall(hypercallXenVersion, xenVersion)
	if errors.Is(err, syscall.EPERM) {
		return true, nil
	}
	return false, err
}

// DMOp makes a device model operation on a domain (HYPERVISOR_dm_op): the
// first buffer is struct xen_dm_op, the others are what that operation takes.
func (f *File) DMOp(domid uint16, bufs ...[]byte) error {
	if err := f.dev.dmOp(domid, bufs); err != nil {
		return &Error{Op: fmt.Sprintf("device model operation on domain %d", domid), Err: err}
	}
	return nil
}

// RemoteShutdown declares a domain, whose device model this domain is, shut
// down. It is the guest's end: nothing of it runs any more.
func (f *File) RemoteShutdown(domid uint16, reason Reason) error {
	if err := f.dev.dmOp(domid, [][]byte{remoteShutdownBuffer(reason)}); err != nil {
		return &Error{Op: fmt.Sprintf("shut down domain %d (%v)", domid, reason), Err: err}
	}
	return nil
}

// remoteShutdownBuffer is struct xen_dm_op: u32 op, u32 pad, and in the union
// struct xen_dm_op_remote_shutdown: u32 reason.
func remoteShutdownBuffer(reason Reason) []byte {
	b := make([]byte, dmOpSize)
	binary.LittleEndian.PutUint32(b, dmOpRemoteShutdown)
	binary.LittleEndian.PutUint32(b[dmOpArgumentOffset:], uint32(reason))
	return b
}

// RemoteShutdown is File.RemoteShutdown on a device that is opened for it. An
// agent that may have to act with no descriptors left opens a File beforehand.
func RemoteShutdown(domid uint16, reason Reason) error {
	return remoteShutdown(Device, domid, reason)
}

func remoteShutdown(path string, domid uint16, reason Reason) error {
	f, err := open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.RemoteShutdown(domid, reason), f.Close())
}
