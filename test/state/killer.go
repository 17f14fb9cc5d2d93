package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

const (
	// killerPath is where stubinit looks for QEMU first; Debian's own is realQEMU.
	killerPath = "/usr/bin/qemu-system-i386"
	realQEMU   = "/usr/libexec/xen-qemu-system-i386"
	killArg    = "kill"
)

// armNode of the stubdomain makes the killer kill; without it QEMU is like any other.
const armNode = "data/kill"

// killer becomes the real QEMU, and leaves a process behind that kills it as soon as it has written some of a state.
func killer() error {
	if len(os.Args) == 3 && os.Args[1] == killArg {
		pid, err := strconv.Atoi(os.Args[2])
		if err != nil {
			return err
		}
		return killAtSave(pid)
	}
	// The process's own descriptors stay QEMU's alone.
	p, err := os.StartProcess(killerPath, []string{killerPath, killArg, strconv.Itoa(os.Getpid())}, &os.ProcAttr{Files: []*os.File{nil, nil, nil}})
	if err != nil {
		return err
	}
	if err := p.Release(); err != nil {
		return err
	}
	return unix.Exec(realQEMU, append([]string{realQEMU}, os.Args[1:]...), os.Environ())
}

// killAtSave waits until dom0 says so, and then looks at fdset 1's memory file every 200 µs, before QEMU runs on:
// SCHED_FIFO.
func killAtSave(pid int) error {
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	_, err = xs.WaitFor(context.Background(), armNode, func(_ string, exists bool) bool { return exists })
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	attr := &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 10}
	if err := unix.SchedSetAttr(0, attr, 0); err != nil {
		return fmt.Errorf("sched_setattr: %w", err)
	}
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	ts := unix.NsecToTimespec((200 * time.Microsecond).Nanoseconds())
	for path := ""; ; unix.Nanosleep(&ts, nil) {
		var st unix.Stat_t
		if path == "" || unix.Stat(path, &st) != nil {
			var err error
			if path, err = findState(fds); err != nil {
				return err
			}
			continue
		}
		if st.Size > 0 {
			return unix.Kill(pid, unix.SIGKILL)
		}
	}
}

// findState gives the descriptor of the state's memory file, or "".
func findState(fds string) (string, error) {
	entries, err := os.ReadDir(fds)
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		path := filepath.Join(fds, e.Name())
		target, err := os.Readlink(path)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", err
		}
		if strings.HasPrefix(target, "/memfd:state") {
			return path, nil
		}
	}
	return "", nil
}
