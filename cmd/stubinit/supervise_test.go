package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/qemu"
)

// startScript starts a shell script in QEMU's place. It waits for a byte on descriptor 3 first: begin gives it.
func startScript(t *testing.T, a *agent, script string) (begin func()) {
	t.Helper()
	out, err := a.openOutput()
	if err != nil {
		t.Fatal(err)
	}
	var fds [2]int // not os.Pipe's, which do not block
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	r, w := os.NewFile(uintptr(fds[0]), "begin"), os.NewFile(uintptr(fds[1]), "begin")
	reaper := qemu.NewReaper(nil)
	a.qemu, err = reaper.Start(&qemu.Command{Path: "/bin/sh", Argv: []string{"sh", "-c", "read x <&3; " + script}, Files: []*os.File{r}}, qemu.Stdio{Out: out, Err: out})
	out.Close()
	r.Close()
	if err != nil {
		t.Fatal(err)
	}
	begun := false
	begin = func() {
		if !begun {
			begun = true
			w.WriteString("\n")
			w.Close()
		}
	}
	t.Cleanup(func() {
		begin()
		select {
		case <-a.qemu.Done():
		case <-time.After(waitLimit):
			t.Errorf("%q does not end", script)
		}
		<-a.output
		reaper.Close()
	})
	return begin
}

func TestQEMUEnd(t *testing.T) {
	for _, tt := range []struct {
		name, step, script string
		want               string // "" is an ordinary end
	}{
		{"the guest has shut down", "supervise", "exit 0", ""},
		{"during the boot", "running", "exit 0", "QEMU ended: exit status 0"},
		{"says why", "monitor", "echo first; echo qemu: no such device >&2; exit 1", "QEMU ended: exit status 1: its last line: qemu: no such device"},
		{"without a line end", "supervise", "printf 'cut o'; exit 3", "QEMU ended: exit status 3: its last line: cut o"},
		{"killed", "supervise", "kill -9 $$", "QEMU ended: killed by SIGKILL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newTestAgent(t)
			log := a.logTo(t)
			a.step.Store(tt.step)
			startScript(t, a, tt.script)()
			<-a.qemu.Done()
			err := a.qemuEnd()
			switch {
			case tt.want == "" && err != nil:
				t.Errorf("an ordinary end is %v", err)
			case tt.want == "" && !strings.Contains(log.String(), `msg="QEMU ended" how="exit status 0" max_rss_kib=`):
				t.Errorf("log:\n%s", log)
			case tt.want != "" && (err == nil || !strings.HasPrefix(err.Error(), tt.want)): // after SIGKILL the memory of this machine may be blamed
				t.Errorf("%v, want %s", err, tt.want)
			}
		})
	}
}

// A process that QEMU has left behind, and that holds its output open, keeps nobody from noticing QEMU's end.
func TestQEMUEndWithOrphan(t *testing.T) {
	a := newTestAgent(t)
	a.logTo(t)
	a.step.Store("supervise")
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	hold, release := os.NewFile(uintptr(fds[0]), "hold"), os.NewFile(uintptr(fds[1]), "release")
	defer hold.Close()
	defer release.Close() // the orphan's end
	startScript(t, a, fmt.Sprintf("read x </proc/%d/fd/%d & kill -9 $$", os.Getpid(), hold.Fd()))()
	<-a.qemu.Done()
	ended := make(chan error, 1)
	go func() { ended <- a.qemuEnd() }()
	select {
	case err := <-ended:
		if err == nil || !strings.HasPrefix(err.Error(), "QEMU ended: killed by SIGKILL") {
			t.Errorf("%v", err)
		}
	case <-time.After(waitLimit):
		t.Error("QEMU's end is not reported as long as another process has its output")
	}
	select {
	case <-a.output:
		t.Error("the test's orphan does not hold the output")
	default:
	}
}

// What the limit on QEMU's output holds back is not lost when QEMU ends: its last lines are logged all the same.
func TestQEMUEndAfterFlood(t *testing.T) {
	a := newTestAgent(t)
	log := a.logTo(t)
	a.params.qemuLimit.Burst, a.params.qemuLimit.Rate = 1024, 1
	a.step.Store("supervise")
	startScript(t, a, `i=0; while [ $i -lt 100 ]; do echo "line $i of a flood"; i=$((i+1)); done; echo why; exit 1`)()
	<-a.qemu.Done()
	if err := a.qemuEnd(); err == nil || err.Error() != "QEMU ended: exit status 1: its last line: why" {
		t.Errorf("%v", err)
	}
	for _, want := range []string{"line 81 of a flood", "line 99 of a flood", "why"} {
		if !strings.Contains(log.String(), `msg="QEMU's last lines" line=`) || !strings.Contains(log.String(), want) {
			t.Errorf("log lacks %q:\n%s", want, log)
		}
	}
	if strings.Contains(log.String(), "line 80 of") {
		t.Errorf("more than the last lines:\n%s", log)
	}
}

// A QEMU that is not ready in time is looked at while libxl still lets the stubdomain live; one that is, is not.
func TestReportOverdue(t *testing.T) {
	a := newTestAgent(t)
	log := a.logTo(t)
	begin := startScript(t, a, "exit 0")
	a.reportAfter(time.Hour, "never")()
	stop := a.reportAfter(time.Millisecond, "QEMU does not answer")
	defer stop()
	wants := []string{`QEMU does not answer yet; libxl gives up`, `late QEMU" proc="process ` + strconv.Itoa(a.qemu.PID()) + ": State=", `\"sh\": state `}
	log.await(t, wants[2])
	for _, want := range wants {
		if !strings.Contains(log.String(), want) {
			t.Errorf("log lacks %s:\n%s", want, log)
		}
	}
	if strings.Contains(log.String(), "never") {
		t.Errorf("a wait that is over is reported:\n%s", log)
	}
	begin()
}

// A broken connection is QEMU's end if that comes soon after it, else what it says.
func TestOrEnd(t *testing.T) {
	broken := errors.New("connection closed")
	t.Run("dies", func(t *testing.T) {
		a := newTestAgent(t)
		a.step.Store("monitor")
		begin := startScript(t, a, "sleep 0.1; exit 7")
		begin()
		if err := a.orEnd(broken); err == nil || err.Error() != "QEMU ended: exit status 7" {
			t.Errorf("%v, want QEMU's end", err)
		}
	})
	t.Run("lives", func(t *testing.T) {
		a := newTestAgent(t)
		startScript(t, a, "exit 0")
		if err := a.orEnd(broken); !errors.Is(err, broken) {
			t.Errorf("%v, want %v", err, broken)
		}
	})
}

func TestWhileQEMU(t *testing.T) {
	a := newTestAgent(t)
	begin := startScript(t, a, "exit 0")

	ctx, cancel := a.whileQEMU(t.Context(), time.Millisecond)
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("past the limit: %v", err)
	}
	cancel()

	ctx, cancel = a.whileQEMU(t.Context(), waitLimit)
	if err := ctx.Err(); err != nil {
		t.Errorf("QEMU runs: %v", err)
	}
	begin()
	<-ctx.Done()
	if err := context.Cause(ctx); !errors.Is(err, errQEMUEnded) {
		t.Errorf("QEMU has ended: %v", err)
	}
	cancel()
}

// QEMU's end is the agent's, ordinary or not. That its monitors have ended before it is no news.
func TestSupervise(t *testing.T) {
	for _, tt := range []struct{ script, want string }{
		{"exit 0", ""},
		{"exit 2", "FATAL supervise: QEMU ended: exit status 2: QEMU's own messages stand above, as lines \"qemu\""},
	} {
		t.Run(tt.script, func(t *testing.T) {
			a := newTestAgent(t)
			log := a.logTo(t)
			begin := startScript(t, a, tt.script)
			a.failed <- errors.New("QEMU's events: connection closed")
			begin()
			switch err := a.supervise(t.Context()); {
			case tt.want == "" && err != nil:
				t.Errorf("an ordinary end is %v", err)
			case tt.want != "" && (err == nil || err.Error() != tt.want):
				t.Errorf("%v, want %s", err, tt.want)
			}
			if strings.Contains(log.String(), "a service has ended") {
				t.Errorf("log:\n%s", log)
			}
		})
	}
}

// The end of a service while QEMU lives is logged, and the guest goes on.
func TestSuperviseService(t *testing.T) {
	a := newTestAgent(t)
	log := a.logTo(t)
	begin := startScript(t, a, "exit 0")
	a.failed <- errors.New("removable disks: uevents: broken")
	ended := make(chan error, 1)
	go func() { ended <- a.supervise(t.Context()) }()
	log.await(t, `msg="a service has ended; the guest goes on without it" err="removable disks: uevents: broken"`)
	select {
	case err := <-ended:
		t.Fatalf("the agent ended with a service: %v", err)
	default:
	}
	begin()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A boot that failed is said, and takes QEMU with it.
func TestFatalKillsQEMU(t *testing.T) {
	a := newTestAgent(t)
	log := a.logTo(t)
	startScript(t, a, "exit 0")
	a.fatal(&stepError{"monitor", errors.New("no greeting")})
	select {
	case <-a.qemu.Done():
	case <-time.After(waitLimit):
		t.Fatal("QEMU lives on")
	}
	if got := a.qemu.Exit().String(); got != "killed by SIGKILL" {
		t.Errorf("QEMU: %s", got)
	}
	if !strings.Contains(log.String(), `msg="FATAL monitor: no greeting"`) {
		t.Errorf("log:\n%s", log)
	}
}

// Whoever looks with xenstore-ls finds phase and error below device-model.
func TestPublish(t *testing.T) {
	a := newTestAgent(t)
	log := a.logTo(t)
	s := storeOf(t, libxlNodes())
	a.publishPhase(t.Context(), "mounts") // there is no xenstore yet
	a.xs = s.Dial(testSelf)
	const dir = "/local/domain/6/device-model/5/stubinit"
	// Before the configuration was read the guest is known from xenstore.
	a.publishPhase(t.Context(), "modules")
	if got, _ := s.Get(dir + "/phase"); got != "modules" {
		t.Errorf("phase is %q, want modules", got)
	}
	a.cfg = libxlConfig()
	a.publishPhase(t.Context(), "network")
	a.publish(t.Context(), "error", "FATAL network: no bridge")
	for path, want := range map[string]string{dir + "/phase": "network", dir + "/error": "FATAL network: no bridge"} {
		if got, _ := s.Get(path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	s.Hangup(testSelf)
	a.publish(t.Context(), "error", "x")
	if !strings.Contains(log.String(), `msg="not published" node=error`) {
		t.Errorf("log:\n%s", log)
	}
}

// What stands in xenstore is printable and small enough for its quota, whatever QEMU's last line was.
func TestPublishable(t *testing.T) {
	for _, tt := range []struct{ name, text, want string }{
		{"plain", "FATAL qemu: no QEMU", "FATAL qemu: no QEMU"},
		{"empty", "", ""},
		{"control bytes", "its last line: \x1b[2J\x00\xff", `its last line: \x1b[2J\x00\xff`},
		{"longest", strings.Repeat("x", 1024), strings.Repeat("x", 1024)},
		{"too long", strings.Repeat("x", 1025), strings.Repeat("x", 1021) + "..."},
		{"too long once escaped", strings.Repeat("\n", 1000), strings.Repeat(`\x0a`, 255) + `\...`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := publishable(tt.text); got != tt.want {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
	a := newTestAgent(t)
	s := storeOf(t, libxlNodes())
	a.xs, a.cfg = s.Dial(testSelf), libxlConfig()
	a.fatal(&stepError{"monitor", errors.New("QEMU ended: its last line: \x1b[2J" + strings.Repeat("y", 5000))})
	if got, _ := s.Get("/local/domain/6/device-model/5/stubinit/error"); len(got) != 1024 || !strings.HasPrefix(got, `FATAL monitor: QEMU ended: its last line: \x1b[2Jyy`) {
		t.Errorf("the error node has %d bytes: %q", len(got), got)
	}
}
