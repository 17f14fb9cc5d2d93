package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/initramfs"
	"github.com/stubinit/stubinit/internal/console"
	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
)

// waitLimit is how long a test waits for what should come at once.
const waitLimit = 10 * time.Second

// A logBuffer takes an agent's log.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// newTestAgent is an agent whose console goes nowhere yet.
func newTestAgent(t *testing.T) *agent {
	a := newAgent()
	t.Cleanup(func() { a.console.Close() })
	return a
}

// await waits until the log has a text, and fails if it does not come.
func (l *logBuffer) await(t *testing.T, text string) {
	t.Helper()
	for end := time.Now().Add(waitLimit); !strings.Contains(l.String(), text); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("log lacks %s:\n%s", text, l)
		}
	}
}

// logTo makes the agent log into a buffer, at debug level.
func (a *agent) logTo(t *testing.T) *logBuffer {
	l := new(logBuffer)
	a.log = slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
	return l
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
		t.Fatal(err)
	}
}

func TestCheckUnpacked(t *testing.T) {
	if unpackedMark != initramfs.Unpacked {
		t.Errorf("the agent looks for %s, the image has %s", unpackedMark, initramfs.Unpacked)
	}
	root := t.TempDir()
	err := checkUnpacked(root)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("cut-off archive: %v", err)
	} else if line := (&stepError{"modules", err}).Error(); !strings.Contains(line, "stubdomain_memory") {
		t.Errorf("%q does not say what to raise", line)
	}
	write(t, root+initramfs.Unpacked, "")
	if err := checkUnpacked(root); err != nil {
		t.Errorf("whole archive: %v", err)
	}
}

func TestFindQEMU(t *testing.T) {
	root := t.TempDir()
	_, err := findQEMU(root)
	if err == nil {
		t.Fatal("found QEMU in an empty folder")
	}
	// The last one first, so that each one more hides those before.
	for _, path := range []string{"/usr/lib/xen/bin/qemu-system-i386", "/usr/libexec/xen-qemu-system-i386", "/usr/bin/qemu-system-i386"} {
		if !strings.Contains(err.Error(), path) {
			t.Errorf("error %q lacks %s", err, path)
		}
		write(t, root+path, "")
		if got, err := findQEMU(root); got != path || err != nil {
			t.Errorf("findQEMU = %q, %v, want %s", got, err, path)
		}
	}
}

// A client of a listening socket whose one copy has been handed on is connected at once; without that copy it is refused.
func TestListenUnix(t *testing.T) {
	path := t.TempDir() + "/qmp"
	f, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dial(t.Context(), path)
	if err != nil {
		t.Fatalf("the socket went with the listener: %v", err)
	}
	defer conn.Close()
	f.Close()
	conn.SetReadDeadline(time.Now().Add(waitLimit))
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("QEMU's end does not end the connection: %v", err)
	}
	var op *net.OpError
	if _, err := dial(t.Context(), path); !errors.As(err, &op) {
		t.Errorf("dial without a listener: %v", err)
	}
}

// pty gives a terminal's two ends: what the log writes to path, dom0 reads from master.
func pty(t *testing.T) (master *os.File, path string) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	master = os.NewFile(uintptr(fd), "/dev/ptmx")
	t.Cleanup(func() { master.Close() })
	return master, "/dev/pts/" + strconv.Itoa(n)
}

// consoleAgent has console 0 on a pty and the nodes given.
func consoleAgent(t *testing.T, nodes map[string]string) (*agent, *xenstoretest.Server, *os.File) {
	a := newTestAgent(t)
	master, path := pty(t)
	hvc, err := console.OpenHVC(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { hvc.Close() })
	s := storeOf(t, nodes)
	a.hvc, a.xs = hvc, s.Dial(testSelf)
	a.terminal.hvc.Store(hvc)
	return a, s, master
}

// follow runs followConsole until the test's end.
func follow(t *testing.T, a *agent) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- a.followConsole(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("followConsole: %v", err)
		}
	})
}

// wantOnConsole reads console 0 until a line holds want.
func wantOnConsole(t *testing.T, master *os.File, want string) {
	t.Helper()
	master.SetReadDeadline(time.Now().Add(waitLimit))
	var got []byte
	buf := make([]byte, 4096)
	for !strings.Contains(string(got), want) {
		n, err := master.Read(buf)
		if err != nil {
			t.Fatalf("console 0 shows %q, want %q: %v", got, want, err)
		}
		got = append(got, buf[:n]...)
	}
}

// With QEMU in dom0 nothing is written before its backend reads, and what was logged until then comes at once.
func TestFollowConsoleQEMU(t *testing.T) {
	const state = "/local/domain/0/backend/console/6/0/state"
	a, s, master := consoleAgent(t, map[string]string{
		"/local/domain/6/console/type": "ioemu", "/local/domain/6/console/backend": "/local/domain/0/backend/console/6/0", state: "2",
	})
	a.hvc.SetFree(func() int { return 2048 })
	follow(t, a)
	a.log.Info("first")
	if a.terminal.Room() > 0 {
		t.Error("there is room although the backend is in state 2")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := a.console.Flush(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Flush with nobody reading: %v", err)
	}
	s.Set(state, "4")
	wantOnConsole(t, master, "info first")
	a.log.Info("second")
	wantOnConsole(t, master, "info second")
	// The backend goes: the log waits again.
	s.Remove(state)
	for end := time.Now().Add(waitLimit); a.terminal.Room() > 0 && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	if n := a.terminal.Room(); n > 0 {
		t.Errorf("room for %d bytes without a backend", n)
	}
}

// xenconsoled reads at all times; so does whoever leaves no type.
func TestFollowConsoleXenconsoled(t *testing.T) {
	for _, nodes := range []map[string]string{{"/local/domain/6/console/type": "xenconsoled"}, {}} {
		a, _, master := consoleAgent(t, nodes)
		follow(t, a)
		a.log.Info("at once")
		wantOnConsole(t, master, "info at once")
	}
}

func TestFollowConsoleNoBackend(t *testing.T) {
	a, _, _ := consoleAgent(t, map[string]string{"/local/domain/6/console/type": "ioemu"})
	if err := a.followConsole(t.Context()); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "console/backend") {
		t.Errorf("%v, want an error that names console/backend", err)
	}
}

// Before there is a console the log keeps its lines.
func TestLogBeforeConsole(t *testing.T) {
	a := newTestAgent(t)
	a.log.Info("early")
	master, path := pty(t)
	hvc, err := console.OpenHVC(path)
	if err != nil {
		t.Fatal(err)
	}
	defer hvc.Close()
	hvc.SetConnected(true)
	a.terminal.hvc.Store(hvc)
	a.console.Kick()
	wantOnConsole(t, master, "info early")
}

// What QEMU prints goes to the log, cleaned, and its last lines are kept.
func TestOutput(t *testing.T) {
	a := newTestAgent(t)
	master, path := pty(t)
	hvc, err := console.OpenHVC(path)
	if err != nil {
		t.Fatal(err)
	}
	defer hvc.Close()
	hvc.SetConnected(true)
	a.hvc = hvc
	a.terminal.hvc.Store(hvc)
	w, err := a.openOutput()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, "xen be core: \x1b[2Jerror\nlast words"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	<-a.output
	wantOnConsole(t, master, `xen be core: \x1b[2Jerror`)
	if lines := a.tail.Lines(); len(lines) != 2 || lines[1] != "last words" {
		t.Errorf("tail %q", lines)
	}
}

// README.md explains each phase, in the boot's order.
func TestPhasesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(text), "\n### Steps\n")
	table, _, _ = strings.Cut(table, "\n### ")
	var got, want []string
	for _, row := range regexp.MustCompile(`(?m)^\| ([a-z]+) \| [^|]{20,} \|$`).FindAllStringSubmatch(table, -1) {
		got = append(got, row[1])
	}
	for _, s := range sequence {
		want = append(want, s.name)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("the sequence (-) and README.md's table (+) differ:\n%s", d)
	}
}

// A service that ends by itself is reported; one that its context has ended is not.
func TestService(t *testing.T) {
	a := newTestAgent(t)
	ctx, cancel := context.WithCancel(t.Context())
	broken := errors.New("broken")
	a.service(ctx, "network", func(context.Context) error { return broken })
	if err := <-a.failed; !errors.Is(err, broken) || err.Error() != "network: broken" {
		t.Errorf("service: %v", err)
	}
	a.service(ctx, "removable disks", func(context.Context) error { panic("a defect") })
	if err := <-a.failed; !strings.HasPrefix(err.Error(), "removable disks: panic: a defect\n") || !strings.Contains(err.Error(), "boot_test.go:") {
		t.Errorf("service that panics: %v", err)
	}
	over := make(chan struct{})
	a.service(ctx, "bridge", func(ctx context.Context) error {
		defer close(over)
		<-ctx.Done()
		return ctx.Err()
	})
	cancel()
	<-over
	select {
	case err := <-a.failed:
		t.Errorf("a service that was ended: %v", err)
	default:
	}
}
