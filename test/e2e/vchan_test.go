//go:build lab

package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stubinit/stubinit/initramfs"
	"github.com/stubinit/stubinit/test/lab"
	"github.com/stubinit/stubinit/test/vchan"
)

var vchanTable = flag.String("vchan-table", "", "`file` to write the table of TestVchan/Speed to, for more rounds of it")

// Where things are in dom0.
const (
	vchanKernel = "/root/vchan-kernel"
	vchanInitrd = "/root/vchan-initrd"
	vchanClient = "/root/vchan-client"
	vchanConfig = "/root/vchan.cfg"
	vchanDomain = "vchan"
)

// lostRounds is how often the reference is asked for what it mostly fails at.
func lostRounds() int {
	if *soak || *vchanTable != "" {
		return 50
	}
	return 10
}

// The server side of vchan against libxenvchan, the toolstack's own: a client in dom0, and a domain that serves.
func TestVchan(t *testing.T) {
	ctx := limit(t, 8*time.Minute)
	if *soak {
		ctx = limit(t, time.Hour)
	}
	d := startVchanDomain(t, ctx)

	t.Run("Echo", func(t *testing.T) {
		for _, s := range vchan.Services {
			if s.Kind != vchan.Echo {
				continue
			}
			t.Run(s.Name, func(t *testing.T) {
				size := 3 << 20
				var r bulk
				d.client(t, ctx, &r, "echo", s.Name, "-b", strconv.Itoa(size))
				if r.Bytes != size || r.Messages < 3 {
					t.Errorf("%d bytes in %d messages: want %d in some", r.Bytes, r.Messages, size)
				}
			})
		}
	})
	t.Run("WrapAround", func(t *testing.T) {
		// A message of an odd size one below that of the smaller ring, as often as the larger one has offsets.
		for name, order := range map[string]struct{ smaller, larger int }{"echo-10-11": {10, 11}, "echo-11-10": {10, 11}, "echo-12-12": {12, 12}} {
			t.Run(name, func(t *testing.T) {
				var r struct {
					Messages   int
					LeftOrder  int `json:"left_order"`
					RightOrder int `json:"right_order"`
				}
				d.client(t, ctx, &r, "wrap", name, "-b", strconv.Itoa(1<<order.smaller-1), "-n", strconv.Itoa(1<<order.larger))
				if r.Messages != 1<<order.larger || min(r.LeftOrder, r.RightOrder) != order.smaller || max(r.LeftOrder, r.RightOrder) != order.larger {
					t.Errorf("%+v: want orders %+v", r, order)
				}
			})
		}
	})
	t.Run("Reconnects", func(t *testing.T) {
		n := 300
		if *soak {
			n = 10000
		}
		for _, apart := range []struct {
			n     int
			delay time.Duration
			limit time.Duration // of a session; libxl's own is 10 s
		}{{n, 5 * time.Millisecond, 5 * time.Second}, {50, 0, time.Second}} {
			ours := d.sessions(t, ctx, "sessions", "qmp", apart.n, apart.delay, apart.limit)
			ours.checkAll(t)
			d.request(t, ctx, vchan.RequestRestart)
			rounds := min(apart.n, 300)
			if apart.delay == 0 {
				rounds = lostRounds() // nearly all are lost, each for a second
			}
			reference := d.sessions(t, ctx, "sessions", "qmp-reference", rounds, apart.delay, apart.limit)
			t.Logf("reconnects 0 to %v apart, survived: ours %d of %d, vchan-socket-proxy --mode=server %d of %d (ended %s times by itself; first: %s)",
				apart.delay, ours.OK, ours.Rounds, reference.OK, reference.Rounds, d.exits(t, ctx), reference.First)
		}
	})
	t.Run("Kill", func(t *testing.T) {
		n := 60
		if *soak {
			n = 1000
		}
		d.sessions(t, ctx, "kill", "qmp", n, 60*time.Millisecond, 5*time.Second, "-c", vchan.CommandLarge).checkAll(t)
	})
	t.Run("Marker", func(t *testing.T) {
		d.sessions(t, ctx, "marker", "qmp", 60, 0, 5*time.Second).checkAll(t)
	})
	t.Run("EventsStorm", func(t *testing.T) {
		d.client(t, ctx, nil, "command", "qmp", "-c", vchan.CommandStormOn)
		d.sessions(t, ctx, "sessions", "qmp", 100, 5*time.Millisecond, 5*time.Second).checkAll(t)
		d.sessions(t, ctx, "kill", "qmp", 20, 60*time.Millisecond, 5*time.Second, "-c", vchan.CommandLarge).checkAll(t)
		d.client(t, ctx, nil, "command", "qmp", "-c", vchan.CommandStormOff)
	})
	t.Run("Speed", func(t *testing.T) { d.speed(t, ctx) })
	t.Run("Idle", func(t *testing.T) {
		const seconds = 10
		counts := d.idle(t, ctx, seconds)
		t.Logf("context switches in %d s: %v", seconds, counts)
		// After work Go's runtime gives memory back, and once a minute it looks after itself: one of two windows is without.
		again := d.idle(t, ctx, seconds)
		t.Logf("context switches in the next %d s: %v", seconds, again)
		for _, s := range vchan.Services {
			if s.Kind != vchan.Reference && min(counts[s.Name], again[s.Name]) > 0 {
				t.Errorf("%s runs while nobody is connected: %d and %d context switches in %d s", s.Name, counts[s.Name], again[s.Name], seconds)
			}
		}
	})
}

// A tally is the client's result of sessions, kill and marker.
type tally struct {
	Rounds, OK, Lost, Closed, Wrong int
	// Retries counts attempts to attach that failed, before one did not.
	Retries   int
	Seconds   float64
	OKSeconds float64 `json:"ok_seconds"`
	times
	First string // what went wrong first
}

type times struct {
	Median int `json:"median_us"`
	P99    int `json:"p99_us"`
	Max    int `json:"max_us"`
}

type bulk struct {
	Bytes, Messages int
	Seconds         float64
}

func (b bulk) rate() float64 { return float64(b.Bytes) / b.Seconds }

// checkAll wants every session good.
func (r tally) checkAll(t *testing.T) {
	t.Helper()
	if r.OK != r.Rounds || r.Retries != 0 {
		t.Errorf("%d of %d sessions good (lost %d, closed %d, wrong %d, %d failed attempts to attach); first: %s",
			r.OK, r.Rounds, r.Lost, r.Closed, r.Wrong, r.Retries, r.First)
	}
}

// A vchanTarget is the running test domain.
type vchanTarget struct {
	lab *lab.Lab
	id  string
}

// startVchanDomain builds client and test domain, starts the domain, and destroys it at the end of the test.
func startVchanDomain(t *testing.T, ctx context.Context) *vchanTarget {
	t.Helper()
	l := boot(t)
	for place, file := range buildVchan(t, ctx, l) {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := l.Put(ctx, place, 0o755, f); err != nil {
			t.Fatal(err)
		}
	}
	cfg := fmt.Sprintf("name = %q\ntype = \"pv\"\nmemory = 256\nvcpus = 1\nkernel = %q\nramdisk = %q\nextra = \"console=hvc0 quiet\"\n",
		vchanDomain, vchanKernel, vchanInitrd)
	if err := l.Put(ctx, vchanConfig, 0o644, strings.NewReader(cfg)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		defer cancel()
		log, err := l.Run(ctx, `cat /var/log/xen/console/guest-"$1".log`, vchanDomain)
		if err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("the test domain's console:\n%s", lab.LastLines(log, 40))
		}
		if _, err := l.Run(ctx, `! xl domid "$1" >/dev/null 2>&1 || xl destroy "$1"`, vchanDomain); err != nil {
			t.Error(err)
		}
		checkClean(t, ctx, l)
	})
	if _, err := l.Run(ctx, `xl create "$1"`, vchanConfig); err != nil {
		t.Fatal(err)
	}
	id, err := l.Run(ctx, `xl domid "$1"`, vchanDomain)
	if err != nil {
		t.Fatal(err)
	}
	d := &vchanTarget{lab: l, id: strings.TrimSpace(id)}
	d.await(t, ctx, vchan.ReadyNode)
	return d
}

// buildVchan builds what dom0 needs, and returns where it belongs there.
func buildVchan(t *testing.T, ctx context.Context, l *lab.Lab) map[string]string {
	t.Helper()
	// What dom0 was made of: its library, and its kernel and the reference for the test domain.
	root := filepath.Join(lab.Top(), "build", "lab", l.Suite.Name, "root")
	dir := filepath.Join(l.Dir, "vchan")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run := func(hint string, argv ...string) {
		t.Helper()
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Dir = lab.Top()
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%s (%s): %v\n%s", strings.Join(argv, " "), hint, err, out)
		}
	}
	client, init := filepath.Join(dir, "client"), filepath.Join(dir, "domu")
	run("install gcc, libc6-dev and libxen-dev if they are missing", "gcc", "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", client,
		"test/vchan/client/client.c", filepath.Join(root, "usr/lib/x86_64-linux-gnu/libxenvchan.so."+l.Suite.Xen), "-Wl,--allow-shlib-undefined")
	run("", "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", init, "./test/vchan/domu")

	manifest, err := initramfs.ParseManifest(strings.NewReader(fmt.Sprintf(`
dir /dev 0755
node /dev/console 0600 c 5 1
dir /proc 0555
dir /run 0755
dir /sys 0555
program /usr/lib/xen-%s/bin/vchan-socket-proxy
library libgcc_s.so.1
module xen-evtchn
module xen-gntalloc limit=4096
module xen-gntdev
module xen-privcmd
`, l.Suite.Xen)), "test domain")
	if err != nil {
		t.Fatal(err)
	}
	img, err := initramfs.Build(ctx, initramfs.Config{Root: root, Manifest: manifest, Init: init})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := img.Write(ctx, dir, img.Kernel.Unpacks()[0]); err != nil {
		t.Fatal(err)
	}
	return map[string]string{
		vchanClient: client,
		vchanKernel: filepath.Join(dir, initramfs.KernelFile),
		vchanInitrd: filepath.Join(dir, initramfs.ArchiveFile),
	}
}

// node is the absolute path of one of the domain's nodes.
func (d *vchanTarget) node(name string) string { return "/local/domain/" + d.id + "/" + name }

// await waits for a node and returns its value.
func (d *vchanTarget) await(t *testing.T, ctx context.Context, name string) string {
	t.Helper()
	value, err := d.lab.Run(ctx, `
exec 3< <(exec xenstore-watch "$1")
watch=$!
while read -r _ <&3; do xenstore-read "$1" 2>/dev/null && break; done
kill $watch`, d.node(name))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(value)
}

// client runs the client against a service and reads its result, which may be of no interest.
func (d *vchanTarget) client(t *testing.T, ctx context.Context, result any, mode, service string, args ...string) {
	t.Helper()
	out, err := d.lab.Run(ctx, `exec "$@"`, append([]string{vchanClient, mode, "-d", d.id, "-p", d.node("data/" + service)}, args...)...)
	if err != nil {
		var exit *lab.ExitError
		if errors.As(err, &exit) {
			t.Fatalf("%s of %s: exit code %d: %s", mode, service, exit.Code, exit.Stderr)
		}
		t.Fatal(err)
	}
	t.Logf("%s of %s: %s", mode, service, strings.TrimSpace(out))
	if result == nil {
		return
	}
	if err := json.Unmarshal([]byte(out), result); err != nil {
		t.Fatalf("%s of %s: %q: %v", mode, service, out, err)
	}
}

// sessions runs a mode that counts good sessions. A lost one takes as long as limit.
func (d *vchanTarget) sessions(t *testing.T, ctx context.Context, mode, service string, n int, delay, limit time.Duration, args ...string) tally {
	t.Helper()
	var r tally
	d.client(t, ctx, &r, mode, service, append(args, "-n", strconv.Itoa(n),
		"-D", strconv.FormatInt(delay.Microseconds(), 10), "-t", strconv.FormatInt(limit.Milliseconds(), 10))...)
	if r.Rounds != n || r.OK+r.Lost+r.Closed+r.Wrong != n {
		t.Fatalf("%+v: want %d rounds", r, n)
	}
	return r
}

// exits says how often a reference has ended and was started again.
func (d *vchanTarget) exits(t *testing.T, ctx context.Context) string {
	t.Helper()
	out, err := d.lab.Run(ctx, `xenstore-read "$1" 2>/dev/null || echo 0`, d.node(vchan.ExitsNode))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(out)
}

// request asks the test domain for something and returns its answer.
func (d *vchanTarget) request(t *testing.T, ctx context.Context, request string) string {
	t.Helper()
	if _, err := d.lab.Run(ctx, `xenstore-rm "$1" 2>/dev/null; xenstore-write "$2" "$3"`, d.node(vchan.AnswerNode), d.node(vchan.RequestNode), request); err != nil {
		t.Fatal(err)
	}
	return d.await(t, ctx, vchan.AnswerNode)
}

// idle counts the context switches of each service, which has no client, for some seconds.
func (d *vchanTarget) idle(t *testing.T, ctx context.Context, seconds int) map[string]int {
	t.Helper()
	text := d.request(t, ctx, fmt.Sprintf("%s %d", vchan.RequestSwitches, seconds))
	var counts map[string]int
	if err := json.Unmarshal([]byte(text), &counts); err != nil || len(counts) != len(vchan.Services) {
		t.Fatalf("context switches %q: %v", text, err)
	}
	return counts
}

// speed measures ours and the reference, one after the other, with the same client and the same servers behind.
func (d *vchanTarget) speed(t *testing.T, ctx context.Context) {
	rounds := 1
	if *vchanTable != "" {
		rounds = 4
	}
	measure := func(suffix string) (m struct {
		roundtrip     times
		apart, atOnce tally
		answer, echo  bulk
	}) {
		fresh := func() {
			if suffix != "" {
				d.request(t, ctx, vchan.RequestRestart) // it may hang after a session that it lost
			}
		}
		fresh()
		d.client(t, ctx, &m.roundtrip, "roundtrip", "qmp"+suffix, "-n", strconv.Itoa(500*rounds))
		fresh()
		m.apart = d.sessions(t, ctx, "sessions", "qmp"+suffix, 50*rounds, 5*time.Millisecond, time.Second)
		fresh()
		m.atOnce = d.sessions(t, ctx, "sessions", "qmp"+suffix, lostRounds(), 0, time.Second)
		fresh()
		d.client(t, ctx, &m.answer, "answer", "qmp"+suffix, "-n", strconv.Itoa(5*rounds), "-c", vchan.CommandLarge, "-t", "60000")
		fresh()
		d.client(t, ctx, &m.echo, "echo", "pipe"+suffix, "-b", strconv.Itoa(16<<20), "-t", "60000")
		return m
	}
	// What the creation of the domain set off in dom0 takes some seconds more, of the one processor.
	if _, err := d.lab.Run(ctx, `sleep 10`); err != nil {
		t.Fatal(err)
	}
	ours, reference := measure(""), measure("-reference")
	ours.apart.checkAll(t)
	ours.atOnce.checkAll(t)
	ms := func(us int) float64 { return float64(us) / 1e3 }
	perSecond := func(s tally) float64 { return float64(s.OK) / s.Seconds }
	mb := func(b bulk) float64 { return b.rate() / 1e6 }
	rows := []struct {
		what            string
		ours, reference float64
		// goal is the project's, least what must not be lost again: ratios, above 1 is ahead.
		goal, least float64
	}{
		{"round trip of query-status, median, ms", ms(ours.roundtrip.Median), ms(reference.roundtrip.Median), 1, 0.8},
		{"round trip of query-status, p99, ms", ms(ours.roundtrip.P99), ms(reference.roundtrip.P99), 1, 0.4},
		{"a session that went well, 0 to 5 ms after the last, median, ms", ms(ours.apart.Median), ms(reference.apart.Median), 1, 0.3},
		{"good sessions a second, each at once after the last; a lost one costs 1 s", perSecond(ours.atOnce), perSecond(reference.atOnce), 1, 1},
		{"answer of 900 KiB, MB/s", mb(ours.answer), mb(reference.answer), 2, 1.5},
		{"echo of 16 MiB, MB/s", mb(ours.echo), mb(reference.echo), 2, 3},
	}
	var b strings.Builder
	fmt.Fprintf(&b, "| | ours | vchan-socket-proxy | ratio | goal |\n| --- | ---: | ---: | ---: | ---: |\n")
	for _, r := range rows {
		ratio, missed := r.ours/r.reference, ""
		if strings.HasSuffix(r.what, " ms") {
			ratio = 1 / ratio
		}
		if ratio < r.goal {
			missed = ", missed"
		}
		fmt.Fprintf(&b, "| %s | %.2f | %.2f | %.2f | %.1f%s |\n", r.what, r.ours, r.reference, ratio, r.goal, missed)
		// By other clocks than those that count instructions a busy machine changes this.
		if *icount && ratio < r.least {
			t.Errorf("%s: ratio %.2f: it was %.2f", r.what, ratio, r.least)
		}
	}
	for _, r := range []struct {
		what            string
		ours, reference tally
	}{{"sessions survived, 0 to 5 ms apart", ours.apart, reference.apart}, {"sessions survived, each at once", ours.atOnce, reference.atOnce}} {
		fmt.Fprintf(&b, "| %s | %d of %d | %d of %d | | all of ours |\n", r.what, r.ours.OK, r.ours.Rounds, r.reference.OK, r.reference.Rounds)
	}
	t.Log("\n" + b.String())
	if *vchanTable == "" {
		return
	}
	file := *vchanTable
	if !filepath.IsAbs(file) {
		file = filepath.Join(lab.Top(), file)
	}
	clocks, flags := "noisy", ""
	if *icount {
		clocks, flags = "instruction-counting", " -icount"
	}
	text := fmt.Sprintf(vchanDocument, d.lab.Suite.Name, d.lab.Suite.Xen, clocks, b.String(), *suite, flags, *vchanTable)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

const vchanDocument = `# The QMP endpoint beside Xen's own server

One run in the lab: Debian %s, Xen %s, %s clocks, one processor. One client (test/vchan/client, on libxenvchan, in dom0) and
two servers in one PV domain: ours, and Debian's vchan-socket-proxy --mode=server. Behind both are the same servers on unix sockets: one
that speaks QMP, one that sends back what it gets. A ratio above 1 is ours ahead.

%s
The reference is started anew before each measurement, as it may hang for good after a session that it lost.

Made by:

` + "```" + `
go test -tags lab -count 1 ./test/e2e -suite %s%s -run 'TestVchan/Speed' -vchan-table %s
` + "```" + `
`
