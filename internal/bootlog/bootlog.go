// Package bootlog reads back what stubinit writes to console 0 while a stubdomain boots (internal/console has the format).
package bootlog

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// A Log is one boot. Times are since the start of the stubdomain's kernel; 0 is a time that the log does not have.
type Log struct {
	Version string    // stubinit's
	Started time.Time // of the kernel, by its wall clock
	Init    time.Duration
	Steps   []Step        // in the order of the log
	QEMU    time.Duration // QEMU was executed
	Running time.Duration // the toolstack knows that the device model runs

	// After the boot.
	TotalMiB, AvailableMiB int // MemTotal and MemAvailable of proc_meminfo(5)
	AgentKiB, QEMUKiB      int // resident
	QEMUFaults             int // page faults of QEMU without I/O
}

// A Step is a part of the boot.
type Step struct {
	Name       string
	Start, End time.Duration
}

var (
	line  = regexp.MustCompile(`^\S+ +(\d+\.\d+) (?:debug|info|warn|error) (.*)$`)
	field = regexp.MustCompile(` (\w+)=("(?:[^"\\]|\\.)*"|\S*)`)
)

// Parse reads a console's text. Other lines than stubinit's are passed over; the error says that there is not even its first.
func Parse(text string) (*Log, error) {
	l := &Log{}
	for row := range strings.Lines(text) {
		m := line.FindStringSubmatch(strings.TrimRight(row, "\r\n"))
		if m == nil {
			continue
		}
		seconds, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			continue // digits beyond a float's
		}
		at := time.Duration(seconds * float64(time.Second))
		message := m[2]
		fields := map[string]string{}
		if i := field.FindStringIndex(message); i != nil {
			for _, f := range field.FindAllStringSubmatch(message[i[0]:], -1) {
				fields[f[1]] = f[2]
			}
			message = message[:i[0]]
		}
		number := func(key string) int {
			n, _ := strconv.Atoi(fields[key])
			return n
		}
		if wall, err := time.Parse(time.RFC3339Nano, fields["time"]); err == nil {
			l.Started = wall.Add(-at)
		}
		switch message {
		case "stubinit":
			l.Version, l.Init = fields["version"], at
		case "step done":
			took, err := time.ParseDuration(fields["took"])
			if err != nil || took < 0 || took > at {
				return nil, fmt.Errorf("boot log: step %s: took %q by %v", fields["step"], fields["took"], at)
			}
			l.Steps = append(l.Steps, Step{fields["step"], at - took, at})
			if fields["step"] == "running" {
				l.Running = at
			}
		case "QEMU started":
			l.QEMU = at
		case "memory":
			if l.TotalMiB == 0 { // the first; later ones tell of pressure
				l.TotalMiB, l.AvailableMiB = number("total_mib"), number("available_mib")
			}
		case "resident":
			l.AgentKiB, l.QEMUKiB, l.QEMUFaults = number("agent_kib"), number("qemu_kib"), number("qemu_faults")
		}
	}
	if l.Init == 0 {
		return nil, errors.New("boot log: stubinit's first line is not there")
	}
	// The first step began before there was a clock to be read; the kernel had done its part then.
	if len(l.Steps) > 0 && l.Steps[0].Start < l.Init {
		l.Init = l.Steps[0].Start
	}
	return l, nil
}

// End is the end of the last thing that the log has.
func (l *Log) End() time.Duration {
	end := max(l.Init, l.QEMU)
	for _, s := range l.Steps {
		end = max(end, s.End)
	}
	return end
}
