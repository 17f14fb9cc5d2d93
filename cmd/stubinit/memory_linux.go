package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// logMemory says how much of stubdomain_memory is left, for whoever sets it.
func (a *agent) logMemory() {
	total, available, err := readMeminfo()
	if err != nil {
		a.log.Debug("memory unknown", "err", err)
		return
	}
	a.log.Info("memory", "total_mib", total>>10, "available_mib", available>>10)
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
