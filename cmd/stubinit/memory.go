package main

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// logMemory says how much of stubdomain_memory is left, for whoever sets it.
func (a *agent) logMemory() {
	f, err := os.Open("/proc/meminfo")
	if err != nil {
		a.log.Debug("memory unknown", "err", err)
		return
	}
	defer f.Close()
	total, available, err := parseMeminfo(f)
	if err != nil {
		a.log.Debug("memory unknown", "err", err)
		return
	}
	a.log.Info("memory", "total_mib", total>>10, "available_mib", available>>10)
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
