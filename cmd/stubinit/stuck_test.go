package main

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestStuckWatch(t *testing.T) {
	closed := errors.New("monitor closed")
	for _, tt := range []struct {
		name   string
		delays []time.Duration // of QEMU's answers; then the monitor closes
		saving bool
		kill   bool
		want   []string // in the log, in this order
		killed int
	}{
		{"well", []time.Duration{0, time.Second, 29 * time.Second}, false, true, nil, 0},
		{"stuck", []time.Duration{0, time.Hour, time.Hour, 0}, false, false,
			[]string{"QEMU is stuck", "State: D", "left alone", "QEMU answers again after=2m0s"}, 0},
		{"killed", []time.Duration{time.Hour}, false, true, []string{"QEMU is stuck", "State: D", "killing QEMU"}, 1},
		{"saving", []time.Duration{time.Hour, 0}, true, true, nil, 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log strings.Builder
				killed := 0
				w := &stuckWatch{
					query: func(ctx context.Context, name string, _ any) (json.RawMessage, error) {
						if name != "query-status" {
							t.Errorf("asked %s", name)
						}
						if len(tt.delays) == 0 {
							return nil, closed
						}
						d := tt.delays[0]
						tt.delays = tt.delays[1:]
						select {
						case <-time.After(d):
							return nil, nil
						case <-ctx.Done():
							return nil, ctx.Err()
						}
					},
					after:  30 * time.Second,
					saving: func() bool { return tt.saving },
					report: func() []string { return []string{"State: D"} },
					log:    slog.New(slog.NewTextHandler(&log, nil)),
				}
				if tt.kill {
					w.kill = func() error { killed++; return nil }
				}
				if err := w.run(t.Context()); !errors.Is(err, closed) {
					t.Errorf("ended with %v", err)
				}
				rest := log.String()
				for _, want := range tt.want {
					i := strings.Index(strings.ReplaceAll(rest, `"`, ""), want)
					if i < 0 {
						t.Fatalf("no %q in the rest of the log:\n%s", want, log.String())
					}
					rest = strings.ReplaceAll(rest, `"`, "")[i:]
				}
				if len(tt.want) == 0 && log.Len() > 0 {
					t.Errorf("log: %s", log.String())
				}
				if killed != tt.killed {
					t.Errorf("killed %d times, want %d", killed, tt.killed)
				}
			})
		})
	}
}
