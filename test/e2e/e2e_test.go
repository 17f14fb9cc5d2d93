//go:build lab

// Package e2e drives the nested lab: real Xen, the stock toolstack, and guests whose QEMU runs under stubinit.
//
//	go test -tags lab ./test/e2e -suite trixie -v -timeout 25m
//
// The tests share one boot of the lab. What they logged is under build/lab/SUITE/NAME.
package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stubinit/stubinit/test/lab"
)

var (
	suite  = flag.String("suite", "trixie", "Debian `suite` of hypervisor, dom0 and image")
	image  = flag.String("image", "", "`folder` with qemu-stubdom-linux-kernel and -rootfs (default build/SUITE)")
	name   = flag.String("name", "e2e", "the run's `name`: its logs are in build/lab/SUITE/NAME")
	icount = flag.Bool("icount", false, "let the lab's clocks count instructions")
	soak   = flag.Bool("soak", false, "do more rounds of everything")
)

// The lab that all tests share; booted by the first that wants it.
var shared struct {
	lab   *lab.Lab
	err   error
	timed *testing.T // the test whose time is taken
}

func TestMain(m *testing.M) {
	flag.Parse()
	code := m.Run()
	if shared.lab != nil {
		if err := shared.lab.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "closing the lab:", err)
			code = max(code, 1)
		}
	}
	os.Exit(code)
}

// boot returns the shared lab, or fails the test when there is none.
func boot(t *testing.T) *lab.Lab {
	t.Helper()
	if shared.lab == nil && shared.err == nil {
		var payload map[string]string
		if payload, shared.err = lab.Artifacts(*suite, *image); shared.err == nil {
			// It lives until TestMain closes it, so not on the test's context.
			shared.lab, shared.err = lab.Start(context.Background(), lab.Options{
				Suite: *suite, Name: *name, Icount: *icount, Payload: payload, Progress: os.Stderr,
			})
		}
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	if err := shared.lab.Err(); err != nil {
		t.Fatalf("%v\n%s", err, lab.Tail(shared.lab.Dir+"/serial.log", 30))
	}
	if !strings.Contains(t.Name(), "/") && shared.timed != t {
		shared.timed = t
		logLabTime(t, shared.lab)
	}
	return shared.lab
}

// logLabTime says at the test's end how long it took by dom0's clock, which goes by instructions in -icount mode: this machine's load does not count.
func logLabTime(t *testing.T, l *lab.Lab) {
	t.Helper()
	up := func() time.Duration {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		up, err := l.Uptime(ctx)
		if err != nil {
			t.Error(err)
		}
		return up
	}
	from := up()
	t.Cleanup(func() { t.Logf("%.1f s of lab time", (up() - from).Seconds()) })
}

// limit is a context for one guest's life. In -icount mode everything takes longer by this machine's clock.
func limit(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	if *icount {
		d *= 3
	}
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("the scenario's limit of %s is over", d))
	t.Cleanup(cancel)
	return ctx
}

// config is a guest with what every guest has: a disk, a NIC, a stubdomain with 192 MiB.
func config(name string) lab.GuestConfig {
	return lab.GuestConfig{
		Name:    name,
		Disks:   []lab.Disk{{VDev: "hda", File: lab.GuestImage}},
		VIFs:    []string{"mac=00:16:3e:00:00:01,model=e1000,bridge=xenbr0"},
		Stubdom: &lab.Stubdom{Memory: 192},
	}
}

// create creates a guest, and destroys it at the end of the test, which must leave nothing behind. A failing test shows
// the ends of the guest's logs.
func create(t *testing.T, ctx context.Context, cfg lab.GuestConfig) *lab.Guest {
	t.Helper()
	g, err := tryCreate(t, ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return g
}

// tryCreate is create for a guest that may fail to start.
func tryCreate(t *testing.T, ctx context.Context, cfg lab.GuestConfig) (*lab.Guest, error) {
	t.Helper()
	l := boot(t)
	g, err := l.CreateGuest(ctx, cfg)
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(g.Tails(40))
		}
		// The test's own context is over here.
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		if err := g.Destroy(ctx); err != nil {
			t.Error(err)
		}
		checkClean(t, ctx, l)
	})
	return g, err
}

func checkClean(t *testing.T, ctx context.Context, l *lab.Lab) {
	t.Helper()
	left, err := l.Leftovers(ctx)
	if err != nil {
		t.Error(err)
	}
	for _, what := range left {
		t.Errorf("left behind in dom0: %s", what)
	}
}

// ready waits for the test guest's first line.
func ready(t *testing.T, ctx context.Context, g *lab.Guest) {
	t.Helper()
	expect(t, ctx, g.Serial, `^stubinit-guest ready .*$`)
}

func expect(t *testing.T, ctx context.Context, c *lab.Console, pattern string) []string {
	t.Helper()
	m, err := c.Expect(ctx, pattern)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// ask sends the test guest a command and returns its answer's rest: "ok NAME …".
func ask(t *testing.T, ctx context.Context, g *lab.Guest, command string) string {
	t.Helper()
	if err := g.Serial.Send(command + "\n"); err != nil {
		t.Fatal(err)
	}
	name, _, _ := strings.Cut(command, " ")
	m := expect(t, ctx, g.Serial, `^(ok|err) `+name+`\b *([^\r\n]*)\r?\n`)
	if m[1] == "err" {
		t.Fatalf("the guest answers %q with %s", command, strings.TrimSpace(m[0]))
	}
	return m[2]
}

// queryStatus asks QEMU, the way libxl does, whether the guest runs.
func queryStatus(t *testing.T, ctx context.Context, g *lab.Guest) string {
	t.Helper()
	answer, err := g.QMP(ctx, `{"execute":"query-status"}`)
	if err != nil {
		t.Fatal(err)
	}
	return string(answer[0])
}
