package main

import (
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/stubinit/stubinit/internal/console"
)

// A params is what the stubdomain's kernel command line says to stubinit.
// Every name starts with "stubinit."; README.md, "Kernel parameters", lists them.
type params struct {
	log          slog.Level
	keep         bool          // do not power off at the end
	consoleState bool          // write our own console/state (PROTOCOL: QEMU >= 8.2 in dom0)
	qemuLimit    console.Limit // of QEMU's output on console 0
	stuckAfter   time.Duration // QEMU counts as stuck after this long without an answer; 0: never
	stuckKill    bool
	shell        bool // a busybox shell on console 0
}

func defaultParams() params {
	return params{
		log:          slog.LevelInfo,
		consoleState: true,
		qemuLimit:    console.DefaultLimit,
		stuckAfter:   30 * time.Second,
	}
}

// parseCmdline reads /proc/cmdline's text. A bad value leaves its default and
// gives a warning; it never stops the boot.
func parseCmdline(text string) (p params, warnings []string) {
	p = defaultParams()
	for _, word := range strings.Fields(text) {
		name, value, hasValue := strings.Cut(word, "=")
		name, ours := strings.CutPrefix(name, "stubinit.")
		if !ours {
			continue
		}
		var err error
		switch name {
		case "log":
			switch value {
			case "debug":
				p.log = slog.LevelDebug
			case "info":
				p.log = slog.LevelInfo
			default:
				err = fmt.Errorf("want debug or info")
			}
		case "keep":
			err = parseFlag(&p.keep, value, hasValue)
		case "console_state":
			err = parseFlag(&p.consoleState, value, hasValue)
		case "shell":
			err = parseFlag(&p.shell, value, hasValue)
		case "log_burst":
			err = parseBytes(&p.qemuLimit.Burst, value)
		case "log_rate":
			err = parseBytes(&p.qemuLimit.Rate, value)
		case "qemu_stuck":
			switch value {
			case "kill":
				p.stuckKill = true
			case "log":
				p.stuckKill = false
			default:
				err = fmt.Errorf("want log or kill")
			}
		case "qemu_stuck_after":
			var d time.Duration
			if d, err = time.ParseDuration(value); err != nil || d < 0 || d > 0 && d < time.Second {
				err = fmt.Errorf("want a time such as 30s, 1s at least, or 0 for never")
				break
			}
			p.stuckAfter = d
		default:
			err = fmt.Errorf("no such parameter")
		}
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("kernel command line: %s: %v; going on without it", word, err))
		}
	}
	return p, warnings
}

// parseFlag takes "name" alone as on.
func parseFlag(to *bool, value string, hasValue bool) error {
	switch {
	case !hasValue, value == "1", value == "on":
		*to = true
	case value == "0", value == "off":
		*to = false
	default:
		return fmt.Errorf("want on or off")
	}
	return nil
}

func parseBytes(to *int, value string) error {
	n, err := strconv.Atoi(value)
	if err != nil || n < 1024 || n > 1<<30 {
		return fmt.Errorf("want a number of bytes from 1024 to %d", 1<<30)
	}
	*to = n
	return nil
}
