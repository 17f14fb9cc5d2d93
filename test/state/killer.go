package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/test/standin"
)

const killArg = "kill"

// armNode of the stubdomain makes the killer kill; without it QEMU is like any other.
const armNode = "data/kill"

// killer stands in the place of two programs of the image. In QEMU's it becomes the real one. In the rescue shell's, which has more rights than
// QEMU, it kills that as soon as it has written some of a state.
func killer() error {
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	ctx := context.Background()
	if len(os.Args) > 1 && os.Args[1] == killArg { // and what the kernel and stubinit add for a shell
		err := killAtSave(ctx, xs)
		// Standard error is a tty beside the log; the kernel's log is shown on console 0, errors even if it is quiet.
		if kmsg, e := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); e == nil {
			fmt.Fprintf(kmsg, "<3>state: QEMU is killed as it saves: %v\n", err)
			kmsg.Close()
		}
		return err
	}
	if err := standin.Announce(ctx, xs, os.Getpid()); err != nil {
		return err
	}
	return standin.Become()
}

// killAtSave waits until dom0 says so, and then looks at fdset 1's memory file every 200 µs, before QEMU runs on:
// SCHED_FIFO.
func killAtSave(ctx context.Context, xs *xenstore.Client) error {
	pid, err := standin.AwaitQEMU(ctx, xs)
	if err != nil {
		return err
	}
	if _, err := xs.WaitFor(ctx, armNode, func(_ string, exists bool) bool { return exists }); err != nil {
		return err
	}
	runtime.LockOSThread()
	attr := &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 10}
	if err := unix.SchedSetAttr(0, attr, 0); err != nil {
		return fmt.Errorf("sched_setattr: %w", err)
	}
	ts := unix.NsecToTimespec((200 * time.Microsecond).Nanoseconds())
	for ; ; unix.Nanosleep(&ts, nil) {
		saving, err := hasState(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			return err
		}
		if saving {
			return unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// hasState says whether one of a process's descriptors is a state's memory file with something in it. It may have more than
// one such file: QEMU before 9.1 keeps removed ones while the guest is stopped.
func hasState(fds string) (bool, error) {
	entries, err := os.ReadDir(fds)
	if err != nil {
		return false, err
	}
	for _, e := range entries {
		path := filepath.Join(fds, e.Name())
		target, err := os.Readlink(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return false, err
		}
		var st unix.Stat_t
		if strings.HasPrefix(target, "/memfd:state") && unix.Stat(path, &st) == nil && st.Size > 0 {
			return true, nil
		}
	}
	return false, nil
}
