package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/internal/qemu"
)

// A stuckWatch asks QEMU for a sign of life on our own monitor. Its main loop
// serves that monitor, the devices' slow paths and the toolstack's commands
// alike: a QEMU that does not answer here does nothing else either.
type stuckWatch struct {
	query  func(ctx context.Context, name string, args any) (json.RawMessage, error)
	after  time.Duration // how long an answer may take; also the time between two questions
	saving func() bool   // a save holds the main loop for as long as it takes
	report func() []string
	kill   func() error // nil: only log
	log    *slog.Logger
}

// run asks until ctx or the monitor ends.
func (w *stuckWatch) run(ctx context.Context) error {
	next := time.NewTimer(w.after)
	defer next.Stop()
	var since time.Time // of an answer that is overdue
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-next.C:
		}
		asked := time.Now()
		limit, cancel := context.WithTimeout(ctx, w.after)
		_, err := w.query(limit, "query-status", nil)
		cancel()
		switch {
		case err == nil && !since.IsZero():
			w.log.Info("QEMU answers again", "after", time.Since(since))
			since = time.Time{}
		case err == nil:
		case !errors.Is(err, context.DeadlineExceeded):
			return err // the monitor's end, which is QEMU's
		case w.saving():
		case since.IsZero():
			since = asked
			w.log.Error("QEMU is stuck: it does not answer on its monitor", "for", w.after)
			for _, line := range w.report() {
				w.log.Error("stuck QEMU", "proc", line)
			}
			if w.kill == nil {
				w.log.Error("QEMU is left alone; stubinit.qemu_stuck=kill on the stubdomain's command line would end it and the guest")
				break
			}
			w.log.Error("killing QEMU: stubinit.qemu_stuck=kill")
			if err := w.kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				return err
			}
		}
		next.Reset(w.after)
	}
}

// newStuckWatch is the watch over a's QEMU; nil if the command line says never.
func (a *agent) newStuckWatch() *stuckWatch {
	if a.params.stuckAfter == 0 {
		return nil
	}
	w := &stuckWatch{
		query:  a.monitor.Execute,
		after:  a.params.stuckAfter,
		saving: a.state.saving.Load,
		report: func() []string { return qemu.StuckReport(os.DirFS("/proc"), a.qemu.PID()) },
		log:    a.log,
	}
	if a.params.stuckKill {
		w.kill = func() error { return a.qemu.Kill(syscall.SIGKILL) }
	}
	return w
}
