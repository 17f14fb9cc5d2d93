package main

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// A hinted error says what to do.
type hinted struct {
	err  error
	hint string
}

// hint adds to err what its reader can do. The outermost hint is the one shown.
func hint(err error, text string) error { return &hinted{err, text} }

func (h *hinted) Error() string { return h.err.Error() }
func (h *hinted) Unwrap() error { return h.err }

// A stepError is the failure of one step of the boot.
type stepError struct {
	step string
	err  error
}

func (e *stepError) Error() string {
	s := fmt.Sprintf("FATAL %s: %v", e.step, e.err)
	var h *hinted
	if errors.As(e.err, &h) {
		s += ": " + h.hint
	}
	return s
}

func (e *stepError) Unwrap() error { return e.err }

// withoutPanic is run with a panic made into an error.
func withoutPanic(run func() error) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = hint(fmt.Errorf("panic: %v\n%s", r, debug.Stack()), "this is a defect of stubinit: please report it with this log")
		}
	}()
	return run()
}
