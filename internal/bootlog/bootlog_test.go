package bootlog

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const text = `[    0.100000] Linux version 6.12
stubinit 1.500000 info stubinit version=v1.2 time=2026-11-26T10:20:30.250000Z
stubinit 1.500100 info step done step=mounts took=1.1ms
qemu 1.4 a line of QEMU
stubinit 1.700000 info QEMU started pid=132 path="/usr/bin/a b" version=10.0.13
stubinit 1.700200 info step done step=qemu took=3.9ms` + "\r" + `
stubinit 1.900000 info memory total_mib=148 available_mib=50
stubinit 1.900001 info resident agent_kib=5000 qemu_kib=21000 agent_faults=900 qemu_faults=2260
stubinit 1.910000 info step done step=running took=70ms
stubinit 9.000000 warn memory is short: raise stubdomain_memory in xl.cfg
stubinit 9.000000 info memory total_mib=148 available_mib=1
`

func TestParse(t *testing.T) {
	got, err := Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	ms := time.Millisecond
	want := &Log{
		Version: "v1.2", Started: time.Date(2026, 11, 26, 10, 20, 28, 750e6, time.UTC), Init: 1499 * ms,
		Steps: []Step{
			{"mounts", 1499 * ms, 1500*ms + 100*time.Microsecond},
			{"qemu", 1696*ms + 300*time.Microsecond, 1700*ms + 200*time.Microsecond},
			{"running", 1840 * ms, 1910 * ms},
		},
		QEMU: 1700 * ms, Running: 1910 * ms,
		TotalMiB: 148, AvailableMiB: 50, AgentKiB: 5000, QEMUKiB: 21000, QEMUFaults: 2260,
	}
	round := cmp.Transformer("round", func(d time.Duration) string { return d.Round(time.Microsecond).String() })
	if diff := cmp.Diff(want, got, round); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got.End() != got.Running {
		t.Errorf("end %v, want %v", got.End(), got.Running)
	}
}

func TestParseErrors(t *testing.T) {
	for _, text := range []string{
		"",
		"stubinit 1.0 info step done step=mounts took=1ms\n",
		"stubinit 1.0 info stubinit version=x\nstubinit 1.1 info step done step=mounts took=\n",
		"stubinit 1.0 info stubinit version=x\nstubinit 1.1 info step done step=mounts took=2s\n",
	} {
		if l, err := Parse(text); err == nil {
			t.Errorf("%q: %+v", text, l)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(text)
	f.Fuzz(func(t *testing.T, text string) {
		l, err := Parse(text)
		if err != nil {
			return
		}
		for _, s := range l.Steps {
			if s.Start < 0 || s.Start > s.End || s.End > l.End() || s.Start < l.Init && s == l.Steps[0] {
				t.Errorf("step %+v of a log that begins at %v and ends at %v", s, l.Init, l.End())
			}
		}
	})
}
