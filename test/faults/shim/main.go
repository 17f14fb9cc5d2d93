// Command shim stands in QEMU's place in the lab's stubdomains, to do to QEMU, to PID 1 and to their kernel
// what no toolstack can: it becomes QEMU by exec, and leaves a child behind that obeys dom0.
//
// QEMU's rights are the child's too. What needs more of root's does another shim, which stubinit starts as its rescue shell (stubinit.shell).
//
// Each takes its own "FAULT PHASE" from the stubdomain's data/fault, waits until stubinit's boot is in that phase or past it ("now": does not wait), does
// it, writes what came of it to data/fault-result, and removes data/fault. FAULT is a signal's number, for QEMU, or a name (see confined and unconfined). "9 qemu"
// written before the boot is a QEMU that dies before it has done anything.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/test/standin"
)

const (
	faultNode  = "data/fault"
	resultNode = "data/fault-result"
)

// phases of stubinit's boot, in order, from the one that starts QEMU on.
var phases = []string{"qemu", "monitor", "bridge", "running"}

// A fault gets QEMU's pid and returns what there is to say.
type fault func(pid int) (string, error)

// confined are those faults that QEMU itself could be the cause of, and are no signals.
var confined = map[string]fault{
	"report":    report,
	"rights":    rights,
	"oom":       oom,
	"talk":      talk,
	"signals":   signals,
	"orphans":   orphans,
	"fill":      fill,
	"clear":     func(int) (string, error) { return "", clearFill() },
	"few-files": func(pid int) (string, error) { return limitFiles(pid, true) },
	"files":     func(pid int) (string, error) { return limitFiles(pid, false) },
}

// unconfined are the others.
var unconfined = map[string]fault{
	"press":   press,
	"panic":   func(int) (string, error) { return "", os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0) },
	"oops":    oops,
	"threads": threads,
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == "-child" {
		fmt.Println("shim:", obeyConfined(os.Args[2]))
		return
	}
	if len(os.Args) > 1 && os.Args[1] == "-unconfined" { // and what the kernel and stubinit add for a shell
		fmt.Println("shim: unconfined:", obeyUnconfined())
		return
	}
	if len(os.Args) == 2 && os.Args[1] == "-orphans" {
		leaveOrphans()
		return
	}
	if len(os.Args) == 3 && os.Args[1] == "-press" {
		if err := exceed(os.Args[2]); err != nil {
			fmt.Println("shim:", err)
			os.Exit(1)
		}
		return
	}
	err := dieEarly()
	if err == nil {
		var null *os.File
		if null, err = os.Open("/dev/null"); err == nil {
			_, err = os.StartProcess("/proc/self/exe", []string{"shim", "-child", strconv.Itoa(os.Getpid())},
				&os.ProcAttr{Files: []*os.File{null, os.Stdout, os.Stderr}})
		}
	}
	if err != nil {
		fmt.Println("shim:", err)
	}
	fmt.Println("shim:", standin.Become())
	os.Exit(1)
}

// dieEarly is a signal in phase "qemu": the boot goes past it before a child could look.
func dieEarly() error {
	ctx := context.Background()
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	value, err := xs.ReadString(ctx, faultNode)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	what, phase, _ := strings.Cut(value, " ")
	signal, err := strconv.Atoi(what)
	if err != nil || phase != phases[0] {
		return nil
	}
	fmt.Printf("shim: signal %d to QEMU before its first step\n", signal)
	return unix.Kill(os.Getpid(), syscall.Signal(signal))
}

// obeyConfined is QEMU's child.
func obeyConfined(qemu string) error {
	ctx := context.Background()
	pid, err := strconv.Atoi(qemu)
	if err != nil {
		return err
	}
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	if err := standin.Announce(ctx, xs, pid); err != nil {
		return err
	}
	return obey(ctx, xs, pid, confined, func(what string) bool { return unconfined[what] == nil })
}

// obeyUnconfined is the rescue shell. What it has to say goes where QEMU's output does: a tty beside the log would mix with it.
func obeyUnconfined() error {
	ctx := context.Background()
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	pid, err := standin.AwaitQEMU(ctx, xs)
	if err != nil {
		return err
	}
	if os.Stdout, err = os.OpenFile(fmt.Sprintf("/proc/%d/fd/1", pid), os.O_WRONLY, 0); err != nil {
		return err
	}
	os.Stderr = os.Stdout
	return obey(ctx, xs, pid, unconfined, func(what string) bool { return unconfined[what] != nil })
}

// obey does what dom0 says, if it is for this shim, one fault after the other.
func obey(ctx context.Context, xs *xenstore.Client, pid int, faults map[string]fault, mine func(what string) bool) error {
	target, err := xs.ReadString(ctx, "target")
	if err != nil {
		return err
	}
	for {
		value, err := xs.WaitFor(ctx, faultNode, func(value string, exists bool) bool {
			what, _, ok := strings.Cut(value, " ")
			return exists && ok && mine(what)
		})
		if err != nil {
			return err
		}
		what, phase, _ := strings.Cut(value, " ")
		if phase != "now" {
			from := slices.Index(phases, phase)
			if from < 0 {
				return fmt.Errorf("%q: no such phase", value)
			}
			_, err := xs.WaitFor(ctx, "device-model/"+target+"/stubinit/phase", func(value string, _ bool) bool {
				return slices.Index(phases, value) >= from
			})
			if err != nil {
				return err
			}
		}
		result, err := do(what, pid, faults)
		if err != nil {
			result = "error: " + err.Error()
		}
		fmt.Printf("shim: %s: %s\n", what, result)
		if err := xs.Write(ctx, resultNode, result); err != nil {
			return err
		}
		if err := xs.Remove(ctx, faultNode); err != nil {
			return err
		}
	}
}

func do(what string, pid int, faults map[string]fault) (string, error) {
	if signal, err := strconv.Atoi(what); err == nil {
		return "sent", unix.Kill(pid, syscall.Signal(signal))
	}
	f := faults[what]
	if f == nil {
		return "", errors.New("no such fault")
	}
	return f(pid)
}

// report is what QEMU could read of PID 1 and the kernel: "rss_kib=N anon_kib=N symbols=N", symbols being kernel addresses that are not hidden.
func report(int) (string, error) {
	status, err := os.ReadFile("/proc/1/status")
	if err != nil {
		return "", err
	}
	values := map[string]string{}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		values[key] = strings.TrimSuffix(strings.TrimSpace(value), " kB")
	}
	table, err := os.ReadFile("/proc/kallsyms")
	if err != nil {
		return "", err
	}
	shown, all := 0, 0
	for line := range strings.Lines(string(table)) {
		all++
		if address, _, _ := strings.Cut(line, " "); strings.Trim(address, "0") != "" {
			shown++
		}
	}
	if all == 0 {
		return "", errors.New("/proc/kallsyms is empty")
	}
	return fmt.Sprintf("rss_kib=%s peak_kib=%s anon_kib=%s symbols=%d", values["VmRSS"], values["VmHWM"], values["RssAnon"], shown), nil
}

// rights tries the ways to the kernel's log and addresses that root has: "WAY=ERROR …", and "null" for a file that is /dev/null, or
// that this kernel does not have.
func rights(int) (string, error) {
	var tries []string
	add := func(way string, err error) {
		text := "done"
		if errno := unix.Errno(0); errors.As(err, &errno) {
			text = unix.ErrnoName(errno)
		} else if err != nil {
			text = strconv.Quote(err.Error())
		}
		tries = append(tries, way+"="+text)
	}
	_, err := kernelLog()
	add("syslog", err)
	for way, path := range map[string]string{"kmsg": "/dev/kmsg", "proc-kmsg": "/proc/kmsg", "kcore": "/proc/kcore", "sysrq": "/proc/sysrq-trigger"} {
		var found unix.Stat_t
		if err := unix.Stat(path, &found); err == unix.ENOENT || err == nil && found.Rdev == unix.Mkdev(1, 3) {
			tries = append(tries, way+"=null")
		} else {
			add(way, err)
		}
	}
	f, err := os.Open("/proc/self/exe") // no module, but it is not looked at
	if err != nil {
		return "", err
	}
	defer f.Close()
	add("module", unix.FinitModule(int(f.Fd()), "", 0))
	add("sysctl", os.WriteFile("/proc/sys/kernel/kptr_restrict", []byte("0"), 0))
	add("umount", unix.Unmount("/proc/sys", unix.MNT_DETACH))
	add("mount", unix.Mount("proc", "/tmp", "proc", 0, ""))
	add("mknod", unix.Mknod("/dev/log", unix.S_IFCHR|0o600, int(unix.Mkdev(1, 11))))
	_, err = os.Readlink("/proc/1/root") // PID 1 has other mounts
	add("root", err)
	slices.Sort(tries)
	return strings.Join(tries, " "), nil
}

// talk writes more than console 0's ring holds to QEMU's output, which is the shim's.
func talk(int) (string, error) {
	const lines = 100
	for i := range lines {
		fmt.Printf("shim: line %d of some that are more than a console's ring has room for\n", i)
	}
	return fmt.Sprintf("%d lines", lines), nil
}

// pressLimit is the limit of a group of processes that takes more, KiB.
const pressLimit = 1024

// press makes a task wait for memory, which is what pressure is: one in a control group that has taken more than its memory.high sleeps.
func press(int) (string, error) {
	const (
		dir   = "/run/pressure"
		group = dir + "/small"
	)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	if err := unix.Mount("none", dir, "cgroup2", 0, ""); err != nil {
		return "", err
	}
	if err := os.WriteFile(dir+"/cgroup.subtree_control", []byte("+memory"), 0); err != nil {
		return "", err
	}
	if err := os.Mkdir(group, 0o700); err != nil {
		return "", err
	}
	if err := os.WriteFile(group+"/memory.high", []byte(strconv.Itoa(pressLimit<<10)), 0); err != nil {
		return "", err
	}
	p, err := os.StartProcess("/proc/self/exe", []string{"shim", "-press", group}, &os.ProcAttr{Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		return "", err
	}
	if state, err := p.Wait(); err != nil || !state.Success() {
		return "", fmt.Errorf("%v %v", state, err)
	}
	stat, err := os.ReadFile("/proc/pressure/memory")
	if err != nil {
		return "", err
	}
	some, _, _ := strings.Cut(string(stat), "\n")
	return some, errors.Join(unix.Rmdir(group), unix.Unmount(dir, 0), unix.Rmdir(dir))
}

// exceed joins a control group, and takes a quarter more than its limit.
func exceed(group string) error {
	if err := os.WriteFile(group+"/cgroup.procs", []byte("0"), 0); err != nil {
		return err
	}
	p, err := unix.Mmap(-1, 0, pressLimit<<10*5/4, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return err
	}
	for i := 0; i < len(p); i += 4096 {
		p[i] = 1
	}
	return nil
}

// oom takes memory until the kernel has ended QEMU. The shim itself is the last one that it would take.
func oom(pid int) (string, error) {
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return "", err
	}
	const piece = 1 << 20
	for n := 0; ; n++ {
		if err := unix.Kill(pid, 0); err != nil {
			return fmt.Sprintf("QEMU went at %d MiB", n), nil
		}
		p, err := unix.Mmap(-1, 0, piece, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE)
		if err != nil {
			return "", err
		}
		for i := 0; i < piece; i += 4096 {
			p[i] = 1
		}
	}
}

// signals sends PID 1 all that there are.
func signals(int) (string, error) {
	const rounds, last = 1000, 64
	for range rounds {
		for s := unix.Signal(1); s <= last; s++ {
			if err := unix.Kill(1, s); err != nil {
				return "", fmt.Errorf("signal %d: %w", s, err)
			}
		}
	}
	// One that says it is a fault of PID 1's own: siginfo_t's number, errno, code (SI_QUEUE), sender.
	info := [32]int32{int32(unix.SIGSEGV), 0, -1}
	if _, _, errno := unix.Syscall(unix.SYS_RT_SIGQUEUEINFO, 1, uintptr(unix.SIGSEGV), uintptr(unsafe.Pointer(&info))); errno != unix.EPERM {
		return "", fmt.Errorf("rt_sigqueueinfo: %v, want %v", errno, unix.EPERM)
	}
	return fmt.Sprintf("%d of each of %d", rounds, last), nil
}

// threads lets there be more processes: the kernel allows for as many as its memory has room for in use; dead ones need less.
func threads(int) (string, error) {
	return "", os.WriteFile("/proc/sys/kernel/threads-max", []byte(strconv.Itoa(4*orphanCount)), 0)
}

const orphanCount = 1000

// orphans makes 1000 dead processes, which threads makes room for, that PID 1 inherits in one go, and waits until it has reaped them.
func orphans(int) (string, error) {
	p, err := os.StartProcess("/proc/self/exe", []string{"shim", "-orphans"}, &os.ProcAttr{Files: []*os.File{nil, os.Stdout, os.Stderr}})
	if err != nil {
		return "", err
	}
	state, err := p.Wait()
	if err != nil {
		return "", err
	}
	if !state.Success() {
		return "", errors.New(state.String())
	}
	most := 0
	for {
		zombies, err := zombies()
		if err != nil || zombies == 0 {
			return fmt.Sprintf("%d left behind, %d of them seen dead", orphanCount, most), err
		}
		most = max(most, zombies)
		// PID 1 runs meanwhile; one that does not reap makes the test's own limit end this.
		ts := unix.Timespec{Nsec: 1_000_000}
		_ = unix.Nanosleep(&ts, nil)
	}
}

func zombies() (n int, err error) {
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		stat, err := os.ReadFile(f)
		if err != nil {
			continue // gone
		}
		if i := strings.LastIndexByte(string(stat), ')'); i >= 0 && strings.HasPrefix(string(stat[i+1:]), " Z") {
			n++
		}
	}
	return n, nil
}

// leaveOrphans forks without exec: a thousand programs would not fit into the stubdomain's memory. The child makes no call into Go's runtime.
func leaveOrphans() {
	for range orphanCount {
		pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
		if errno != 0 {
			fmt.Println("shim: fork:", errno)
			os.Exit(1)
		}
		if pid == 0 {
			for {
				unix.RawSyscall(unix.SYS_EXIT_GROUP, 5, 0, 0)
			}
		}
	}
}

// filled are the file systems that a QEMU which was taken over could fill.
var filled = []string{"/dev/fill", "/run/fill", "/tmp/fill"}

func fill(int) (string, error) {
	var sizes []string
	for _, name := range filled {
		f, err := os.Create(name)
		if err != nil {
			return "", err
		}
		n := 0
		block := make([]byte, 64<<10)
		for err == nil {
			var w int
			w, err = f.Write(block)
			n += w
		}
		f.Close()
		if !errors.Is(err, unix.ENOSPC) {
			return "", fmt.Errorf("%s after %d bytes: %w", name, n, err)
		}
		sizes = append(sizes, fmt.Sprintf("%s=%d", name, n))
	}
	return strings.Join(sizes, " "), nil
}

func clearFill() error {
	var errs []error
	for _, name := range filled {
		errs = append(errs, os.Remove(name))
	}
	return errors.Join(errs...)
}

// oopsModule is a kernel module whose first instruction is none.
const oopsModule = "/oops.ko"

// oops makes a process load oopsModule, which ends it in the kernel, and writes what the kernel's own log has of that to QEMU's output, which is the
// shim's. The process is a fork without exec, of one thread: an oops ends a thread, and would leave a program's others behind.
func oops(int) (string, error) {
	f, err := os.Open(oopsModule)
	if err != nil {
		return "", err
	}
	defer f.Close()
	params, err := unix.BytePtrFromString("")
	if err != nil {
		return "", err
	}
	before, err := kernelLog()
	if err != nil {
		return "", err
	}
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return "", os.NewSyscallError("fork", errno)
	}
	if pid == 0 {
		_, _, errno := unix.RawSyscall(unix.SYS_FINIT_MODULE, f.Fd(), uintptr(unsafe.Pointer(params)), 0)
		for {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, uintptr(errno), 0, 0)
		}
	}
	var status unix.WaitStatus
	if _, err := unix.Wait4(int(pid), &status, 0, nil); err != nil {
		return "", os.NewSyscallError("wait4", err)
	}
	if !status.Signaled() {
		return "", fmt.Errorf("loading %s: %w", oopsModule, unix.Errno(status.ExitStatus()))
	}
	after, err := kernelLog()
	if err != nil {
		return "", err
	}
	if len(after) < len(before) {
		return "", errors.New("the kernel's log has begun anew")
	}
	for _, line := range after[len(before):] {
		fmt.Println("shim: kernel's log:", line)
	}
	level, err := os.ReadFile("/proc/sys/kernel/printk") // the console's, then others
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("the loading process ended by signal %d, the console's level is %s", status.Signal(), strings.Fields(string(level))[0]), nil
}

// kernelLog is all that the kernel keeps: lines "<LEVEL>[TIME] TEXT".
func kernelLog() ([]string, error) {
	size, err := unix.Klogctl(unix.SYSLOG_ACTION_SIZE_BUFFER, nil)
	if err != nil {
		return nil, os.NewSyscallError("syslog", err)
	}
	text := make([]byte, size)
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, text)
	if err != nil {
		return nil, os.NewSyscallError("syslog", err)
	}
	return strings.Split(strings.TrimSuffix(string(text[:n]), "\n"), "\n"), nil
}

// limitFiles leaves QEMU no descriptor that it does not have already, or the usual 1024.
func limitFiles(pid int, few bool) (string, error) {
	limit := unix.Rlimit{Cur: 1024, Max: 4096}
	if few {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return "", err
		}
		// The limit is on a descriptor's number; free numbers below the highest are few.
		limit.Cur = uint64(len(open))
	}
	return fmt.Sprintf("limit=%d", limit.Cur), unix.Prlimit(pid, unix.RLIMIT_NOFILE, &limit, nil)
}
