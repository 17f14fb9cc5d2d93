//go:build lab

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stubinit/stubinit/test/lab"
)

// faultyImage puts an initrd into dom0 in which test/faults/shim starts QEMU, and returns its path there.
func faultyImage(t *testing.T, ctx context.Context, l *lab.Lab) string {
	t.Helper()
	shim := filepath.Join(t.TempDir(), "shim")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", shim, "../faults/shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	program, err := os.ReadFile(shim)
	if err != nil {
		t.Fatal(err)
	}
	// stubinit looks here first.
	image := imageWith(t, map[string]string{"usr/bin/qemu-system-i386": string(program)})
	const place = "/root/faulty"
	if err := l.Put(ctx, place, 0o644, bytes.NewReader(image)); err != nil {
		t.Fatal(err)
	}
	return place
}

// inject sets a fault off: signal at phase, "now" or one of stubinit's.
func inject(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest, signal int, phase string) {
	t.Helper()
	if _, err := l.Run(ctx, `xenstore-write "/local/domain/$1/data/fault" "$2"`, strconv.Itoa(g.StubID), fmt.Sprintf("%d %s", signal, phase)); err != nil {
		t.Fatal(err)
	}
}

// gone waits until xl has ended the guest because of its crash.
func gone(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest) {
	t.Helper()
	out, err := l.Run(ctx, `
for try in {1..100}; do xl domid "$1" >/dev/null 2>&1 || exit 0; sleep 0.1; done
xl list; exit 1`, g.Name)
	if err != nil {
		t.Fatalf("the guest is still there: %v\n%s", err, out)
	}
}

// What happens to a guest when its QEMU dies or hangs while it runs. That the guest was shut down is not looked for in the
// log: xl destroys the stubdomain at once then.
func TestFaultsQEMU(t *testing.T) {
	l := boot(t)
	image := faultyImage(t, limit(t, 5*time.Minute), l)
	for _, test := range []struct {
		name    string
		cmdline string
		signal  int
		want    []string // patterns in the log, in this order
		dies    bool
	}{
		{"killed", "", 9, []string{`FATAL supervise: QEMU ended: killed by SIGKILL`}, true},
		{"segmentation fault", "", 11, []string{`FATAL supervise: QEMU ended: killed by SIGSEGV`}, true},
		{"stuck, killed", " stubinit.qemu_stuck=kill stubinit.qemu_stuck_after=2s", 19,
			[]string{`QEMU is stuck: it does not answer`, `stuck QEMU proc=.*`, `killing QEMU`, `FATAL supervise: QEMU ended: killed by SIGKILL`}, true},
		{"stuck, left alone", " stubinit.qemu_stuck_after=2s", 19, []string{`QEMU is stuck`, `left alone`}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := limit(t, 3*time.Minute)
			cfg := config("fault")
			cfg.Stubdom.Ramdisk, cfg.Stubdom.Cmdline = image, lab.DefaultCmdline+test.cmdline
			g := create(t, ctx, cfg)
			ready(t, ctx, g)
			died := make(chan string, 1)
			if test.dies {
				// libxl's domain-death event is the watch @releaseDomain: its time after QEMU's, by dom0's clock.
				p, err := l.Begin(lab.Command{Script: `
xenstore-watch -n 2 @releaseDomain >/dev/null &
sleep 0.3 # its registration is the first event
read -r from _ </proc/uptime
xenstore-write "/local/domain/$1/data/fault" "$2 now"
wait
read -r to _ </proc/uptime
echo "$from $to"`, Args: []string{strconv.Itoa(g.StubID), strconv.Itoa(test.signal)}, Stdout: stringChan(died)})
				if err != nil {
					t.Fatal(err)
				}
				defer p.Kill()
			} else {
				inject(t, ctx, l, g, test.signal, "now")
			}
			for _, pattern := range test.want {
				expect(t, ctx, g.Stub, pattern)
			}
			if !test.dies {
				return
			}
			gone(t, ctx, l, g)
			select {
			case times := <-died:
				var from, to float64
				if _, err := fmt.Sscan(times, &from, &to); err != nil {
					t.Fatalf("times %q: %v", times, err)
				}
				took := to - from
				t.Logf("%s: %.2f s from the signal to libxl's event", test.name, took)
				if test.signal != 19 && took > 1 {
					t.Errorf("%.2f s from QEMU's death to libxl's event, want 1 at most", took)
				}
			case <-ctx.Done():
				t.Error("no @releaseDomain event")
			}
		})
	}

	t.Run("quit", func(t *testing.T) {
		ctx := limit(t, 3*time.Minute)
		g := create(t, ctx, config("fault"))
		ready(t, ctx, g)
		if _, err := g.QMP(ctx, `{"execute":"quit"}`); err != nil {
			t.Fatal(err)
		}
		expect(t, ctx, g.Stub, `QEMU ended how="exit status 0"`)
		gone(t, ctx, l, g)
	})
}

// A chan that takes what is written to it, whole.
type stringChan chan string

func (c stringChan) Write(b []byte) (int, error) {
	c <- string(b)
	return len(b), nil
}

// QEMU dies before its guest runs: xl create fails, and the log says at which step.
func TestFaultsAtPhases(t *testing.T) {
	l := boot(t)
	image := faultyImage(t, limit(t, 5*time.Minute), l)
	for _, phase := range []string{"qemu", "monitor", "bridge", "running"} {
		t.Run(phase, func(t *testing.T) {
			ctx := limit(t, 3*time.Minute)
			setHook(t, ctx, l, stubOnly+`xenstore-write "/local/domain/$s/data/fault" "9 `+phase+`"`)
			cfg := config("phase")
			cfg.Stubdom.Ramdisk = image
			g, err := tryCreate(t, ctx, cfg)
			expect(t, ctx, g.Stub, `FATAL [a-z]+: QEMU ended: killed by SIGKILL`)
			gone(t, ctx, l, g)
			if phase != "running" && err == nil {
				t.Error("xl create ended well")
			}
		})
	}
}

// xl destroy at each step of the boot leaves nothing behind.
func TestFaultsDestroy(t *testing.T) {
	l := boot(t)
	for _, phase := range []string{"config", "endpoint", "qemu", "monitor", "running"} {
		t.Run(phase, func(t *testing.T) {
			ctx := limit(t, 3*time.Minute)
			g, err := l.NewGuest(ctx, config("early"))
			if err != nil {
				t.Fatal(err)
			}
			killer, err := l.Begin(lab.Command{Script: `
while ! s=$(xl domid "$1-dm" 2>/dev/null) || ! g=$(xl domid "$1" 2>/dev/null); do sleep 0.1; done
until [ "$(xenstore-read "/local/domain/$s/device-model/$g/stubinit/phase" 2>/dev/null)" = "$2" ]; do
	xl domid "$1-dm" >/dev/null 2>&1 || exit 1 # it went on too fast, or ended
	xenstore-watch -n 1 /nothing >/dev/null # the shortest pause there is
done
xl destroy "$1"`, Args: []string{"early", phase}})
			if err != nil {
				t.Fatal(err)
			}
			defer killer.Kill()
			created := g.Create(ctx)
			if err := killer.Wait(ctx); err != nil {
				t.Logf("destroyed at another phase: %v", err)
			}
			t.Logf("xl create: %v", created)
			if err := g.Destroy(ctx); err != nil {
				t.Error(err)
			}
			checkClean(t, ctx, l)
		})
	}
}

// What dom0 does wrong has its own line in the log, or does no harm.
func TestFaultsDom0(t *testing.T) {
	l := boot(t)

	t.Run("disk that never connects", func(t *testing.T) {
		ctx := limit(t, 3*time.Minute)
		// The backend's state is moved away from where the frontend looks.
		setHook(t, ctx, l, stubOnly+`xenstore-write "/local/domain/$s/device/vbd/768/backend" "/local/domain/0/backend/vbd/$s/9999"`)
		g, err := tryCreate(t, ctx, config("nodisk"))
		if err == nil {
			t.Error("xl create ended well")
		}
		expect(t, ctx, g.Stub, `FATAL devices: no /dev/xvda .*after 15s.*hotplug-status`)
	})

	t.Run("too little memory", func(t *testing.T) {
		ctx := limit(t, 3*time.Minute)
		m := regexp.MustCompile(`stubdomain_memory (\d+) at least`).FindSubmatch(readReport(t))
		least, err := strconv.Atoi(string(m[1]))
		if err != nil {
			t.Fatal(err)
		}
		cfg := config("small")
		cfg.Stubdom.Memory = least - 25
		g, err := tryCreate(t, ctx, cfg)
		if err == nil {
			t.Errorf("starts with %d MiB", cfg.Stubdom.Memory)
		}
		expect(t, ctx, g.Stub, `FATAL modules: the initramfs was not unpacked to its end: .*raise stubdomain_memory`)
	})

	t.Run("running guest", func(t *testing.T) {
		ctx := limit(t, 6*time.Minute)
		g := create(t, ctx, config("dom0"))
		ready(t, ctx, g)

		t.Run("flood of port 0x12", func(t *testing.T) {
			before := len(g.Stub.Text())
			ask(t, ctx, g, "unplug flood 300000")
			expect(t, ctx, g.Stub, `lines, \d+ bytes dropped \(limit: 65536 bytes, then 4096 a second\)`)
			// Burst, the rate for as long as it took, and the count's own lines.
			if wrote := len(g.Stub.Text()) - before; wrote > 200_000 {
				t.Errorf("300000 bytes of the guest's made %d bytes of log", wrote)
			} else {
				t.Logf("300000 bytes of the guest's made %d bytes of log", wrote)
			}
		})
		t.Run("detach of a disk in use", func(t *testing.T) {
			out, err := l.Run(ctx, `xl block-detach "$1-dm" 768 2>&1`, g.Name)
			t.Logf("xl block-detach: %s %v", out, err)
			ask(t, ctx, g, "echo still here")
		})
		t.Run("proxy killed", func(t *testing.T) {
			if _, err := l.Run(ctx, `pkill -KILL vchan-socket-p`); err != nil {
				t.Fatal(err)
			}
			ask(t, ctx, g, "echo still here")
		})
		t.Run("console's QEMU killed", func(t *testing.T) {
			if _, err := l.Run(ctx, `kill -KILL "$(xenstore-read "/local/domain/$1/image/device-model-pid")"`, strconv.Itoa(g.StubID)); err != nil {
				t.Fatal(err)
			}
			// Its serial port has gone with that QEMU. The guest runs on: its QEMU's disk still works, says the toolstack's state.
			state, err := g.State(ctx)
			if err != nil || state != "running" {
				t.Errorf("state %q, %v", state, err)
			}
			out, err := l.Run(ctx, `sleep 2; xl list "$1"`, g.Name)
			if err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	})

	t.Run("reboot", func(t *testing.T) {
		ctx := limit(t, 5*time.Minute)
		cfg := config("reboot")
		g := create(t, ctx, cfg)
		ready(t, ctx, g)
		old := g.ID
		if err := g.Serial.Send("reboot\n"); err != nil {
			t.Fatal(err)
		}
		out, err := l.Run(ctx, `
for try in {1..600}; do
	id=$(xl domid "$1" 2>/dev/null) && [ "$id" != "$2" ] && s=$(xl domid "$1-dm" 2>/dev/null) &&
		[ "$(xenstore-read "/local/domain/$s/device-model/$id/state" 2>/dev/null)" = running ] && echo "$id" && exit 0
	sleep 0.2
done
xl list; exit 1`, g.Name, strconv.Itoa(old))
		if err != nil {
			t.Fatalf("no new domain with a running device model: %v\n%s", err, out)
		}
		t.Logf("domain %d became %s", old, strings.TrimSpace(out))
	})
}

func readReport(t *testing.T) []byte {
	t.Helper()
	report, err := os.ReadFile(filepath.Join(filepath.Dir(rootfs(t)), "stubdom-image.txt"))
	if err != nil {
		t.Fatal(err)
	}
	return report
}
