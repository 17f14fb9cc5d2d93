package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/signal"
	"strings"
	"testing"
)

// The line is what a user finds on console 0 and in xenstore.
func TestStepError(t *testing.T) {
	cause := fmt.Errorf("open /dev/hvc0: %w", fs.ErrNotExist)
	for _, tt := range []struct {
		name string
		err  error
		want string
	}{
		{"plain", cause, "FATAL console: open /dev/hvc0: file does not exist"},
		{"hint", hint(cause, "the kernel needs CONFIG_HVC_XEN"), "FATAL console: open /dev/hvc0: file does not exist: the kernel needs CONFIG_HVC_XEN"},
		{"hint inside", fmt.Errorf("twice: %w", hint(cause, "look")), "FATAL console: twice: open /dev/hvc0: file does not exist: look"},
		{"the outermost hint", hint(hint(cause, "inner"), "outer"), "FATAL console: open /dev/hvc0: file does not exist: outer"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var err error = &stepError{"console", tt.err}
			if got := err.Error(); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
			if !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%q has lost its cause", err)
			}
		})
	}
}

// keepSequence undoes at the test's end what run and the test change in the process.
func keepSequence(t *testing.T) {
	saved := sequence
	t.Cleanup(func() {
		sequence = saved
		signal.Reset()
	})
}

// A panic in a step is reported like an error, with where it came from; the agent lives on to say so.
func TestPanicIsFatal(t *testing.T) {
	keepSequence(t)
	ran := []string{}
	sequence = []step{
		{"first", func(*agent, context.Context) error { ran = append(ran, "first"); return nil }},
		{"broken", func(a *agent, _ context.Context) error { a.cfg.vbds[0]++; return nil }},
		{"never", func(*agent, context.Context) error { ran = append(ran, "never"); return nil }},
	}
	a := newTestAgent(t)
	err := guarded(a)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{"FATAL broken: panic: ", "nil pointer", "failure_test.go:", "please report it"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("error lacks %q:\n%v", want, err)
		}
	}
	if len(ran) != 1 || ran[0] != "first" {
		t.Errorf("steps that ran: %v", ran)
	}
}

func TestStepFails(t *testing.T) {
	keepSequence(t)
	sequence = []step{
		{"mounts", func(*agent, context.Context) error { return hint(fs.ErrPermission, "be root") }},
		{"never", func(*agent, context.Context) error { t.Error("a step after the failed one ran"); return nil }},
	}
	err := guarded(newTestAgent(t))
	if want := "FATAL mounts: permission denied: be root"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
