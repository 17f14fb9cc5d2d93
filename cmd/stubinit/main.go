// Command stubinit is PID 1 of a Xen stubdomain that runs one guest's QEMU.
//
// boot.go has the sequence. main decides how it ends: whatever happens, PID 1
// logs, syncs and powers the stubdomain off; it never returns and never panics.
package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// version is set by the Makefile from git.
var version = "unknown"

func main() {
	if os.Getpid() != 1 {
		fmt.Printf("stubinit %s\nThis is PID 1 of a Xen stubdomain. mkinitramfs puts it into an image; README.md says how to boot it.\n", version)
		os.Exit(2)
	}
	limitMemory()
	a := newAgent()
	end(a, guarded(a))
}

// guarded is run with a panic made into an error of the step that it happened in.
func guarded(a *agent) error {
	var ended error
	if panicked := withoutPanic(func() error { ended = run(a); return nil }); panicked != nil {
		return &stepError{a.step.Load().(string), panicked}
	}
	return ended
}

// run boots, and returns when the stubdomain has nothing left to do: nil after
// QEMU's ordinary end, else the reason.
func run(a *agent) error {
	if err := ignoreSignals(); err != nil {
		a.log.Warn("whoever breaks out of QEMU can end PID 1 by a signal", "err", err)
	}
	ctx := context.Background() // services go on until the power-off: libxl may still need an answer
	for _, s := range sequence {
		if err := a.runStep(ctx, s); err != nil {
			return &stepError{s.name, err}
		}
	}
	return a.supervise(ctx)
}

// Limits of the end: a dom0 that reads nothing must not keep the stubdomain.
const (
	lastWordsLimit = 2 * time.Second
	lastWordsBytes = 1024
)

// end says the last words and powers off.
func end(a *agent, err error) {
	if err != nil {
		a.fatal(err)
	}
	if a.params.keep {
		a.log.Info("stubinit.keep: not powering off")
		for {
			_ = unix.Pause()
		}
	}
	a.log.Info("power off")
	ctx, cancel := context.WithTimeout(context.Background(), lastWordsLimit)
	defer cancel()
	_ = a.console.Flush(ctx)
	unix.Sync()
	for {
		// Returns only on an error, of which there is nobody left to tell.
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
		_ = unix.Pause()
	}
}
