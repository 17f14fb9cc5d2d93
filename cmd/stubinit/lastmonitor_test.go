package main

import (
	"context"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

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
		conn, err := a.dialMonitor(ctx, "/nonexistent")
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

// A session that comes between QEMU's death and our notice of it is answered for QEMU only while the guest is suspended, and by
// the same lastMonitor that the agent then waits for.
func TestDialDeadQEMU(t *testing.T) {
	path := t.TempDir() + "/qmp"
	f, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	a := newAgent()
	a.monitor = qmp.New(nil)
	a.stopped.Store(true)
	conn, err := a.dialMonitor(t.Context(), path)
	if err != nil || a.last.Load() != nil {
		t.Fatalf("QEMU lives: %v, answered for it: %v", err, a.last.Load() != nil)
	}
	conn.Close()
	f.Close() // QEMU's copy
	a.stopped.Store(false)
	if conn, err := a.dialMonitor(t.Context(), path); conn != nil || !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the guest runs: %v, %v", conn, err)
	}
	a.stopped.Store(true)
	conn, err = a.dialMonitor(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if last := a.last.Load(); last == nil || a.answerForQEMU() != last {
		t.Error("the agent would wait for another")
	}
	if conn, err := a.dialMonitor(t.Context(), path+"-other"); err != nil {
		t.Errorf("the next session: %v", err)
	} else {
		conn.Close()
	}
}
