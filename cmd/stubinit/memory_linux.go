package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of the Go runtime, which would else let the heap grow to 4 MiB before it collects for the first time. The live heap
// is well below a MiB; a message of a toolstack may be one more.
const (
	heapGrowth  = 25 // percent of the live heap, or of 4 MiB
	memoryLimit = 8 << 20
)

// limitMemory keeps the agent small: each guest's stubdomain_memory has to hold one.
func limitMemory() {
	debug.SetGCPercent(heapGrowth)
	debug.SetMemoryLimit(memoryLimit)
}

// logMemory says how much of stubdomain_memory is left, for whoever sets it, and what we and QEMU take.
func (a *agent) logMemory() {
	total, available, err := readMeminfo()
	if err != nil {
		a.log.Debug("memory unknown", "err", err)
		return
	}
	a.log.Info("memory", "total_mib", total>>10, "available_mib", available>>10)
	agent, err := readProcess(os.Getpid())
	if err != nil {
		a.log.Debug("memory of the agent unknown", "err", err)
		return
	}
	qemu, err := readProcess(a.qemu.PID())
	if err != nil {
		a.log.Debug("memory of QEMU unknown", "err", err)
		return
	}
	a.log.Info("resident", "agent_kib", agent.resident, "qemu_kib", qemu.resident, "agent_faults", agent.faults, "qemu_faults", qemu.faults)
}

// usage is what a process has used so far.
type usage struct {
	resident int // KiB: VmRSS of proc_pid_status(5)
	faults   int // page faults without I/O: minflt of proc_pid_stat(5)
}

func readProcess(pid int) (usage, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	status, err := os.ReadFile(dir + "status")
	if err != nil {
		return usage{}, err
	}
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return usage{}, err
	}
	return parseUsage(string(status), string(stat))
}

func parseUsage(status, stat string) (u usage, err error) {
	for line := range strings.Lines(status) {
		if value, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			u.resident, err = strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(value), " kB"))
			if err != nil {
				return u, fmt.Errorf("status: %q", line)
			}
		}
	}
	// The name, in parentheses, may hold anything; minflt is the eighth field after it.
	f := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(f) < 8 {
		return u, fmt.Errorf("stat: %q", stat)
	}
	if u.faults, err = strconv.Atoi(f[7]); err != nil {
		return u, fmt.Errorf("stat: minflt %q", f[7])
	}
	return u, nil
}

func readMeminfo() (total, available int, err error) {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	return parseMeminfo(f)
}

// followPressure logs when the stubdomain is short of memory (PSI,
// Documentation/accounting/psi.rst), at most once a minute. A kernel without PSI says nothing.
func (a *agent) followPressure(ctx context.Context) error {
	f, err := os.OpenFile("/proc/pressure/memory", os.O_RDWR, 0)
	if err != nil {
		a.log.Debug("memory pressure is not watched", "err", err)
		<-ctx.Done()
		return ctx.Err()
	}
	// Some task stalled for 200 ms within 2 s. The trigger lives as long as the descriptor.
	if _, err := f.Write([]byte("some 200000 2000000\x00")); err != nil {
		f.Close()
		a.log.Debug("memory pressure is not watched", "err", err)
		<-ctx.Done()
		return ctx.Err()
	}
	defer f.Close()
	const quiet = time.Minute
	var last time.Time
	for {
		// POLLPRI is not among what Go's poller waits for: this goroutine keeps a thread.
		poll := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		_, err := unix.Poll(poll, -1)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case poll[0].Revents&unix.POLLERR != 0:
			return errors.New("/proc/pressure/memory: gone")
		}
		if time.Since(last) >= quiet {
			last = time.Now()
			a.log.Warn("memory is short: raise stubdomain_memory in xl.cfg")
			a.logMemory()
		}
	}
}

// oomKills is how many processes the kernel has killed for memory (vmstat's oom_kill, Linux 4.13).
func oomKills() int {
	b, err := os.ReadFile("/proc/vmstat")
	if err != nil {
		return 0
	}
	return parseOOMKills(string(b))
}

func parseOOMKills(vmstat string) int {
	for line := range strings.Lines(vmstat) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			kills, _ := strconv.Atoi(strings.TrimSpace(n))
			return kills
		}
	}
	return 0
}

// parseMeminfo gives MemTotal and MemAvailable of proc_meminfo(5), in KiB.
func parseMeminfo(r io.Reader) (total, available int, err error) {
	want := map[string]*int{"MemTotal:": &total, "MemAvailable:": &available}
	s := bufio.NewScanner(r)
	for s.Scan() && len(want) > 0 {
		f := strings.Fields(s.Text())
		if len(f) < 2 || want[f[0]] == nil {
			continue
		}
		if *want[f[0]], err = strconv.Atoi(f[1]); err != nil {
			return 0, 0, fmt.Errorf("/proc/meminfo: %q", s.Text())
		}
		delete(want, f[0])
	}
	if len(want) > 0 {
		return 0, 0, fmt.Errorf("/proc/meminfo has no MemTotal or MemAvailable")
	}
	return total, available, s.Err()
}
