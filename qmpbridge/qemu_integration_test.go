//go:build integration

package qmpbridge

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/fdio/fdiotest"
)

// A realQEMU is a QEMU without a machine, and a bridge to its monitor.
type realQEMU struct {
	*bench
	poller  *fdio.Poller
	cmd     *exec.Cmd
	private *peer    // held for life, or QEMU drops the fdset
	state   *os.File // the memfd that is fdset 1
}

// prepareQEMU makes the sockets and the bridge; start starts QEMU.
func prepareQEMU(t *testing.T, o Options) (q *realQEMU, start func()) {
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Fatalf("install qemu-system-x86: %v", err)
	}
	checkGoroutines(t)
	monitor := func(name string) (addr string, listening *os.File) {
		addr = filepath.Join(t.TempDir(), name)
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: addr})
		if err != nil {
			t.Fatal(err)
		}
		ln.SetUnlinkOnClose(false)
		f, err := ln.File()
		if err != nil {
			t.Fatal(err)
		}
		ln.Close()
		return addr, f
	}
	bridged, bridgedFile := monitor("bridge")
	private, privateFile := monitor("private")
	fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	q = &realQEMU{state: os.NewFile(uintptr(fd), "state")}
	t.Cleanup(func() { q.state.Close() })
	writer, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}

	q.poller = fdiotest.NewPoller(t)
	o.Dial = func(context.Context) (Monitor, error) { return fdio.DialUnix(q.poller, bridged) }
	q.cmd = exec.Command(path, "-M", "none", "-nodefaults", "-display", "none", "-S",
		"-chardev", "socket,id=stubinit-0,fd=3,server=on,wait=off", "-mon", "chardev=stubinit-0,mode=control",
		"-chardev", "socket,id=stubinit-1,fd=4,server=on,wait=off", "-mon", "chardev=stubinit-1,mode=control",
		"-add-fd", "fd=5,set=1")
	q.cmd.ExtraFiles = []*os.File{bridgedFile, privateFile, writer}
	var stderr bytes.Buffer
	q.cmd.Stderr = &stderr
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("QEMU said: %s\nthe bridge: %s", &stderr, q.log)
		}
	})
	start = func() {
		if err := q.cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			q.cmd.Process.Kill()
			q.cmd.Wait()
		})
		for _, f := range q.cmd.ExtraFiles {
			f.Close()
		}
		c, err := net.Dial("unix", private)
		if err != nil {
			t.Fatal(err)
		}
		q.private = newPeer(t, c)
		q.private.ask("", 0)
		q.private.ask("qmp_capabilities", 0)
	}
	q.bench = newBench(t, o)
	return q, start
}

func startQEMU(t *testing.T, o Options) *realQEMU {
	q, start := prepareQEMU(t, o)
	start()
	return q
}

// connect gives a toolstack's session over a socket.
func (q *realQEMU) connect() *peer {
	q.t.Helper()
	ours, theirs := unixPair(q.t, q.poller)
	select {
	case q.ln.conns <- ours:
	case <-time.After(30 * time.Second):
		q.t.Fatal("the bridge takes no session")
	}
	return newPeer(q.t, theirs)
}

// ask sends a command, if one is given, and gives the next message but events.
func (p *peer) ask(command string, id int) map[string]json.RawMessage {
	p.t.Helper()
	if command != "" {
		if !strings.HasPrefix(command, "{") {
			command = fmt.Sprintf(`{"execute":%q,"id":%d}`, command, id)
		}
		p.send(command + "\r\n")
	}
	for {
		text, err := p.r.ReadBytes('\n')
		if err != nil {
			p.t.Fatalf("%s: got %.100q, %v", command, text, err)
		}
		var m map[string]json.RawMessage
		if err := json.Unmarshal(text, &m); err != nil || !bytes.HasSuffix(text, []byte("}\r\n")) {
			p.t.Fatalf("%s: got %.100q, %v", command, text, err)
		}
		if m["event"] == nil {
			if command != "" && (m["return"] == nil || id > 0 && string(m["id"]) != fmt.Sprint(id)) {
				p.t.Fatalf("%s: got %.200q", command, text)
			}
			return m
		}
	}
}

func (p *peer) open() {
	p.t.Helper()
	if m := p.ask("", 0); m["QMP"] == nil {
		p.t.Fatalf("got %v, want the greeting", m)
	}
	p.ask("qmp_capabilities", 1)
}

func TestQEMUSchema(t *testing.T) {
	toolstack := startQEMU(t, Options{}).connect()
	toolstack.open()
	for i := range 3 {
		if m := toolstack.ask("query-qmp-schema", 10+i); len(m["return"]) < 100<<10 {
			t.Errorf("the schema has %d bytes", len(m["return"]))
		}
	}
}

// The toolstack connects first, and waits.
func TestQEMUStartsLater(t *testing.T) {
	q, start := prepareQEMU(t, Options{})
	toolstack := q.connect()
	toolstack.send("{\"execute\":\"qmp_capabilities\",\"id\":1}\r\n{\"execute\":\"query-status\",\"id\":2}\r\n")
	start()
	if m := toolstack.ask("", 0); m["QMP"] == nil {
		t.Fatalf("got %v, want the greeting", m)
	}
	for i, want := range []string{"1", "2"} {
		if m := toolstack.ask("", 0); string(m["id"]) != want {
			t.Errorf("answer %d: %v", i, m)
		}
	}
}

func TestQEMUEventStorm(t *testing.T) {
	q := startQEMU(t, Options{})
	toolstack := q.connect()
	toolstack.open()
	const rounds = 100
	go func() {
		for i := range rounds {
			fmt.Fprintf(toolstack, "{\"execute\":\"cont\",\"id\":%d}\r\n{\"execute\":\"stop\",\"id\":%d}", 2*i, 2*i+1)
		}
	}()
	for i := range 2 * rounds {
		text, err := toolstack.r.ReadString('\n')
		if want := fmt.Sprintf("{\"return\": {}, \"id\": %d}\r\n", i); text != want || err != nil {
			t.Fatalf("got %q, %v; want %q", text, err, want)
		}
	}
	toolstack.Close()
	q.connect().open()
	q.stop()
	if want := fmt.Sprintf(`"events dropped"=%d`, 2*rounds); !strings.Contains(q.log.String(), want) {
		t.Errorf("log has no %q", want)
	}
}

// Sessions end anywhere, with answers and events on the way, while the guest's
// state changes; each new one starts with a greeting and its own answers.
func TestQEMUReconnects(t *testing.T) {
	q := startQEMU(t, Options{})
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() { // events, all the time
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				q.private.ask("cont", 0)
				q.private.ask("stop", 0)
			}
		}
	}()
	rng := rand.New(rand.NewPCG(3, 4))
	for i := range 200 {
		toolstack := q.connect()
		switch rng.IntN(4) {
		case 0: // at once
		case 1:
			toolstack.send("{\"execute\":\"qmp_capabilities\"}\r\n{\"execute\":\"query-qmp-schema\"}\r\n{\"execute\":")
		case 2:
			toolstack.open()
			toolstack.send("{\"execute\":\"query-qmp-schema\",\"id\":2}\r\n")
		case 3:
			toolstack.open()
			toolstack.ask("query-status", 1000+i)
		}
		toolstack.Close()
	}
	toolstack := q.connect()
	toolstack.open()
	toolstack.ask("query-status", 5000)
	close(stop)
	<-stopped
	q.stop()
	if log := q.log.String(); strings.Contains(log, "level=WARN") {
		t.Error("there were warnings")
	}
}

func TestQEMUKilled(t *testing.T) {
	q := startQEMU(t, Options{})
	toolstack := q.connect()
	toolstack.open()
	if err := q.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	toolstack.expectClose()
	q.connect().expectClose() // nobody listens any more
}

func TestQEMUGarbage(t *testing.T) {
	toolstack := startQEMU(t, Options{}).connect()
	toolstack.open()
	toolstack.send(`{"id":"\u0000"}{"execute":"query-status","exec-oob":"x"} 17 {"execute":"query-name","id":3} not JSON`)
	for i, want := range []string{"error", "error", "error", "return", "error"} {
		if m := toolstack.ask("", 0); m[want] == nil {
			t.Errorf("answer %d: %s, want %s", i, m, want)
		}
	}
	toolstack.expectClose()
}

// A copySaver gives what QEMU wrote to the memfd.
type copySaver struct {
	state func() *os.File
	got   chan []byte
}

func (copySaver) Prepare(context.Context) error { return nil }
func (s copySaver) Commit(context.Context) error {
	b, err := io.ReadAll(s.state())
	s.got <- b
	return err
}
func (copySaver) Explain(error) error                        { return nil }
func (copySaver) Abort(_ context.Context, cause error) error { return cause }

func TestQEMUSave(t *testing.T) {
	var q *realQEMU
	s := copySaver{func() *os.File { return q.state }, make(chan []byte, 1)}
	q = startQEMU(t, Options{Save: s})
	toolstack := q.connect()
	toolstack.open()
	toolstack.ask("stop", 2)
	m := toolstack.ask(`{"execute":"xen-save-devices-state","arguments":{"filename":"/dev/fdset/1","live":false},"id":3}`, 3)
	if got := <-s.got; !bytes.HasPrefix(got, []byte("QEVM")) { // QEMU_VM_FILE_MAGIC
		t.Errorf("answer %v, state is %.40q", m, got)
	}
	toolstack.ask("cont", 4)
}
