package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// subreaperEnv makes the test binary a subreaper instead: TestOrphans.
const subreaperEnv = "STUBINIT_TEST_SUBREAPER"

const orphans = 1000

func TestMain(m *testing.M) {
	if os.Getenv(subreaperEnv) != "" {
		if err := subreaper(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func reaper(t *testing.T) *Reaper {
	t.Helper()
	open := descriptors(t)
	r := NewReaper(func(pid int, exit Exit) { t.Errorf("orphan %d: %v", pid, exit) })
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
		if now := descriptors(t); now > open {
			t.Errorf("%d descriptors are open, %d were", now, open)
		}
	})
	return r
}

func descriptors(t *testing.T) int {
	t.Helper()
	// Go's poller opens its own at the first use.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func shell(script string, files ...*os.File) *Command {
	return &Command{Path: "/bin/sh", Argv: []string{"sh", "-c", script}, Files: files}
}

func wait(t *testing.T, p *Process) Exit {
	t.Helper()
	// Not the test's context: it has ended in a cleanup.
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	exit, err := p.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return exit
}

func TestExit(t *testing.T) {
	tests := []struct {
		script  string
		want    string
		success bool
	}{
		{"exit 0", "exit status 0", true},
		{"exit 3", "exit status 3", false},
		{"kill -KILL $$", "killed by SIGKILL", false},
		{"ulimit -c 0; kill -SEGV $$", "killed by SIGSEGV", false},
		{"kill -40 $$", "killed by signal 40", false},
	}
	r := reaper(t)
	for _, tt := range tests {
		p, err := r.Start(shell(tt.script), Stdio{})
		if err != nil {
			t.Fatal(err)
		}
		exit := wait(t, p)
		if exit.String() != tt.want || exit.Success() != tt.success || exit.MaxRSS <= 0 || p.Exit() != exit {
			t.Errorf("%s: %+v, want %s", tt.script, exit, tt.want)
		}
	}
	if got := (Exit{Signal: syscall.SIGABRT, Core: true}).String(); got != "killed by SIGABRT, core dumped" {
		t.Error(got)
	}
}

// TestStart looks at what a program finds around it.
func TestStart(t *testing.T) {
	r := reaper(t)
	var passed []*os.File
	for _, text := range []string{"three", "four"} {
		in, out, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(out, text)
		out.Close()
		defer in.Close()
		passed = append(passed, in)
	}
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	script := `read x && echo stdin has "$x"
	cat <&3; echo; cat <&4; echo
	[ -e /proc/$$/fd/5 ] && echo a descriptor too many
	read pid comm state ppid pgrp session rest < /proc/$$/stat; [ $$ = $session ] && [ $$ = $pgrp ] && echo own session
	tr '\0' '\n' < /proc/$$/environ; echo "arg: $0, $1" >&2`
	c := shell(script, passed...)
	c.Argv = append(c.Argv, "", "a  b\n'\"$x")
	p, err := r.Start(c, Stdio{Out: out, Err: out})
	if err != nil {
		t.Fatal(err)
	}
	out.Close()
	got, err := io.ReadAll(in)
	if err != nil {
		t.Fatal(err)
	}
	want := "three\nfour\nown session\n" + strings.Join(environment, "\n") + "\narg: , a  b\n'\"$x\n"
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
	if exit := wait(t, p); !exit.Success() {
		t.Error(exit)
	}
	// The caller's files are not blocking now.
	if err := passed[0].SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Error(err)
	}
}

// TestOutputIsNotLost: a full pipe makes the program wait, not lose what it writes.
func TestOutputIsNotLost(t *testing.T) {
	r := reaper(t)
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	p, err := r.Start(shell("head -c 1000000 /dev/zero"), Stdio{Out: out})
	out.Close()
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
		t.Error("program ended before its output was read")
	case <-time.After(50 * time.Millisecond):
	}
	if n, err := io.Copy(io.Discard, in); n != 1000000 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if exit := wait(t, p); !exit.Success() {
		t.Error(exit)
	}
}

func TestStartFails(t *testing.T) {
	r := reaper(t)
	if _, err := r.Start(&Command{Path: "/no/qemu", Argv: []string{"qemu"}}, Stdio{}); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "/no/qemu") {
		t.Errorf("missing program: %v", err)
	}
	closed, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	if _, err := r.Start(shell("exit", closed), Stdio{}); err == nil || !strings.Contains(err.Error(), "descriptor 3") {
		t.Errorf("closed file: %v", err)
	}
}

func TestKill(t *testing.T) {
	r := reaper(t)
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	defer out.Close()
	p, err := r.Start(shell("exec cat"), Stdio{In: in})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.SetOOMScoreAdj(1000); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.PID())); string(b) != "1000\n" {
		t.Errorf("oom_score_adj is %q, %v", b, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if _, err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Wait: %v", err)
	}
	if exit := p.Exit(); exit != (Exit{}) {
		t.Errorf("exit of a live process is %+v", exit)
	}
	if err := p.Kill(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	if exit := wait(t, p); exit.String() != "killed by SIGTERM" {
		t.Error(exit)
	}
	if err := p.Kill(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) || !strings.Contains(err.Error(), "SIGKILL") {
		t.Errorf("Kill of a dead process: %v", err)
	}
	if err := p.SetOOMScoreAdj(0); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("SetOOMScoreAdj of a dead process: %v", err)
	}
}

// TestEachHasItsOwnExit starts programs that may end before Start has returned.
func TestEachHasItsOwnExit(t *testing.T) {
	r := reaper(t)
	if err := exits(t.Context(), r, 100); err != nil {
		t.Error(err)
	}
}

func exits(ctx context.Context, r *Reaper, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	failed := make(chan error, n)
	var running sync.WaitGroup
	for code := range n {
		running.Go(func() {
			p, err := r.Start(shell(fmt.Sprintf("exit %d", code)), Stdio{})
			if err != nil {
				failed <- err
				return
			}
			exit, err := p.Wait(ctx)
			if err == nil && (exit.Code != code || exit.Signal != 0) {
				err = fmt.Errorf("%v, want exit status %d", exit, code)
			}
			failed <- err
		})
	}
	running.Wait()
	close(failed)
	var err error
	for e := range failed {
		err = errors.Join(err, e)
	}
	return err
}

// TestOrphans has a process inherit 1000 orphans, as PID 1 does, that die all at once while its own children end too.
func TestOrphans(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, self)
	cmd.Env = append(os.Environ(), subreaperEnv+"=1")
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("%v: %s", err, bytes.TrimSpace(out))
	}
}

func subreaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("PR_SET_CHILD_SUBREAPER: %w", err)
	}
	// Not os.Pipe, whose ends do not block.
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		return err
	}
	in, out := os.NewFile(uintptr(pipe[0]), "pipe"), os.NewFile(uintptr(pipe[1]), "pipe")

	seen := make(map[int]bool)
	all := make(chan error, 1)
	r := NewReaper(func(pid int, exit Exit) {
		if seen[pid] || exit.String() != "exit status 5" {
			all <- fmt.Errorf("orphan %d: %v (before: %v)", pid, exit, seen[pid])
		}
		if seen[pid] = true; len(seen) == orphans {
			all <- nil
		}
	})
	// Each waits for the end of the pipe; the shell does not wait for them.
	p, err := r.Start(shell(fmt.Sprintf("i=0; while [ $i -lt %d ]; do { read x <&3; exit 5; } & i=$((i+1)); done; exit 7", orphans), in), Stdio{})
	if err != nil {
		return err
	}
	in.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
	defer cancel()
	exit, err := p.Wait(ctx)
	if err != nil || exit.Code != 7 {
		return fmt.Errorf("shell: %v, %w", exit, err)
	}
	out.Close()
	if err := exits(ctx, r, 50); err != nil {
		return err
	}
	select {
	case err = <-all:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return err
	}
	if err := r.Close(); err != nil {
		return err
	}
	if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); !errors.Is(err, syscall.ECHILD) {
		return fmt.Errorf("a child is left: %d, %w", pid, err)
	}
	return nil
}
