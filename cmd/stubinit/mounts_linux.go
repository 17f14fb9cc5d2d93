package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mounts are the file systems of the stubdomain. QEMU gets nothing that it
// could fill: every tmpfs has a limit.
var mounts = []struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}{
	{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
	{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0755,size=1m"},
	{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "mode=0755,size=1m,nr_inodes=1024"},
	{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "mode=1777,size=4m,nr_inodes=1024"},
}

func mountAll() error {
	for _, m := range mounts {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data)
		if m.fstype == "devtmpfs" && errors.Is(err, unix.EBUSY) {
			continue // CONFIG_DEVTMPFS_MOUNT
		}
		if err != nil {
			return hint(fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err), "the kernel needs CONFIG_PROC_FS, CONFIG_SYSFS, CONFIG_DEVTMPFS and CONFIG_TMPFS")
		}
	}
	return nil
}

// readOnlyRoot takes the initramfs itself from everybody's pen.
func readOnlyRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("remount / read-only: %w", err)
	}
	return nil
}

// unpackedMark is the archive's last file (initramfs.Unpacked): a kernel
// without enough memory unpacks what fits, and starts init all the same.
const unpackedMark = "/~unpacked"

func checkUnpacked(root string) error {
	if _, err := os.Stat(root + unpackedMark); err != nil {
		return hint(fmt.Errorf("the initramfs was not unpacked to its end: %w", err),
			"raise stubdomain_memory in xl.cfg; mkinitramfs prints the least that its image needs")
	}
	return nil
}

// sysctls are set before anything else runs. Kernels without one of them do without.
var sysctls = []struct{ path, value string }{
	// QEMU reserves the table of its map cache, 384 MiB of which it touches a few
	// pages (QEMU hw/xen/xen-mapcache.c); by default the kernel refuses a single allocation that is larger than all memory.
	{"/proc/sys/vm/overcommit_memory", "1"},
	// A QEMU that was taken over learns no kernel addresses, as root neither.
	{"/proc/sys/kernel/kptr_restrict", "2"},
	{"/proc/sys/kernel/dmesg_restrict", "1"},
	{"/proc/sys/kernel/perf_event_paranoid", "3"},
	{"/proc/sys/kernel/unprivileged_bpf_disabled", "2"},
}

func setSysctls() error {
	for _, s := range sysctls {
		if err := os.WriteFile(s.path, []byte(s.value), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}
