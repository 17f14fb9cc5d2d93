package main

import (
	"log/slog"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/console"
)

func TestParseCmdline(t *testing.T) {
	with := func(change func(*params)) params {
		p := defaultParams()
		change(&p)
		return p
	}
	for _, tt := range []struct {
		in       string
		want     params
		warnings []string
	}{
		{"", defaultParams(), nil},
		{"console=hvc0 quiet xen_privcmd.unrestricted=1\n", defaultParams(), nil},
		{"stubinit.log=debug", with(func(p *params) { p.log = slog.LevelDebug }), nil},
		{"stubinit.keep stubinit.shell=on stubinit.console_state=off", with(func(p *params) { p.keep, p.shell, p.consoleState = true, true, false }), nil},
		{"stubinit.log_burst=4096 stubinit.log_rate=1024", with(func(p *params) { p.qemuLimit = console.Limit{Burst: 4096, Rate: 1024} }), nil},
		{"stubinit.qemu_stuck=kill stubinit.qemu_stuck_after=5s", with(func(p *params) { p.stuckKill, p.stuckAfter = true, 5*time.Second }), nil},
		{"stubinit.qemu_stuck_after=0", with(func(p *params) { p.stuckAfter = 0 }), nil},
		{"stubinit.log=loud stubinit.keep=maybe stubinit.log_rate=0 stubinit.qemu_stuck_after=1ms stubinit.qemu_stuck= stubinit.nonsense=1", defaultParams(), []string{
			"kernel command line: stubinit.log=loud: want debug or info; going on without it",
			"kernel command line: stubinit.keep=maybe: want on or off; going on without it",
			"kernel command line: stubinit.log_rate=0: want a number of bytes from 1024 to 1073741824; going on without it",
			"kernel command line: stubinit.qemu_stuck_after=1ms: want a time such as 30s, 1s at least, or 0 for never; going on without it",
			"kernel command line: stubinit.qemu_stuck=: want log or kill; going on without it",
			"kernel command line: stubinit.nonsense=1: no such parameter; going on without it",
		}},
	} {
		got, warnings := parseCmdline(tt.in)
		if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(params{})); d != "" {
			t.Errorf("%q (-want +got):\n%s", tt.in, d)
		}
		if d := cmp.Diff(tt.warnings, warnings); d != "" {
			t.Errorf("%q warnings (-want +got):\n%s", tt.in, d)
		}
	}
}
