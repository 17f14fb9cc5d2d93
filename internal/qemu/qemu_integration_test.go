//go:build integration

package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/qmp"
)

// vm is a QEMU started as the agent does it, under TCG and without a machine.
type vm struct {
	*Process
	bridge, agent *qmp.Monitor
	tail          *Tail
	output        chan struct{} // closed at the end of QEMU's output
}

func listen(t *testing.T, name string) (*os.File, net.Conn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
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
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return file, conn
}

func start(t *testing.T, r *Reaper, change func(*Spec)) *vm {
	t.Helper()
	binary, err := Find()
	if err != nil {
		t.Fatal(err)
	}
	spec := Spec{Binary: binary, Args: []string{"-M", "none", "-accel", "tcg", "-accel", "qtest", "-nodefaults", "-display", "none", "-S"}}
	var toBridge, toAgent net.Conn
	spec.Bridge, toBridge = listen(t, "bridge")
	spec.Agent, toAgent = listen(t, "agent")
	change(&spec)
	c, err := NewCommand(spec)
	if err != nil {
		t.Fatal(err)
	}
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.Start(c, Stdio{Out: out, Err: out})
	for _, f := range append(c.Files, out) {
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	v := &vm{Process: p, bridge: qmp.New(toBridge), agent: qmp.New(toAgent), tail: new(Tail), output: make(chan struct{})}
	go func() {
		defer close(v.output)
		defer in.Close()
		io.Copy(v.tail, in)
	}()
	t.Cleanup(func() {
		v.bridge.Disconnect()
		v.agent.Disconnect()
		if err := p.Kill(syscall.SIGKILL); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Error(err)
		}
		wait(t, p)
		<-v.output
		if t.Failed() {
			t.Logf("QEMU's last lines: %q", v.tail.Lines())
		}
	})
	return v
}

func execute[T any](t *testing.T, m *qmp.Monitor, command string, args any) T {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
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

func TestQEMUStarts(t *testing.T) {
	set, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	const name = `a guest's "name"; $(x) \ end`
	const opaque = `stub-devid:5632,a=b "c"`
	v := start(t, reaper(t), func(s *Spec) {
		s.Args = append(s.Args, "-name", name)
		s.FDSets = []FDSet{{Set: 7, Opaque: opaque, File: set}}
	})
	for _, m := range []*qmp.Monitor{v.bridge, v.agent} {
		if err := m.Connect(); err != nil {
			t.Fatal(err)
		}
	}
	if got := execute[struct{ Name string }](t, v.bridge, "query-name", nil); got.Name != name {
		t.Errorf("name is %q, want %q", got.Name, name)
	}
	type set7 struct {
		ID  int `json:"fdset-id"`
		FDs []struct{ Opaque string }
	}
	want := []set7{{7, []struct{ Opaque string }{{opaque}}}}
	if diff := cmp.Diff(want, execute[[]set7](t, v.agent, "query-fdsets", nil)); diff != "" {
		t.Error(diff)
	}
	execute[struct{}](t, v.bridge, "quit", nil)
	if exit := wait(t, v.Process); !exit.Success() || exit.MaxRSS < 1000 {
		t.Errorf("%v, %+v", exit, exit)
	}
	<-v.agent.Done()
}

func TestQEMUIsKilled(t *testing.T) {
	v := start(t, reaper(t), func(*Spec) {})
	if err := v.agent.Connect(); err != nil {
		t.Fatal(err)
	}
	if report := StuckReport(os.DirFS("/proc"), v.PID()); !strings.Contains(strings.Join(report, "\n"), "qemu-system") {
		t.Errorf("report is %q", report)
	}
	killed := time.Now()
	if err := v.Kill(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, v.Process); exit.String() != "killed by SIGKILL" {
		t.Error(exit)
	}
	<-v.agent.Done() // nobody else holds the socket
	if d := time.Since(killed); d > time.Second {
		t.Errorf("known %v after the kill", d)
	}
}

func TestQEMURefuses(t *testing.T) {
	state, err := os.Open(os.DevNull) // no state at all
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(*Spec)
		want   string
	}{
		{"argument", func(s *Spec) { s.Args = append(s.Args, "-no-such-option") }, "-no-such-option: invalid option"},
		{"incoming state", func(s *Spec) { s.Args = append(s.Args, "-incoming", RestoreArg); s.Incoming = state }, "migration"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v := start(t, reaper(t), tt.change)
			if exit := wait(t, v.Process); exit.String() != "exit status 1" {
				t.Error(exit)
			}
			<-v.output
			if lines := strings.Join(v.tail.Lines(), "\n"); !strings.Contains(lines, tt.want) {
				t.Errorf("QEMU said %q, want %q", lines, tt.want)
			}
			if err := v.agent.Connect(); !errors.Is(err, qmp.ErrClosed) {
				t.Errorf("Connect to a dead QEMU: %v", err)
			}
		})
	}
}

// TestQEMURestores saves one QEMU's state into a pipe from which another one starts.
func TestQEMURestores(t *testing.T) {
	r := reaper(t)
	in, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	restored := start(t, r, func(s *Spec) { s.Args = append(s.Args, "-incoming", RestoreArg); s.Incoming = in })
	if err := restored.agent.Connect(); err != nil {
		t.Fatal(err)
	}
	type status struct{ Status string }
	if got := execute[status](t, restored.agent, "query-status", nil); got.Status != "inmigrate" {
		t.Errorf("before the state: %q", got.Status)
	}
	events, err := restored.agent.Events(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	execute[struct{}](t, restored.agent, "migrate-set-capabilities", map[string]any{"capabilities": []map[string]any{{"capability": "events", "state": true}}})

	saved := start(t, r, func(*Spec) {})
	if err := saved.agent.Connect(); err != nil {
		t.Fatal(err)
	}
	execute[struct{}](t, saved.agent, "migrate-set-capabilities", map[string]any{"capabilities": []map[string]any{{"capability": "events", "state": true}}})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := saved.agent.ExecuteWithFile(ctx, "getfd", map[string]string{"fdname": "state"}, out); err != nil {
		t.Fatal(err)
	}
	out.Close()
	execute[struct{}](t, saved.agent, "migrate", map[string]string{"uri": "fd:state"})
	for {
		select {
		case e := <-events:
			if e.Event == "MIGRATION" && e.Data["status"] == "completed" {
				if got := execute[status](t, restored.agent, "query-status", nil); got.Status != "paused" && got.Status != "prelaunch" {
					t.Errorf("after the state: %q", got.Status)
				}
				return
			}
		case <-ctx.Done():
			t.Fatalf("state not restored: %v", ctx.Err())
		}
	}
}

// TestProbeRealBinary compares what is probed with what QEMU then does.
func TestProbeRealBinary(t *testing.T) {
	binary, err := Find()
	if err != nil {
		t.Fatal(err)
	}
	run := func(ctx context.Context, args ...string) ([]byte, error) {
		return exec.CommandContext(ctx, binary, args...).CombinedOutput()
	}
	f, err := ProbeBinary(t.Context(), run)
	if err != nil {
		t.Fatal(err)
	}
	out, err := run(t.Context(), "-trace", "help")
	if err != nil || bytes.Contains(out, []byte("xen_platform_log")) != f.TracePlatformLog {
		t.Errorf("%v, probed %+v", err, f)
	}
	v := start(t, reaper(t), func(s *Spec) {
		s.Extra = f.Args()
		if f.Sandbox {
			s.Extra = append(s.Extra, "-sandbox", "on")
		}
	})
	if err := v.agent.Connect(); err != nil {
		t.Fatal(err)
	}
	if got := v.agent.Version(); got.String() != f.Version {
		t.Errorf("QEMU is %v, probed %q", got, f.Version)
	}
}
