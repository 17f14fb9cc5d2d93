package netup

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// tapFlags are those QEMU attaches with (net/tap-linux.c): Ethernet frames, no packet information, a virtio-net header, one queue.
const tapFlags = unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR

// addTap makes a persistent tap in the network namespace of this thread. A uid or gid of 0 leaves the owner or group unset;
// with both unset, whoever can open /dev/net/tun may attach.
func addTap(name string, uid, gid int) error {
	fd, err := openTap(name, tapFlags|unix.IFF_TUN_EXCL)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if uid != 0 {
		if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, uid); err != nil {
			return os.NewSyscallError("ioctl TUNSETOWNER", err)
		}
	}
	if gid != 0 {
		if err := unix.IoctlSetInt(fd, unix.TUNSETGROUP, gid); err != nil {
			return os.NewSyscallError("ioctl TUNSETGROUP", err)
		}
	}
	return os.NewSyscallError("ioctl TUNSETPERSIST", unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1))
}

// deleteTap makes a tap go that nobody has open. One that is open is left alone (EBUSY): with its link gone, QEMU would find its
// descriptor in error at once and forever, and spin on it.
func deleteTap(socket int, name string) error {
	if _, err := ifindex(socket, name); err != nil { // or attaching would make it anew
		return err
	}
	fd, err := openTap(name, tapFlags)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return os.NewSyscallError("ioctl TUNSETPERSIST", unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 0))
}

// openTap attaches a new descriptor to the tap, made if it does not exist.
func openTap(name string, flags uint16) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return -1, fmt.Errorf("name %q: %w", name, err)
	}
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: tunDevice, Err: err}
	}
	ifr.SetUint16(flags)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("ioctl TUNSETIFF", err)
	}
	return fd, nil
}

const tunDevice = "/dev/net/tun"

// ifindex returns a link's index. One ioctl on any socket is cheaper than a netlink request.
func ifindex(socket int, name string) (int, error) {
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return 0, fmt.Errorf("name %q: %w", name, err)
	}
	if err := unix.IoctlIfreq(socket, unix.SIOCGIFINDEX, ifr); err != nil {
		return 0, os.NewSyscallError("ioctl SIOCGIFINDEX", err)
	}
	return int(ifr.Uint32()), nil
}
