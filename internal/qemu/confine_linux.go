package qemu

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// capabilities are all that a confined program can have: what QEMU needs as a device model.
var capabilities = []uintptr{
	unix.CAP_SYS_ADMIN,    // a passed-through device's config file: without it the kernel shows 64 bytes (pci_read_config in drivers/pci/pci-sysfs.c)
	unix.CAP_SYS_RAWIO,    // /dev/mem, where its MSI-X table is (QEMU hw/xen/xen_pt_msi.c)
	unix.CAP_NET_ADMIN,    // TUNSETIFF
	unix.CAP_IPC_LOCK,     // locked memory, for hypercalls' arguments too
	unix.CAP_SYS_RESOURCE, // its own limits (QEMU hw/xen/xen-mapcache.c)
}

// refused are the system calls that a confined program gets EPERM for. CAP_SYS_ADMIN alone would allow many of them; the others stand here so that no
// single one of the three measures is all there is.
var refused = []uint32{
	// the kernel's log
	unix.SYS_SYSLOG,
	// code in the kernel, and the kernel's end
	unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE, unix.SYS_BPF, unix.SYS_PERF_EVENT_OPEN,
	unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_REBOOT,
	// what is hidden, and how to find it again
	unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_PIVOT_ROOT, unix.SYS_MOVE_MOUNT, unix.SYS_FSOPEN, unix.SYS_FSPICK, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT,
	unix.SYS_OPEN_TREE, unix.SYS_OPEN_TREE_ATTR, unix.SYS_MOUNT_SETATTR, unix.SYS_SETNS, unix.SYS_UNSHARE, unix.SYS_OPEN_BY_HANDLE_AT,
	// signals that look like the processor's: Go's runtime ends PID 1 at those
	unix.SYS_RT_SIGQUEUEINFO, unix.SYS_RT_TGSIGQUEUEINFO, unix.SYS_PIDFD_SEND_SIGNAL,
	// other processes, and memory
	unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD, unix.SYS_SWAPON, unix.SYS_SWAPOFF,
}

// hidden are files that a confined program finds /dev/null in place of. Kernels without one of them do without.
var hidden = []string{
	"/dev/kmsg", "/proc/kmsg", // the kernel's log, for CAP_SYS_ADMIN too (check_syslog_permissions in kernel/printk/printk.c)
	"/proc/kcore",               // its memory, for CAP_SYS_RAWIO
	"/proc/sysrq-trigger",       // which writes registers to the log, and panics
	"/sys/kernel/uevent_helper", // names a program that the kernel starts with all rights
}

// inOwnThread runs f in a thread that ends after it, so that what f changes of the thread stays with f and with the processes that it starts.
func inOwnThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the runtime ends the thread with its goroutine
		if unix.Gettid() == unix.Getpid() {
			// The first thread never ends, and /proc/PID shows it as the process.
			inOwnThread(f)
			runtime.UnlockOSThread()
			return
		}
		f()
	}()
	<-done
}

// confine takes from the calling thread, for what it starts, the ways to the kernel's log, addresses and code. It has to be inOwnThread's. What the
// kernel refuses is in the error, and the rest is done all the same.
//
// It is no wall: a QEMU that holds /dev/xen/privcmd unrestricted, which it needs, can map any frame of its domain with it.
func confine() error {
	return errors.Join(hideKernel(), dropCapabilities(), filterCalls())
}

// hideKernel gives the thread mounts of its own, without hidden, and with the sysctls read-only.
func hideKernel() error {
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	var errs []error
	for _, path := range hidden {
		if err := unix.Mount(os.DevNull, path, "", unix.MS_BIND, ""); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("hide %s: %w", path, err))
		}
	}
	const sysctls = "/proc/sys"
	err := unix.Mount(sysctls, sysctls, "", unix.MS_BIND, "")
	if err == nil {
		err = unix.Mount("", sysctls, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	}
	if err != nil {
		errs = append(errs, fmt.Errorf("make %s read-only: %w", sysctls, err))
	}
	return errors.Join(errs...)
}

// dropCapabilities leaves capabilities in the thread's bounding set, past which root's exec cannot get (capabilities(7)).
func dropCapabilities() error {
	for c := uintptr(0); ; c++ {
		if slices.Contains(capabilities, c) {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) { // the kernel has no more
			return nil
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
}

// auditArch are the kernel's names of the architectures that we run on (linux/audit.h).
var auditArch = map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}

// x32Bit is in the numbers of the x32 ABI's system calls, which have amd64's audit arch (asm/unistd.h); no other number is as high.
const x32Bit = 0x40000000

// callFilter is the seccomp filter over struct seccomp_data (linux/seccomp.h) that answers EPERM to refused, kills a process that calls by another ABI, of
// whose numbers it knows nothing, and allows the rest.
func callFilter(arch uint32) []unix.SockFilter {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		least = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K

		numberOffset, archOffset = 0, 4
	)
	program := []unix.SockFilter{
		{Code: load, K: archOffset},
		{Code: equal, K: arch, Jt: 1},
		{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS},
		{Code: load, K: numberOffset},
		{Code: least, K: x32Bit, Jf: 1},
		{Code: ret, K: unix.SECCOMP_RET_KILL_PROCESS},
	}
	for _, number := range refused {
		program = append(program,
			unix.SockFilter{Code: equal, K: number, Jf: 1},
			unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)})
	}
	return append(program, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
}

// filterCalls sets the filter for the thread. CAP_SYS_ADMIN, which a confined program keeps, spares it no_new_privs (seccomp(2)).
func filterCalls() error {
	arch, ok := auditArch[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("seccomp filter for %s: %w", runtime.GOARCH, errors.ErrUnsupported)
	}
	program := callFilter(arch)
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, uintptr(unsafe.Pointer(&prog))); errno != 0 {
		return fmt.Errorf("seccomp filter, for which the kernel needs CONFIG_SECCOMP_FILTER: %w", errno)
	}
	return nil
}
