package main

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/fdio/fdiotest"
	"github.com/stubinit/stubinit/internal/qmp"
)

// waiting is a Conn whose calls wait.
type waiting struct {
	*fdio.Conn
	ready chan struct{}
}

func newWaiting(t *testing.T, c *fdio.Conn) *waiting {
	w := &waiting{c, make(chan struct{}, 1)}
	if err := c.Notify(w.notify); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *waiting) notify() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}

func (w *waiting) Read(b []byte) (int, error) {
	for {
		if n, err := w.TryRead(b); n > 0 || err != nil {
			return n, err
		}
		<-w.ready
	}
}

func (w *waiting) Write(b []byte) (int, error) { return w.TryWrite(b) } // short commands

func (w *waiting) Close() error {
	defer w.notify()
	return w.Conn.Close()
}

// What libxl sends after a save whose QEMU died gets an answer, and cont is noticed when it has its answer.
func TestLastMonitor(t *testing.T) {
	var version qmp.Version
	version.QEMU.Major = 10
	last := newLastMonitor(version)
	a := newAgent()
	a.poller = fdiotest.NewPoller(t)
	a.last.Store(last)
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	for _, command := range []string{"xen-set-global-dirty-log", "cont", "cont"} { // each in a session of its own
		conn, err := a.dialMonitor("/nonexistent")
		if err != nil {
			t.Fatal(err)
		}
		c := newWaiting(t, conn)
		in, out := json.NewDecoder(c), json.NewEncoder(c)
		// ask sends a command, if any, and gives what comes.
		ask := func(command string) (answer struct {
			QMP    struct{ Version qmp.Version }
			Return *struct{}
			Error  *qmp.Error
			ID     int
		}) {
			t.Helper()
			if command != "" {
				if err := out.Encode(map[string]any{"execute": command, "id": 7}); err != nil {
					t.Fatal(err)
				}
			}
			if err := in.Decode(&answer); err != nil || answer.ID != 7 && command != "" {
				t.Fatalf("%s: %+v, %v", command, answer, err)
			}
			return answer
		}
		if got := ask("").QMP.Version.QEMU.Major; got != 10 {
			t.Errorf("version %d", got)
		}
		select {
		case <-last.cont:
			if command != "cont" {
				t.Error("cont before its time")
			}
		default:
		}
		for _, command := range []string{"qmp_capabilities", command} {
			if got := ask(command); got.Return == nil {
				t.Errorf("%s: %+v", command, got)
			}
		}
		if got := ask("xen-save-devices-state"); got.Error == nil || !strings.Contains(got.Error.Desc, "QEMU has ended") {
			t.Errorf("a save: %+v", got)
		}
		c.Close()
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
	a.poller = fdiotest.NewPoller(t)
	a.monitor = qmp.New(nil)
	a.stopped.Store(true)
	conn, err := a.dialMonitor(path)
	if err != nil || a.last.Load() != nil {
		t.Fatalf("QEMU lives: %v, answered for it: %v", err, a.last.Load() != nil)
	}
	conn.Close()
	f.Close() // QEMU's copy
	a.stopped.Store(false)
	if conn, err := a.dialMonitor(path); conn != nil || !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("the guest runs: %v, %v", conn, err)
	}
	a.stopped.Store(true)
	conn, err = a.dialMonitor(path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if last := a.last.Load(); last == nil || a.answerForQEMU() != last {
		t.Error("the agent would wait for another")
	}
	if conn, err := a.dialMonitor(path + "-other"); err != nil {
		t.Errorf("the next session: %v", err)
	} else {
		conn.Close()
	}
}
