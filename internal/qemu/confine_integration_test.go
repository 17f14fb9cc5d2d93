//go:build integration

package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// These make the test binary another program: what TestConfine starts, and what starts a program without the rights to confine it.
const (
	tryArg   = "try-what-is-refused"
	startArg = "start-without-rights"
)

func init() {
	if len(os.Args) != 2 {
		return
	}
	switch os.Args[1] {
	case tryArg:
		tryRefused()
		os.Exit(0)
	case startArg:
		p, err := NewReaper(nil).Start(&Command{Path: "/bin/true", Argv: []string{"true"}, Confine: true}, Stdio{})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		<-p.Done()
		fmt.Printf("%v\n%v\n", p.Exit(), p.Unconfined())
		os.Exit(0)
	}
}

// tryRefused says what a program has, and what came of each try.
func tryRefused() {
	_, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, make([]byte, 4096))
	fmt.Println("syslog:", err)
	// An unconfined caller's error would be EBADF, EFAULT, EINVAL or ENOENT; none of these does anything.
	fmt.Println("finit_module:", unix.FinitModule(-1, "", 0))
	_, _, errno := unix.Syscall(unix.SYS_BPF, ^uintptr(0), 0, 0)
	fmt.Println("bpf:", errno)
	_, err = unix.PerfEventOpen(&unix.PerfEventAttr{}, 0, -1, -1, 0)
	fmt.Println("perf_event_open:", err)
	fmt.Println("mount:", unix.Mount("/no", "/no", "no", 0, ""))
	fmt.Println("umount2:", unix.Unmount("/proc/sys", unix.MNT_DETACH))
	fmt.Println("setns:", unix.Setns(-1, 0))
	fmt.Println("unshare:", unix.Unshare(unix.CLONE_NEWNS))
	for _, path := range []string{"/proc/sys/kernel/kptr_restrict", "/proc/sys/kernel/core_pattern"} {
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		f.Close()
		fmt.Println("write", err)
	}
	for _, path := range hidden {
		var found unix.Stat_t
		err := unix.Stat(path, &found)
		fmt.Println(path, "hidden:", found.Rdev == unix.Mkdev(1, 3) || errors.Is(err, unix.ENOENT)) // /dev/null, or a kernel without it
	}
}

// threads are the values of a key in the status of each of our threads.
func threads(t *testing.T, key string) []string {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(files) == 0 {
		t.Fatalf("threads: %v %v", files, err)
	}
	var values []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
		if err != nil {
			t.Fatal(err)
		}
		values = append(values, statusField(t, string(text), key))
	}
	return values
}

func statusField(t *testing.T, status, key string) string {
	t.Helper()
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("no %s in\n%s", key, status)
	return ""
}

func capabilitySet(t *testing.T, value string) uint64 {
	t.Helper()
	set, err := strconv.ParseUint(value, 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	return set
}

// output starts c and gives all that it writes.
func output(t *testing.T, r *Reaper, c *Command) string {
	t.Helper()
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	p, err := r.Start(c, Stdio{Out: out, Err: out})
	out.Close()
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(in)
	if err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, p); !exit.Success() || p.Unconfined() != nil {
		t.Fatalf("%v, unconfined: %v\n%s", exit, p.Unconfined(), text)
	}
	return string(text)
}

func TestConfine(t *testing.T) {
	r := reaper(t)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	before, mode := capabilitySet(t, threads(t, "CapBnd")[0]), threads(t, "Seccomp")[0]
	const keep = 1<<unix.CAP_SYS_ADMIN | 1<<unix.CAP_SYS_RAWIO | 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_IPC_LOCK | 1<<unix.CAP_SYS_RESOURCE

	status := output(t, r, &Command{Path: "/bin/cat", Argv: []string{"cat", "/proc/self/status"}, Confine: true})
	for _, key := range []string{"CapBnd", "CapPrm", "CapEff"} {
		if got := capabilitySet(t, statusField(t, status, key)); got != before&keep || got == before {
			t.Errorf("%s: %#x, want %#x", key, got, before&keep)
		}
	}
	if got := statusField(t, status, "Seccomp"); got != "2" {
		t.Errorf("Seccomp: %s, want a filter's 2", got)
	}

	got := output(t, r, &Command{Path: "/proc/self/exe", Argv: []string{"try", tryArg}, Confine: true})
	want := `syslog: operation not permitted
finit_module: operation not permitted
bpf: operation not permitted
perf_event_open: operation not permitted
mount: operation not permitted
umount2: operation not permitted
setns: operation not permitted
unshare: operation not permitted
write open /proc/sys/kernel/kptr_restrict: read-only file system
write open /proc/sys/kernel/core_pattern: read-only file system
`
	for _, path := range hidden {
		want += path + " hidden: true\n"
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}

	// Nothing of it stays with us, nor with what is started without it.
	for _, set := range threads(t, "CapBnd") {
		if capabilitySet(t, set) != before {
			t.Errorf("a thread's bounding set is %s, want %#x", set, before)
		}
	}
	for _, now := range threads(t, "Seccomp") {
		if now != mode {
			t.Errorf("a thread's seccomp mode is %s, want %s", now, mode)
		}
	}
	now, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(mounts, now) {
		t.Errorf("our mounts have changed (-before +now):\n%s", cmp.Diff(string(mounts), string(now)))
	}
	status = output(t, r, &Command{Path: "/bin/cat", Argv: []string{"cat", "/proc/self/status"}})
	if got := capabilitySet(t, statusField(t, status, "CapBnd")); got != before {
		t.Errorf("CapBnd of an unconfined program: %#x, want %#x", got, before)
	}
}

// TestConfineRefused: a kernel that does not do it all starts the program nevertheless.
func TestConfineRefused(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &Command{Path: "/usr/bin/setpriv", Argv: []string{"setpriv", "--bounding-set", "-sys_admin", self, startArg}}
	want := `exit status 0
mount namespace: operation not permitted
seccomp filter, for which the kernel needs CONFIG_SECCOMP_FILTER: permission denied
`
	if d := cmp.Diff(want, output(t, reaper(t), c)); d != "" {
		t.Error(d)
	}
}
