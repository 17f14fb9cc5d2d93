//go:build integration

package qmp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/qemu"
	"github.com/stubinit/stubinit/internal/qmp"
)

// start runs a QEMU without a machine and connects to it as the agent does: through a listening socket that QEMU inherits.
func start(t *testing.T) (context.Context, *qmp.Monitor) {
	t.Helper()
	binary, err := qemu.Find()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "qmp")
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	listener.SetUnlinkOnClose(false)
	file, err := listener.File()
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	// Before QEMU is there: the greeting comes when it is.
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, binary, "-M", "none", "-accel", "tcg", "-accel", "qtest", "-nodefaults", "-display", "none", "-S",
		"-chardev", "socket,id=m,fd=3,server=on,wait=off", "-mon", "chardev=m,mode=control")
	cmd.ExtraFiles = []*os.File{file}
	cmd.Stderr = t.Output()
	err = cmd.Start()
	file.Close() // so that QEMU's death ends the connection
	if err != nil {
		t.Fatal(err)
	}
	m := qmp.New(conn)
	t.Cleanup(func() {
		if err := m.Disconnect(); err != nil {
			t.Error(err)
		}
		cmd.Process.Kill()
		cmd.Wait()
	})
	if err := m.ConnectContext(ctx); err != nil {
		t.Fatal(err)
	}
	return ctx, m
}

func execute[T any](t *testing.T, ctx context.Context, m *qmp.Monitor, command string, args any) T {
	t.Helper()
	raw, err := m.Execute(ctx, command, args)
	if err != nil {
		t.Fatal(err)
	}
	var v T
	if err := json.Unmarshal(raw, &v); err != nil {
		t.Fatalf("%s: %v in %s", command, err, raw)
	}
	return v
}

// toggle is the command that answers an event with the other one.
var toggle = map[string]string{"STOP": "cont", "RESUME": "stop"}

func TestStopContBursts(t *testing.T) {
	ctx, m := start(t)
	events, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const rounds, burst = 20, 50
	for range rounds {
		for i := range burst / 2 {
			for _, command := range []string{"cont", "stop"} {
				if _, err := m.Execute(ctx, command, nil); err != nil {
					t.Fatalf("%s %d: %v", command, i, err)
				}
			}
		}
		want := "RESUME"
		for i := range burst {
			e := <-events
			if e.Event != want {
				t.Fatalf("event %d of a burst is %+v, want %s", i, e, want)
			}
			want = map[string]string{"STOP": "RESUME", "RESUME": "STOP"}[want]
		}
	}
	if got := m.Stats(); got != (qmp.Stats{}) {
		t.Errorf("stats are %+v", got)
	}
}

// TestStopContInEventLoop runs commands from the event loop while others ask at the same time.
func TestStopContInEventLoop(t *testing.T) {
	ctx, m := start(t)
	events, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Execute(ctx, "cont", nil); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var askers sync.WaitGroup
	for range 4 {
		askers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := m.Execute(ctx, "query-status", nil); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	const n = 400
	for i := range n {
		e := <-events
		command, ok := toggle[e.Event]
		if !ok {
			t.Fatalf("event %d is %+v", i, e)
		}
		if _, err := m.Run(fmt.Appendf(nil, `{"execute": %q}`, command)); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	askers.Wait()
}

// TestSchema needs an answer of far more than 64 KiB, where go-qemu's monitor ends.
func TestSchema(t *testing.T) {
	ctx, m := start(t)
	raw, err := m.Execute(ctx, "query-qmp-schema", nil)
	if err != nil {
		t.Fatal(err)
	}
	var schema []struct {
		Name     string `json:"name"`
		MetaType string `json:"meta-type"`
	}
	if err := json.Unmarshal(raw, &schema); err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, s := range schema {
		if s.MetaType == "command" && (s.Name == "add-fd" || s.Name == "query-qmp-schema") {
			found = append(found, s.Name)
		}
	}
	if len(raw) < 100<<10 || len(found) != 2 {
		t.Errorf("schema of %d bytes, %d entries, has commands %q", len(raw), len(schema), found)
	}
	if v := m.Version(); v.QEMU.Major < 5 {
		t.Errorf("version is %+v", v)
	}
}

func TestFDSets(t *testing.T) {
	ctx, m := start(t)
	type member struct {
		FD     int    `json:"fd"`
		Opaque string `json:"opaque"`
	}
	type set struct {
		ID  int      `json:"fdset-id"`
		FDs []member `json:"fds"`
	}
	type added struct {
		Set int `json:"fdset-id"`
		FD  int `json:"fd"`
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()

	// All at once: each must get its own descriptor.
	const n = 8
	var mu sync.Mutex
	want := make(map[int]string)
	var adding sync.WaitGroup
	for i := range n {
		adding.Go(func() {
			opaque := fmt.Sprintf("stub-devid:%d, a", i)
			raw, err := m.ExecuteWithFile(ctx, "add-fd", map[string]any{"fdset-id": 5, "opaque": opaque}, file)
			var a added
			if err == nil {
				err = json.Unmarshal(raw, &a)
			}
			if err != nil || a.Set != 5 {
				t.Errorf("add-fd gave %s, %v", raw, err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			want[a.FD] = opaque
		})
	}
	adding.Wait()
	got := make(map[int]string)
	for _, s := range execute[[]set](t, ctx, m, "query-fdsets", nil) {
		for _, f := range s.FDs {
			got[f.FD] = f.Opaque
		}
	}
	if diff := cmp.Diff(want, got); diff != "" || len(want) != n {
		t.Errorf("%d members: %s", len(want), diff)
	}

	// While the machine is stopped QEMU only marks the members as removed.
	execute[struct{}](t, ctx, m, "cont", nil)
	execute[struct{}](t, ctx, m, "remove-fd", map[string]int{"fdset-id": 5})
	if sets := execute[[]set](t, ctx, m, "query-fdsets", nil); len(sets) != 0 {
		t.Errorf("after remove-fd: %+v", sets)
	}

	// QEMU's own words for a set that is not there and for a command without its descriptor.
	for command, args := range map[string]any{"remove-fd": map[string]int{"fdset-id": 5}, "add-fd": nil} {
		_, err := m.Execute(ctx, command, args)
		var qerr *qmp.Error
		if !errors.As(err, &qerr) || qerr.Class != "GenericError" || qerr.Desc == "" {
			t.Errorf("%s: %v", command, err)
		}
	}
	_, err = m.Execute(ctx, "no-such-command", nil)
	var qerr *qmp.Error
	if !errors.As(err, &qerr) || qerr.Class != "CommandNotFound" {
		t.Errorf("no-such-command: %v", err)
	}
}

func TestQuit(t *testing.T) {
	ctx, m := start(t)
	events, err := m.Events(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Execute(ctx, "quit", nil); err != nil {
		t.Fatal(err)
	}
	var names []string
	for e := range events {
		names = append(names, e.Event)
	}
	if diff := cmp.Diff([]string{"SHUTDOWN"}, names); diff != "" {
		t.Error(diff)
	}
	if _, err := m.Execute(ctx, "query-status", nil); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("after quit: %v", err)
	}
}
