package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/stubinit/stubinit/internal/qmp"
)

// What libxl sends after a save whose QEMU died gets an answer, and cont is noticed when it has its answer.
func TestLastMonitor(t *testing.T) {
	var version qmp.Version
	version.QEMU.Major = 10
	last := newLastMonitor(version)
	a := newAgent()
	a.last.Store(last)
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	for _, command := range []string{"xen-set-global-dirty-log", "cont", "cont"} { // each in a session of its own
		conn, err := a.dialMonitor(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m := qmp.New(conn)
		if err := m.ConnectContext(ctx); err != nil {
			t.Fatal(err)
		}
		if got := m.Version().QEMU.Major; got != 10 {
			t.Errorf("version %d", got)
		}
		select {
		case <-last.cont:
			if command != "cont" {
				t.Error("cont before its time")
			}
		default:
		}
		if _, err := m.Execute(ctx, command, nil); err != nil {
			t.Errorf("%s: %v", command, err)
		}
		var refused *qmp.Error
		if _, err := m.Execute(ctx, "xen-save-devices-state", nil); !errors.As(err, &refused) || !strings.Contains(err.Error(), "QEMU has ended") {
			t.Errorf("a save: %v", err)
		}
		m.Disconnect()
	}
	select {
	case <-last.cont:
	case <-ctx.Done():
		t.Error("cont was not noticed")
	}
}
