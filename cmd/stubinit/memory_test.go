package main

import "testing"

func TestParseOOMKills(t *testing.T) {
	for in, want := range map[string]int{"": 0, "pgfault 5\noom_kill 2\nx 1\n": 2, "oom_kill 0\n": 0, "drop_oom_kill 7\n": 0} {
		if got := parseOOMKills(in); got != want {
			t.Errorf("%q: %d, want %d", in, got, want)
		}
	}
}
