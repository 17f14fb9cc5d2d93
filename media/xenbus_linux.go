package media

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// preferXenbus lets the kernel's xenstore threads run before QEMU and us on the stubdomain's one vCPU. libxl removes a vbd and adds the
// next one within milliseconds; a kernel that looks only after that sees a node that exists, keeps the old device in state Closed,
// and the new disk never comes (drivers/xen/xenbus/xenbus_probe.c, xenbus_dev_changed).
func preferXenbus(proc string) error {
	threads, err := xenbusThreads(proc)
	if err != nil {
		return err
	}
	for _, pid := range threads {
		attr := &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: 1}
		if err := unix.SchedSetAttr(pid, attr, 0); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("sched_setattr of thread %d: %w", pid, err)
		}
	}
	return nil
}

// xenbusThreads finds xenbus, which takes messages from xenstored, and xenwatch, which acts on them. Kernel threads have no parent but
// kthreadd, process 2; a program of that name is not meant.
func xenbusThreads(proc string) ([]int, error) {
	stats, err := filepath.Glob(filepath.Join(proc, "[1-9]*", "stat"))
	if err != nil {
		return nil, err
	}
	var threads []int
	for _, stat := range stats {
		b, err := os.ReadFile(stat)
		if err != nil {
			continue // it has ended
		}
		number, rest, _ := strings.Cut(string(b), " (")
		name, rest, _ := strings.Cut(rest, ") ")
		fields := strings.Fields(rest)
		if name != "xenbus" && name != "xenwatch" || len(fields) < 2 || fields[1] != "2" {
			continue
		}
		pid, err := strconv.Atoi(number)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", stat, err)
		}
		threads = append(threads, pid)
	}
	return threads, nil
}
