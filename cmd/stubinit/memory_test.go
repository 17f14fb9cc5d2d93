package main

import "testing"

func TestParseOOMKills(t *testing.T) {
	for in, want := range map[string]int{"": 0, "pgfault 5\noom_kill 2\nx 1\n": 2, "oom_kill 0\n": 0, "drop_oom_kill 7\n": 0} {
		if got := parseOOMKills(in); got != want {
			t.Errorf("%q: %d, want %d", in, got, want)
		}
	}
}

func TestParseUsage(t *testing.T) {
	const status = "Name:\tqemu\nVmHWM:\t   99999 kB\nVmRSS:\t   12345 kB\nRssAnon:\t  1 kB\n"
	const stat = "132 (qemu) sys) S 1 132 132 0 -1 4194304 1101 7 0 3 5 2"
	got, err := parseUsage(status, stat)
	if want := (usage{resident: 12345, faults: 1101}); got != want || err != nil {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	for _, bad := range [][2]string{{"VmRSS:\tx kB\n", stat}, {status, "1 (x) S 1"}, {status, ""}, {status, "1 (x) S 1 1 1 0 -1 0 x"}} {
		if _, err := parseUsage(bad[0], bad[1]); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}
