//go:build lab

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/stubinit/stubinit/test/lab"
)

// Files of the media scenarios in dom0. An image of no length is an empty drive that dom0's QEMU can serve.
const (
	cdOne     = "/root/one.iso"
	cdTwo     = "/root/two.iso"
	cdNone    = "/root/none.iso"
	diskWrite = "/root/disk-rw.img"
	diskRead  = "/root/disk-ro.img"
)

// mediaFiles puts the images into dom0 and returns the checksums that the guest must see.
func mediaFiles(t *testing.T, ctx context.Context) (crc map[string]string) {
	t.Helper()
	l := boot(t)
	// -icount has one processor for dom0, the stubdomain and the guest, and credit lets whoever runs go on for 30 ms: the stubdomain would
	// see nothing of what libxl does with a vbd in that time.
	if _, err := l.Run(ctx, "xl sched-credit -s -t 1 -r 100"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := l.Run(ctx, "xl sched-credit -s -t 30 -r 1000"); err != nil { // Xen's defaults
			t.Error(err)
		}
	})
	crc = map[string]string{}
	for i, file := range []struct {
		name string
		size int
	}{{cdOne, 128 << 10}, {cdTwo, 192 << 10}, {cdNone, 0}, {diskWrite, 256 << 10}, {diskRead, 256 << 10}} {
		data := make([]byte, file.size)
		rand.New(rand.NewSource(int64(i))).Read(data)
		if err := l.Put(ctx, file.name, 0o644, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
		crc[file.name] = fmt.Sprintf("%08x", crc32.ChecksumIEEE(data))
	}
	return crc
}

// xl runs an xl command and returns how long it took by dom0's clock. Its error has what xl said.
func xl(ctx context.Context, l *lab.Lab, args ...string) (time.Duration, error) {
	out, err := l.Run(ctx, `up() { read -r up _ </proc/uptime; echo $up; }; up; xl "$@"; code=$?; up; exit $code`, args...)
	var took time.Duration
	if f := strings.Fields(out); len(f) >= 2 {
		begin, _ := strconv.ParseFloat(f[0], 64)
		end, _ := strconv.ParseFloat(f[len(f)-1], 64)
		took = time.Duration((end - begin) * float64(time.Second))
	}
	return took, err
}

// A cdGuest is a guest whose media are changed.
type cdGuest struct {
	*lab.Guest
	lab *lab.Lab
	crc map[string]string
}

// insert changes a medium, which must work, and checks what the guest reads. It returns the time that xl took.
func (g cdGuest) insert(t *testing.T, ctx context.Context, drive, file string) time.Duration {
	t.Helper()
	took, err := xl(ctx, g.lab, "cd-insert", g.Name, drive, file)
	if err != nil {
		t.Fatalf("xl cd-insert %s %s: %v", drive, file, err)
	}
	g.holds(t, ctx, drive, file)
	return took
}

// holds checks that the guest reads a file's contents in a drive, or that the drive is empty.
func (g cdGuest) holds(t *testing.T, ctx context.Context, drive, file string) {
	t.Helper()
	unit := strings.Index("abcd", strings.TrimPrefix(drive, "hd"))
	// The first answers after a change are its news: no medium, then a new one.
	var state string
	for range 3 {
		if state = ask(t, ctx, g.Guest, fmt.Sprintf("cd %d ready", unit)); strings.Contains(state, "ready=1") {
			break
		}
	}
	if file == cdNone {
		if !strings.Contains(state, "ready=0 ") || !strings.Contains(state, "asc=3a") {
			t.Errorf("%s is not empty: %s", drive, state)
		}
		return
	}
	got := ask(t, ctx, g.Guest, fmt.Sprintf("cd %d crc", unit))
	if !strings.Contains(got, "crc="+g.crc[file]+" ") {
		t.Errorf("%s: the guest reads %s, want the crc %s of %s", drive, got, g.crc[file], file)
	}
}

// fdsets are the opaques of QEMU's fdsets, in order.
func (g cdGuest) fdsets(t *testing.T, ctx context.Context) []string {
	t.Helper()
	answer, err := g.QMP(ctx, `{"execute":"query-fdsets"}`)
	if err != nil {
		t.Fatal(err)
	}
	var sets []struct {
		FDs []struct{ Opaque string }
	}
	if err := json.Unmarshal(answer[0], &sets); err != nil {
		t.Fatal(err)
	}
	var opaques []string
	for _, set := range sets {
		for _, fd := range set.FDs {
			opaques = append(opaques, fd.Opaque)
		}
	}
	slices.Sort(opaques)
	return opaques
}

var (
	fdsetLine = regexp.MustCompile(`fdset for removable disk .*\btook=(\S+) since_attach=(\S+)`)
	usageLine = regexp.MustCompile(`stubinit uses heap_kib=(\d+) descriptors=(\d+) all_descriptors=(\d+)`)
)

// Disks and CD drives, changed with a stock xl. Some of it is left to -soak.
func TestMedia(t *testing.T) {
	within, rounds := 6*time.Minute, 10
	if *soak {
		within, rounds = 20*time.Minute, 100
	}
	ctx := limit(t, within)
	l := boot(t)
	crc := mediaFiles(t, ctx)
	var plain []time.Duration
	if *soak && *suite != "bookworm" {
		t.Run("QEMU in dom0", func(t *testing.T) { plain = cdTimes(t, ctx, crc) })
	}
	cfg := config("media")
	cfg.VIFs = nil
	cfg.Stubdom.Cmdline = lab.DefaultCmdline + " stubinit.log=debug"
	cfg.Disks = append(cfg.Disks,
		lab.Disk{VDev: "hdb", File: diskWrite},
		lab.Disk{VDev: "hdc", File: cdNone, CDROM: true},
		lab.Disk{VDev: "hdd", File: cdOne, CDROM: true},
		lab.Disk{VDev: "sdf", File: diskRead, ReadOnly: true}) // libxl refuses read-only IDE disks
	g := cdGuest{create(t, ctx, cfg), l, crc}
	ready(t, ctx, g.Guest)

	t.Run("boot", func(t *testing.T) {
		g.holds(t, ctx, "hdc", cdNone)
		g.holds(t, ctx, "hdd", cdOne)
	})
	t.Run("write", func(t *testing.T) {
		want := regexp.MustCompile(`crc=([0-9a-f]+)`).FindStringSubmatch(ask(t, ctx, g.Guest, "ata 1 write 16 64 7"))
		out, err := l.Get(ctx, diskWrite)
		if err != nil {
			t.Fatal(err)
		}
		if got := fmt.Sprintf("%08x", crc32.ChecksumIEEE(out[16*512:80*512])); want == nil || want[1] != got {
			t.Errorf("dom0 has crc %s where the guest wrote %s", got, want)
		}
	})
	t.Run("read-only", func(t *testing.T) {
		answer, err := g.QMP(ctx, `{"execute":"query-block"}`)
		if err != nil {
			t.Fatal(err)
		}
		var disks []struct {
			Inserted *struct {
				File string
				RO   bool
			}
		}
		if err := json.Unmarshal(answer[0], &disks); err != nil {
			t.Fatal(err)
		}
		got := map[string]bool{}
		for _, d := range disks {
			if d.Inserted != nil {
				got[d.Inserted.File] = d.Inserted.RO
			}
		}
		for file, ro := range map[string]bool{"/dev/xvda": false, "/dev/xvdb": false, "/dev/xvdf": true} {
			if is, ok := got[file]; !ok || is != ro {
				t.Errorf("%s: read-only is %t (there: %t), want %t", file, is, ok, ro)
			}
		}
	})
	if *suite == "bookworm" {
		t.Run("refused", func(t *testing.T) { // libxl 4.17: "cdrom-insert doesn't work for stub domains"
			if _, err := xl(ctx, l, "cd-insert", g.Name, "hdc", cdOne); err == nil || !strings.Contains(stderr(err), "stub") {
				t.Errorf("xl cd-insert on Xen 4.17: %v %s: want a refusal that names stub domains", err, stderr(err))
			}
			g.holds(t, ctx, "hdc", cdNone)
		})
		return
	}

	var stubdom []time.Duration
	t.Run("insert", func(t *testing.T) { stubdom = append(stubdom, g.insert(t, ctx, "hdc", cdOne)) })
	t.Run("another", func(t *testing.T) { stubdom = append(stubdom, g.insert(t, ctx, "hdc", cdTwo)) })
	t.Run("two drives", func(t *testing.T) {
		g.insert(t, ctx, "hdd", cdTwo)
		g.holds(t, ctx, "hdc", cdTwo)
		g.insert(t, ctx, "hdc", cdOne)
		g.holds(t, ctx, "hdd", cdTwo)
	})
	t.Run("block device", func(t *testing.T) { // which dom0's blkback serves; a file is QEMU's
		dev, err := l.Loop(ctx, cdTwo, true)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := l.Unloop(ctx, dev); err != nil {
				t.Error(err)
			}
		}()
		if took, err := xl(ctx, l, "cd-insert", g.Name, "hdc", dev); err != nil {
			t.Fatalf("xl cd-insert of %s: %v", dev, err)
		} else {
			t.Logf("xl cd-insert of a block device: %s", took)
		}
		g.holds(t, ctx, "hdc", cdTwo)
		g.insert(t, ctx, "hdc", cdOne)
	})
	t.Run("missing", func(t *testing.T) {
		if _, err := xl(ctx, l, "cd-insert", g.Name, "hdc", "/root/missing.iso"); err == nil || !strings.Contains(stderr(err), "/root/missing.iso") {
			t.Errorf("xl cd-insert of a missing file: %v: want an error that names it", err)
		}
		g.holds(t, ctx, "hdc", cdOne)
	})
	t.Run("locked", func(t *testing.T) {
		before := g.fdsets(t, ctx)
		ask(t, ctx, g.Guest, "cd 2 lock on")
		_, err := xl(ctx, l, "cd-insert", g.Name, "hdc", cdTwo)
		if err == nil || !strings.Contains(stderr(err), "locked") {
			t.Errorf("xl cd-insert into a locked drive: %v: want an error that says so", err)
		}
		if after := g.fdsets(t, ctx); !slices.Equal(before, after) {
			t.Errorf("fdsets %q became %q", before, after)
		}
		g.holds(t, ctx, "hdc", cdOne)
		ask(t, ctx, g.Guest, "cd 2 lock off")
		ask(t, ctx, g.Guest, "cd 2 load") // QEMU has told the guest that an eject is wanted
		g.insert(t, ctx, "hdc", cdTwo)
	})
	t.Run("paused", func(t *testing.T) {
		for _, args := range [][]string{{"pause", g.Name}, {"cd-insert", g.Name, "hdc", cdOne}, {"unpause", g.Name}} {
			if _, err := xl(ctx, l, args...); err != nil {
				t.Fatal(err)
			}
		}
		g.holds(t, ctx, "hdc", cdOne)
	})
	t.Run("heavy reads", func(t *testing.T) {
		ask(t, ctx, g.Guest, "cd 2 stress on")
		for _, file := range []string{cdTwo, cdOne} {
			if _, err := xl(ctx, l, "cd-insert", g.Name, "hdc", file); err != nil {
				t.Error(err)
			}
		}
		got := ask(t, ctx, g.Guest, "cd 2 stress off")
		if !strings.Contains(got, "errors=0") || !strings.Contains(got, "mismatches=0") {
			t.Errorf("the guest's reads over two changes: %s", got)
		}
		g.holds(t, ctx, "hdc", cdOne)
	})
	t.Run("row", func(t *testing.T) {
		before := g.fdsets(t, ctx)
		for i := range rounds {
			stubdom = append(stubdom, g.insert(t, ctx, "hdc", []string{cdTwo, cdOne}[i%2]))
		}
		if after := g.fdsets(t, ctx); !slices.Equal(before, after) {
			t.Errorf("fdsets %q became %q after %d changes", before, after, rounds)
		}
		use := usageLine.FindAllStringSubmatch(g.Stub.Text(), -1)
		if len(use) <= rounds {
			t.Fatalf("the log has %d lines of what stubinit uses: want more than %d", len(use), rounds)
		}
		first, last := use[len(use)-rounds], use[len(use)-1]
		t.Logf("over %d changes: memory %s to %s KiB, descriptors %s to %s, with QEMU's %s to %s",
			rounds, first[1], last[1], first[2], last[2], first[3], last[3])
		if first[2] != last[2] {
			t.Errorf("descriptors of stubinit: %s became %s", first[2], last[2])
		}
		if first[3] != last[3] {
			t.Errorf("descriptors of stubinit and QEMU: %s became %s", first[3], last[3])
		}
		from, _ := strconv.Atoi(first[1])
		to, _ := strconv.Atoi(last[1])
		if to > from+128 {
			t.Errorf("memory of stubinit: %d KiB became %d KiB", from, to)
		}
	})
	t.Run("times", func(t *testing.T) {
		var took, attach []time.Duration
		for _, m := range fdsetLine.FindAllStringSubmatch(g.Stub.Text(), -1) {
			for i, to := range []*[]time.Duration{&took, &attach} {
				d, err := time.ParseDuration(m[1+i])
				if err != nil {
					t.Fatal(err)
				}
				*to = append(*to, d)
			}
		}
		var table strings.Builder
		w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
		fmt.Fprintf(w, "\nWHAT\tMEDIAN\tN\n")
		fmt.Fprintf(w, "vbd's nodes to fdset, stubdomain's clock\t%s\t%d\n", median(attach), len(attach))
		fmt.Fprintf(w, "kernel's disk to fdset, stubdomain's clock\t%s\t%d\n", median(took), len(took))
		fmt.Fprintf(w, "xl cd-insert, stubdomain\t%s\t%d\n", median(stubdom), len(stubdom))
		if len(plain) > 0 {
			fmt.Fprintf(w, "xl cd-insert, QEMU in dom0\t%s\t%d\n", median(plain), len(plain))
			fmt.Fprintf(w, "ratio\t%.1f\t\n", float64(median(stubdom))/float64(median(plain)))
		}
		w.Flush()
		t.Log(table.String())
		// Without -icount the times are also those of whatever else this machine does.
		if m := median(took); m == 0 || *icount && m > 100*time.Millisecond {
			t.Errorf("an fdset comes %s after its disk: want 100 ms at most", m)
		}
	})
	// The last ones: libxl can put no medium into these drives any more.
	t.Run("eject", func(t *testing.T) {
		took, err := xl(ctx, l, "cd-eject", g.Name, "hdd")
		if err != nil {
			t.Fatalf("xl cd-eject: %v", err)
		}
		t.Logf("xl cd-eject took %s", took)
		g.holds(t, ctx, "hdd", cdNone)
		expect(t, ctx, g.Stub, `drive is empty and stays so: .*devid=5696`)
		if sets := g.fdsets(t, ctx); !slices.Contains(sets, "stub-devid:5696") {
			t.Errorf("fdsets %q: none for the empty drive", sets)
		}
		g.holds(t, ctx, "hdc", cdOne) // the other drive
		if !*soak {
			return
		}
		// dom0's QEMU has made no disk of the empty drive ("Could not stat file ''"), so that no backend answers libxl.
		if _, err := xl(ctx, l, "cd-insert", g.Name, "hdd", cdOne); err == nil || !strings.Contains(stderr(err), "Unable to remove stubdom PV disk") {
			t.Errorf("xl cd-insert into an empty drive: %v: want dom0's refusal", err)
		}
	})
	if !*soak {
		return
	}
	t.Run("unreadable", func(t *testing.T) { // a folder: there, but no image
		if _, err := xl(ctx, l, "cd-insert", g.Name, "hdc", "/root"); err == nil || !strings.Contains(stderr(err), "timed out") {
			t.Errorf("xl cd-insert of a folder: %v: want an error", err)
		}
		g.holds(t, ctx, "hdc", cdNone)
		if s := queryStatus(t, ctx, g.Guest); !strings.Contains(s, `"status": "running"`) {
			t.Errorf("query-status: %s", s)
		}
	})
}

// cdTimes are times of xl cd-insert for a guest whose QEMU runs in dom0.
func cdTimes(t *testing.T, ctx context.Context, crc map[string]string) (times []time.Duration) {
	t.Helper()
	cfg := config("plain")
	cfg.Stubdom, cfg.VIFs = nil, nil
	cfg.Disks = append(cfg.Disks, lab.Disk{VDev: "hdc", File: cdOne, CDROM: true})
	g := cdGuest{create(t, ctx, cfg), boot(t), crc}
	for i := range 5 {
		took, err := xl(ctx, g.lab, "cd-insert", g.Name, "hdc", []string{cdTwo, cdOne}[i%2])
		if err != nil {
			t.Fatal(err)
		}
		times = append(times, took)
	}
	return times
}

// A guest starts with a drive that has no medium at all, which has an fdset. dom0's QEMU (from 6.1 on) makes no disk of it,
// so that libxl, which detaches it before it inserts a medium, waits in vain and gives up. The guest goes on.
func TestEmptyDrive(t *testing.T) {
	ctx := limit(t, 4*time.Minute)
	crc := mediaFiles(t, ctx)
	cfg := config("empty")
	cfg.VIFs = nil
	cfg.Disks = append(cfg.Disks, lab.Disk{VDev: "hdc", CDROM: true}, lab.Disk{VDev: "hdd", File: cdOne, CDROM: true})
	g := cdGuest{create(t, ctx, cfg), boot(t), crc}
	ready(t, ctx, g.Guest)
	g.holds(t, ctx, "hdc", cdNone)
	g.holds(t, ctx, "hdd", cdOne)
	if sets := g.fdsets(t, ctx); !slices.Contains(sets, "stub-devid:5632") || !slices.Contains(sets, "stub-devid:5696") {
		t.Errorf("fdsets %q: want those of both drives", sets)
	}
	expect(t, ctx, g.Stub, `drive is empty and stays so: .*devid=5632`)
	want := "Unable to remove stubdom PV disk"
	if *suite == "bookworm" {
		want = "stub" // as in TestMedia
	}
	if _, err := xl(ctx, g.lab, "cd-insert", g.Name, "hdc", cdOne); err == nil || !strings.Contains(stderr(err), want) {
		t.Errorf("xl cd-insert into an empty drive: %v: want a refusal that says %q", err, want)
	}
	if s := queryStatus(t, ctx, g.Guest); !strings.Contains(s, `"status": "running"`) {
		t.Errorf("query-status: %s", s)
	}
	g.holds(t, ctx, "hdd", cdOne)
}

// 30 disks, of which QEMU emulates 4: the names go on after xvdz.
func TestManyDisks(t *testing.T) {
	ctx := limit(t, 8*time.Minute)
	crc := mediaFiles(t, ctx)
	cfg := config("many")
	cfg.Stubdom.Cmdline = lab.DefaultCmdline + " stubinit.log=debug"
	cfg.VIFs = nil
	cfg.Disks = append(cfg.Disks,
		lab.Disk{VDev: "hdb", File: diskWrite},
		lab.Disk{VDev: "hdc", File: cdOne, CDROM: true},
		lab.Disk{VDev: "hdd", File: cdTwo, CDROM: true})
	for n := 4; n < 30; n++ {
		name := "xvd" + string(rune('a'+n))
		if n >= 26 {
			name = "xvda" + string(rune('a'+n-26))
		}
		cfg.Disks = append(cfg.Disks, lab.Disk{VDev: name, File: diskRead, ReadOnly: true})
	}
	// The last is a CD drive, so that it has an fdset: xvdad is 1<<28 | 29<<8.
	cfg.Disks[29] = lab.Disk{VDev: "xvdad", File: cdOne, CDROM: true}
	g := cdGuest{create(t, ctx, cfg), boot(t), crc}
	ready(t, ctx, g.Guest)
	g.holds(t, ctx, "hdc", cdOne)
	g.holds(t, ctx, "hdd", cdTwo)
	sets := g.fdsets(t, ctx)
	for _, devid := range []int{5632, 5696, 1<<28 | 29<<8} {
		if want := fmt.Sprintf("stub-devid:%d", devid); !slices.Contains(sets, want) {
			t.Errorf("fdsets %q: no %s", sets, want)
		}
	}
	if *suite == "bookworm" {
		return // as in TestMedia
	}
	// media's warnMissing says why the first one may fail.
	if _, err := xl(ctx, g.lab, "cd-insert", g.Name, "hdc", cdTwo); err != nil {
		if !strings.Contains(stderr(err), "cdrom insertion timed out") {
			t.Errorf("xl cd-insert beside 29 disks: %v", err)
		}
		expect(t, ctx, g.Stub, `no other has come in its place: .* devid=5632`)
		t.Log("the first xl cd-insert beside 29 disks timed out, as QEMU in dom0 took the new disk away")
	}
	t.Logf("xl cd-insert beside 29 disks: %s", g.insert(t, ctx, "hdc", cdTwo))
}

func median(d []time.Duration) time.Duration {
	if len(d) == 0 {
		return 0
	}
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

// stderr is what a script in dom0 wrote to its standard error output.
func stderr(err error) string {
	var exit *lab.ExitError
	if errors.As(err, &exit) {
		return exit.Stderr
	}
	return ""
}
