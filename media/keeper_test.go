package media

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/uevent"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
)

const (
	hdc = 5632 // xvdc
	hdd = 5696 // xvdd
	hda = 768  // xvda
)

// A fakeQEMU has fdsets as QEMU has them: a member is a copy of the descriptor, and a new set gets the lowest free number.
type fakeQEMU struct {
	mu     sync.Mutex
	sets   map[int64]fakeSet
	calls  []string
	fail   func(ctx context.Context, name string) error
	before func(name string) // called without the lock
}

type fakeSet struct{ opaque, medium string }

func (q *fakeQEMU) Execute(ctx context.Context, name string, args any) (json.RawMessage, error) {
	return q.ExecuteWithFile(ctx, name, args, nil)
}

func (q *fakeQEMU) ExecuteWithFile(ctx context.Context, name string, args any, f *os.File) (json.RawMessage, error) {
	if q.before != nil {
		q.before(name)
	}
	if q.fail != nil {
		if err := q.fail(ctx, name); err != nil {
			return nil, err
		}
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.calls = append(q.calls, name)
	type fd struct {
		Opaque string `json:"opaque,omitempty"`
	}
	type set struct {
		ID  int64 `json:"fdset-id"`
		FDs []fd  `json:"fds"`
	}
	switch name {
	case "query-fdsets":
		answer := []set{}
		for id, s := range q.sets {
			answer = append(answer, set{id, []fd{{}, {s.opaque}}})
		}
		return json.Marshal(answer)
	case "remove-fd":
		delete(q.sets, args.(map[string]any)["fdset-id"].(int64))
		return json.RawMessage("{}"), nil
	case "add-fd":
		medium, err := io.ReadAll(f)
		if err != nil {
			return nil, err
		}
		if flags, err := fcntlFlags(f); err != nil || flags&syscall.O_ACCMODE != syscall.O_RDONLY {
			return nil, fmt.Errorf("access mode of flags %#x is not read-only: %v", flags, err)
		}
		id := int64(0)
		for _, taken := q.sets[id]; taken; _, taken = q.sets[id] {
			id++
		}
		q.sets[id] = fakeSet{args.(map[string]any)["opaque"].(string), string(medium)}
		return json.Marshal(map[string]any{"fdset-id": id, "fd": 20})
	}
	return nil, fmt.Errorf("%s: not a command of the keeper", name)
}

func fcntlFlags(f *os.File) (int, error) {
	var flags uintptr
	var errno syscall.Errno
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	err = raw.Control(func(fd uintptr) {
		flags, _, errno = syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_GETFL, 0)
	})
	if errno != 0 {
		return 0, errno
	}
	return int(flags), err
}

// removeSet is what libxl does before a detach: query-fdsets, remove-fd.
func (q *fakeQEMU) removeSet(opaque string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for id, s := range q.sets {
		if s.opaque == opaque {
			delete(q.sets, id)
		}
	}
}

// media gives opaque → medium of all sets; two sets of one name show as both media.
func (q *fakeQEMU) media() map[string]string {
	q.mu.Lock()
	defer q.mu.Unlock()
	m := map[string]string{}
	for _, s := range q.sets {
		m[s.opaque] += s.medium
	}
	return m
}

func (q *fakeQEMU) count(name string) (n int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, c := range q.calls {
		if c == name {
			n++
		}
	}
	return n
}

// fakeEvents gives what the test sends.
type fakeEvents struct {
	c       chan any // uevent.Event or error
	waiting *atomic.Int32
}

func (f fakeEvents) Next(ctx context.Context) (uevent.Event, error) {
	f.waiting.Add(1)
	defer f.waiting.Add(-1)
	select {
	case e := <-f.c:
		if err, ok := e.(error); ok {
			return uevent.Event{}, err
		}
		return e.(uevent.Event), nil
	case <-ctx.Done():
		return uevent.Event{}, ctx.Err()
	}
}

var blockEvent = uevent.Event{Action: "add", Vars: map[string]string{"SUBSYSTEM": "block"}}

// A bench is a stubdomain: its xenstore, its kernel's disks (files stand in for them), QEMU, and a keeper.
type bench struct {
	t      *testing.T
	store  *xenstoretest.Server
	events fakeEvents
	qemu   *fakeQEMU
	dir    string
	seq    int
	log    *bytes.Buffer // read it after synctest.Wait
	keeper *Keeper
	stop   context.CancelFunc
	ended  chan error // Run's result
}

const self = 7

func newBench(t *testing.T) *bench {
	b := &bench{
		t: t, store: xenstoretest.New(t), events: fakeEvents{make(chan any), new(atomic.Int32)}, qemu: &fakeQEMU{sets: map[int64]fakeSet{}},
		dir: t.TempDir(), log: new(bytes.Buffer), ended: make(chan error, 1),
	}
	if err := os.MkdirAll(b.dir+"/dev", 0o755); err != nil {
		t.Fatal(err)
	}
	b.keeper = &Keeper{
		Store: b.store.Dial(self), Events: b.events, Dev: b.dir + "/dev", Sys: b.dir + "/sys",
		Log: slog.New(slog.NewTextHandler(b.log, nil)),
	}
	return b
}

// run starts Run; it ends with the test at the latest.
func (b *bench) run() {
	ctx, cancel := context.WithCancel(b.t.Context())
	b.stop = cancel
	go func() { b.ended <- b.keeper.Run(ctx, b.qemu) }()
	b.t.Cleanup(func() {
		cancel()
		synctest.Wait()
	})
	synctest.Wait()
}

func (b *bench) nodes(devid int, kind string) {
	dir := fmt.Sprintf("/local/domain/%d/device/vbd/%d", self, devid)
	b.store.Set(dir+"/state", "1")
	b.store.Set(dir+"/device-type", kind)
}

func (b *bench) noNodes(devid int) {
	b.store.Remove(fmt.Sprintf("/local/domain/%d/device/vbd/%d", self, devid))
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

// disk makes the kernel's disk: sysfs first, as the kernel does.
func (b *bench) disk(devid int, medium string) {
	name, err := Name(devid)
	b.must(err)
	b.seq++
	b.must(os.MkdirAll(filepath.Join(b.dir, "sys/block", name), 0o755))
	b.must(os.WriteFile(filepath.Join(b.dir, "sys/block", name, "diskseq"), fmt.Appendln(nil, b.seq), 0o644))
	// With its contents at once, as a disk has them: the keeper may be looking.
	node := filepath.Join(b.dir, "node")
	b.must(os.WriteFile(node, []byte(medium), 0o600))
	b.must(os.Rename(node, filepath.Join(b.dir, "dev", name)))
}

func (b *bench) noDisk(devid int) {
	name, err := Name(devid)
	b.must(err)
	b.must(os.Remove(filepath.Join(b.dir, "dev", name)))
	b.must(os.RemoveAll(filepath.Join(b.dir, "sys/block", name)))
}

func (b *bench) send(e any) {
	b.events.c <- e
	synctest.Wait()
}

// attach is a PV attach as it comes to the stubdomain: libxl's nodes, the kernel's disk, its uevent.
func (b *bench) attach(devid int, medium string) {
	b.nodes(devid, "cdrom")
	synctest.Wait()
	b.disk(devid, medium)
	b.send(blockEvent)
}

// detach is a PV detach: the frontend closes, its disk goes, then libxl removes the nodes. As long as any descriptor is open it fails.
func (b *bench) detach(devid int) {
	b.t.Helper()
	b.store.Set(fmt.Sprintf("/local/domain/%d/device/vbd/%d/state", self, devid), "5")
	synctest.Wait()
	b.wantClosed()
	b.wantSets("the frontend closes", devid, "")
	b.noDisk(devid)
	b.send(uevent.Event{Action: "remove", Vars: map[string]string{"SUBSYSTEM": "block"}})
	b.noNodes(devid)
	synctest.Wait()
}

// wantSets checks the medium in one disk's set; "" is no set.
func (b *bench) wantSets(when string, devid int, medium string) {
	b.t.Helper()
	got, ok := b.qemu.media()[Opaque(devid)]
	if got != medium || ok != (medium != "") {
		b.t.Errorf("when %s: set of %d is %q (there: %v), want %q", when, devid, got, ok, medium)
	}
}

// wantClosed checks that this process has no descriptor of a disk.
func (b *bench) wantClosed() {
	b.t.Helper()
	if open := b.descriptors(); len(open) > 0 {
		b.t.Errorf("still open: %v", open)
	}
}

func (b *bench) descriptors() (open []string) {
	b.t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	b.must(err)
	for _, e := range entries {
		if path, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(path, b.dir) {
			open = append(open, filepath.Base(path))
		}
	}
	return open
}

func TestInitial(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.nodes(hda, "disk")
		b.disk(hda, "system")
		b.nodes(hdc, "cdrom")
		b.disk(hdc, "first")
		b.nodes(hdd, "cdrom") // no disk yet
		b.nodes(65<<8, "cdrom")
		b.store.Set(fmt.Sprintf("/local/domain/%d/device/vbd/%d", self, 51728), "") // being removed: no type
		sets, err := b.keeper.Initial(t.Context())
		b.must(err)
		if len(sets) != 1 || sets[0].Opaque != "stub-devid:5632" {
			t.Fatalf("sets %v, want that of 5632", sets)
		}
		content, err := io.ReadAll(sets[0].File)
		if string(content) != "first" || err != nil {
			t.Errorf("the set's file has %q, %v", content, err)
		}
		if d := cmp.Diff([]string{"xvdc"}, b.descriptors()); d != "" {
			t.Errorf("open descriptors (-want +got):\n%s", d)
		}
		b.must(sets[0].File.Close())
		if want := "devid=16640 err=\"vbd number 16640 (0x4100): not xvd, sd or hd\""; !strings.Contains(b.log.String(), want) {
			t.Errorf("log lacks %s:\n%s", want, b.log)
		}

		// QEMU has the first by -add-fd. Run adds only what comes later.
		b.qemu.sets[2] = fakeSet{Opaque(hdc), "first"}
		b.run()
		b.wantSets("Run has started", hdc, "first")
		if n := b.qemu.count("add-fd"); n != 0 {
			t.Errorf("%d add-fd at the start, want none", n)
		}
		b.disk(hdd, "second")
		b.send(blockEvent)
		if d := cmp.Diff(map[string]string{Opaque(hdc): "first", Opaque(hdd): "second"}, b.qemu.media()); d != "" {
			t.Errorf("sets (-want +got):\n%s", d)
		}
		b.wantClosed()
	})
}

func TestInitialNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		sets, err := b.keeper.Initial(t.Context())
		if len(sets) != 0 || err != nil {
			t.Errorf("without vbds: %v, %v", sets, err)
		}
	})
}

func TestInitialError(t *testing.T) {
	for _, tt := range []struct {
		name  string
		fault func(op, path string) syscall.Errno
		node  string
		want  string
	}{
		{"list refused", func(op, path string) syscall.Errno {
			if op == "list" {
				return syscall.EIO
			}
			return 0
		}, "5632", "device/vbd"},
		{"type refused", func(op, path string) syscall.Errno {
			if strings.HasSuffix(path, "/device-type") {
				return syscall.EIO
			}
			return 0
		}, "5632", "device/vbd/5632/device-type"},
		{"no number", nil, "xvdc", "device/vbd/xvdc"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.store.Set("/local/domain/7/device/vbd/"+tt.node+"/device-type", "cdrom")
				b.store.SetFaults(xenstoretest.Faults{Fail: tt.fault})
				sets, err := b.keeper.Initial(t.Context())
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("%v, %v; want an error that names %s", sets, err, tt.want)
				}
				b.wantClosed()
			})
		})
	}
}

// A disk that cannot be opened now has its set once it can.
func TestInitialUnreadable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.nodes(hdc, "cdrom")
		b.disk(hdc, "x")
		b.must(os.Remove(b.dir + "/dev/xvdc"))
		b.must(os.Symlink("xvdc", b.dir+"/dev/xvdc")) // ELOOP
		b.nodes(hdd, "cdrom")
		b.disk(hdd, "good")
		sets, err := b.keeper.Initial(t.Context())
		b.must(err)
		if len(sets) != 1 || sets[0].Opaque != Opaque(hdd) {
			t.Fatalf("sets %v, want that of %d alone", sets, hdd)
		}
		b.must(sets[0].File.Close())
		if !strings.Contains(b.log.String(), "devid=5632 err=\"open "+b.dir+"/dev/xvdc: ") {
			t.Errorf("the log does not name the disk:\n%s", b.log)
		}
		b.run()
		b.wantSets("it cannot be opened", hdc, "")
		b.must(os.Remove(b.dir + "/dev/xvdc"))
		b.must(os.WriteFile(b.dir+"/dev/xvdc", []byte("readable"), 0o600))
		b.send(blockEvent)
		b.wantSets("it can be opened", hdc, "readable")
	})
}

// libxl's sequence (PROTOCOL "CD-ROM") ten times: insert, eject (an empty disk), insert; the other drive keeps its set.
func TestSwaps(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.nodes(hda, "disk")
		b.disk(hda, "system")
		b.nodes(hdc, "cdrom")
		b.disk(hdc, "boot")
		b.nodes(hdd, "cdrom")
		b.disk(hdd, "other")
		sets, err := b.keeper.Initial(t.Context())
		b.must(err)
		for i, s := range sets {
			b.qemu.sets[int64(i+2)] = fakeSet{s.Opaque, "initial"}
			b.must(s.File.Close())
		}
		b.run()
		for i := range 10 {
			medium := fmt.Sprint("disc ", i)
			if i%3 == 1 {
				medium = "" // eject
			}
			b.qemu.removeSet(Opaque(hdc))
			// Whatever happens between remove-fd and the detach must not bring the set back.
			b.send(blockEvent)
			b.send(uevent.ErrLost)
			b.store.Fire("/local/domain/7/device/vbd")
			synctest.Wait()
			b.wantSets("libxl has removed it", hdc, "")
			b.detach(hdc)
			b.wantSets("detached", hdc, "")
			b.attach(hdc, medium)
			if got, ok := b.qemu.media()[Opaque(hdc)]; !ok || got != medium {
				t.Fatalf("swap %d: set holds %q (there: %v), want %q", i, got, ok, medium)
			}
			b.wantClosed()
		}
		b.wantSets("the first drive was used", hdd, "initial")
		if d := cmp.Diff(2, len(b.qemu.media())); d != "" {
			t.Errorf("number of sets (-want +got):\n%s", d)
		}
		if n := b.qemu.count("add-fd"); n != 10 {
			t.Errorf("%d add-fd for 10 disks", n)
		}
		b.swap(hdd, "other 2")
		b.wantSets("the second drive is swapped", hdd, "other 2")
		b.wantSets("the second drive is swapped", hdc, "disc 9")
		if s := b.log.String(); strings.Contains(s, "level=ERROR") || strings.Contains(s, "level=WARN") {
			t.Errorf("complaints:\n%s", s)
		}
	})
}

func (b *bench) swap(devid int, medium string) {
	b.t.Helper()
	b.qemu.removeSet(Opaque(devid))
	b.detach(devid)
	b.attach(devid, medium)
}

// Nodes and disk do not come and go together. As long as it is the same disk, its set must not come back.
func TestNodesGoFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.nodes(hdc, "cdrom")
		b.disk(hdc, "old")
		b.run()
		b.wantSets("started", hdc, "old")
		b.qemu.removeSet(Opaque(hdc))
		b.noNodes(hdc)
		synctest.Wait()
		b.nodes(hdc, "cdrom") // the next vbd; the kernel still has the old disk
		synctest.Wait()
		b.wantSets("only the nodes are new", hdc, "")
		b.noDisk(hdc)
		b.send(blockEvent)
		b.disk(hdc, "new")
		b.send(blockEvent)
		b.wantSets("the disk is new", hdc, "new")
	})
}

// backend gives a vbd its backend, and returns where that is.
func (b *bench) backend(devid int, online string) string {
	backend := fmt.Sprintf("/local/domain/0/backend/qdisk/%d/%d", self, devid)
	b.store.SetPerms(backend+"/online", xenstore.Perm{Dom: 0, Access: xenstore.None}, xenstore.Perm{Dom: self, Access: xenstore.ReadOnly})
	b.store.Set(backend+"/online", online)
	frontend := fmt.Sprintf("/local/domain/%d/device/vbd/%d", self, devid)
	b.store.Set(frontend+"/backend", backend)
	return backend
}

// wantNodes checks whether a vbd has nodes.
func (b *bench) wantNodes(when string, devid int, want bool) {
	b.t.Helper()
	synctest.Wait()
	if _, got := b.store.Get(fmt.Sprintf("/local/domain/%d/device/vbd/%d/device-type", self, devid)); got != want {
		b.t.Errorf("when %s: vbd %d has nodes: %v, want %v", when, devid, got, want)
	}
}

// A removable disk's nodes go when the toolstack begins its detach, time after time; nobody else's do.
func TestDetach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		attach := func(devid int, kind, medium string) (backend string) {
			b.nodes(devid, kind)
			backend = b.backend(devid, "1")
			b.disk(devid, medium)
			return backend
		}
		system := attach(hda, "disk", "system")
		attach(hdd, "cdrom", "other")
		drive := attach(hdc, "cdrom", "first")
		b.run()
		b.store.Set(system+"/online", "0")
		for i := range 3 {
			b.wantNodes("nothing is detached", hdc, true)
			b.qemu.removeSet(Opaque(hdc))
			b.store.Set(drive+"/online", "0")
			b.wantNodes("the detach has begun", hdc, false)
			b.noDisk(hdc)
			b.store.Remove(drive) // as libxl does when the backend has closed
			synctest.Wait()
			attach(hdc, "cdrom", fmt.Sprint("disc ", i))
			b.send(blockEvent)
			b.wantSets("the next disk is there", hdc, fmt.Sprint("disc ", i))
		}
		b.wantNodes("it is no removable disk", hda, true)
		b.wantNodes("another one is detached", hdd, true)
		if n := b.store.Watches(self); n != 3 {
			t.Errorf("%d watches, want 3: that of all vbds and one a drive", n)
		}
		if s := b.log.String(); strings.Contains(s, "level=ERROR") || strings.Contains(s, "level=WARN") {
			t.Errorf("complaints:\n%s", s)
		}
	})
}

// A disk that does not come after a detach is told once each time; one that comes in time is not.
func TestDetachWithoutNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		attach := func() string {
			b.nodes(hdc, "cdrom")
			return b.backend(hdc, "1")
		}
		drive := attach()
		b.disk(hdc, "disc")
		b.run()
		const warning = "no other has come in its place"
		for i := range 2 {
			b.store.Set(drive+"/online", "0")
			synctest.Wait()
			b.store.Remove(drive)
			time.Sleep(nextDiskLimit - time.Millisecond)
			attach()
			time.Sleep(time.Minute)
			synctest.Wait()
			if n := strings.Count(b.log.String(), warning); n != i {
				t.Fatalf("the next disk has come in time, and the log has %d warnings, want %d:\n%s", n, i, b.log)
			}
			// QEMU in dom0 removes what libxl has just put there.
			b.store.Set(drive+"/online", "0")
			synctest.Wait()
			b.store.Remove(drive)
			attach()
			synctest.Wait()
			b.noNodes(hdc)
			b.store.Remove(drive)
			time.Sleep(time.Minute)
			synctest.Wait()
			if n := strings.Count(b.log.String(), warning); n != i+1 {
				t.Fatalf("the next disk has not come, and the log has %d warnings, want %d:\n%s", n, i+1, b.log)
			}
			attach()
			synctest.Wait()
		}
	})
}

// An empty drive has a set too, after each eject, and the log says what it cannot do.
func TestEmpty(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		attach := func(params string) (backend string) {
			b.nodes(hdc, "cdrom")
			backend = b.backend(hdc, "1")
			b.store.Set(backend+"/params", params)
			synctest.Wait()
			return backend
		}
		drive := attach("aio:")
		const advice = "an image of no length is an empty drive that works\" devid=5632"
		sets, err := b.keeper.Initial(t.Context())
		b.must(err)
		if len(sets) != 1 || sets[0].Opaque != Opaque(hdc) || sets[0].File.Name() != os.DevNull {
			t.Fatalf("sets %v, want one of %s", sets, os.DevNull)
		}
		b.must(sets[0].File.Close())
		if n := strings.Count(b.log.String(), advice); n != 1 {
			t.Errorf("the log has %q %d times, want once:\n%s", advice, n, b.log)
		}
		b.qemu.sets[2] = fakeSet{Opaque(hdc), ""}
		b.run()
		for i := range 2 {
			b.qemu.removeSet(Opaque(hdc))
			b.store.Set(drive+"/online", "0")
			synctest.Wait()
			b.store.Remove(drive)
			synctest.Wait()
			attach("")
			if _, ok := b.qemu.media()[Opaque(hdc)]; !ok {
				t.Errorf("no set after eject %d", i)
			}
			if n := strings.Count(b.log.String(), advice); n != i+2 {
				t.Errorf("after eject %d the log has %q %d times:\n%s", i, advice, n, b.log)
			}
		}
		b.qemu.removeSet(Opaque(hdc))
		b.store.Set(drive+"/online", "0")
		synctest.Wait()
		b.disk(hdc, "disc")
		attach("aio:/disc.iso")
		b.send(blockEvent)
		b.wantSets("a disc is in", hdc, "disc")
		b.wantClosed()
	})
}

// A disk's kind is asked for once, and again when it has been away.
func TestPlainDisks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.nodes(hda, "disk")
		b.nodes(hdd, "disk")
		asked := map[string]int{}
		b.store.SetFaults(xenstoretest.Faults{Fail: func(op, path string) syscall.Errno {
			if op == "read" {
				asked[path]++
			}
			return 0
		}})
		b.run()
		b.noNodes(hdd)
		synctest.Wait()
		b.attach(hdd, "disc")
		b.store.SetFaults(xenstoretest.Faults{})
		b.wantSets("it has come back as a drive", hdd, "disc")
		if n := asked["device/vbd/768/device-type"]; n != 1 {
			t.Errorf("the kind of a disk was asked for %d times: %v", n, asked)
		}
	})
}

// A beforeCommit calls do when a transaction is about to be committed.
type beforeCommit struct {
	*xenstoretest.Conn
	do func()
}

func (c beforeCommit) Write(request []byte) (int, error) {
	const transactionEnd = 7 // XS_TRANSACTION_END
	if binary.LittleEndian.Uint32(request) == transactionEnd && bytes.HasSuffix(request, []byte("T\x00")) {
		c.do()
	}
	return c.Conn.Write(request)
}

// A stubdomain that had no processor for a while must not remove the next disk's nodes.
func TestDetachLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.nodes(hdc, "cdrom")
		drive := b.backend(hdc, "1")
		b.disk(hdc, "old")
		late := 0
		client := xenstore.NewClient(beforeCommit{b.store.DialConn(self), func() {
			late++
			b.noNodes(hdc)
			b.store.Remove(drive)
			b.nodes(hdc, "cdrom")
			b.backend(hdc, "1")
		}})
		defer client.Close()
		b.keeper.Store = client
		b.run()
		b.store.Set(drive+"/online", "0")
		b.wantNodes("libxl was faster", hdc, true)
		if late != 1 {
			t.Errorf("%d commits, want 1", late)
		}
		b.stop()
		<-b.ended
	})
}

// When xenstore refuses, the log says what may follow from it.
func TestDetachRefused(t *testing.T) {
	for _, op := range []string{"watch", "remove"} {
		t.Run(op, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.nodes(hdc, "cdrom")
				drive := b.backend(hdc, "1")
				b.store.SetFaults(xenstoretest.Faults{Fail: func(got, path string) syscall.Errno {
					if got == op && path != "device/vbd" {
						return syscall.ENOSPC
					}
					return 0
				}})
				b.run()
				b.store.Set(drive+"/online", "0")
				synctest.Wait()
				if s := b.log.String(); !strings.Contains(s, "xl cd-insert may time out: detaches are not followed") || !strings.Contains(s, "devid=5632") {
					t.Errorf("log:\n%s", s)
				}
			})
		})
	}
}

// Uevents may get lost, and the disk may be replaced without a look in between: diskseq tells.
func TestLostEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.nodes(hdc, "cdrom")
		b.disk(hdc, "old")
		b.run()
		b.qemu.removeSet(Opaque(hdc))
		b.disk(hdc, "new")
		b.send(uevent.Event{Action: "add", Vars: map[string]string{"SUBSYSTEM": "net"}})
		b.wantSets("only a network device has come", hdc, "")
		b.send(uevent.ErrLost)
		b.wantSets("events were lost", hdc, "new")
		b.disk(hdc, "newer")
		b.store.Set("/local/domain/7/device/vbd/5632/state", "4") // no uevent at all
		synctest.Wait()
		b.wantSets("xenstore alone tells", hdc, "newer")
	})
}

// A set that a failed change has left is replaced: two of one name would let libxl take the wrong one.
func TestStaleSet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.qemu.sets = map[int64]fakeSet{0: {Opaque(hdc), "stale"}, 1: {"stubinit-state", "state"}, 2: {Opaque(hdc), "staler"}, 3: {Opaque(56320), "other"}}
		b.attachQuietly(hdc, "new")
		b.run()
		if d := cmp.Diff(map[string]string{Opaque(hdc): "new", "stubinit-state": "state", Opaque(56320): "other"}, b.qemu.media()); d != "" {
			t.Errorf("sets (-want +got):\n%s", d)
		}
	})
}

func (b *bench) attachQuietly(devid int, medium string) {
	b.nodes(devid, "cdrom")
	b.disk(devid, medium)
}

// A command that fails is logged with the devid, no descriptor stays, and the next event tries again.
func TestCommandFails(t *testing.T) {
	for _, command := range []string{"query-fdsets", "remove-fd", "add-fd"} {
		t.Run(command, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.qemu.sets[0] = fakeSet{Opaque(hdc), "stale"}
				broken := errors.New("too many open files")
				b.qemu.fail = func(_ context.Context, name string) error {
					if name == command {
						return broken
					}
					return nil
				}
				b.attachQuietly(hdc, "one")
				b.run()
				if !strings.Contains(b.log.String(), "devid=5632 err=\"too many open files\"") {
					t.Errorf("log:\n%s", b.log)
				}
				b.wantClosed()
				b.qemu.fail = nil
				b.send(blockEvent)
				b.wantSets("the next event came", hdc, "one")
			})
		})
	}
}

// An answer that is not a list of sets is an error like any other.
func TestBadAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.attachQuietly(hdc, "one")
		ctx, cancel := context.WithCancel(t.Context())
		go func() { b.ended <- b.keeper.Run(ctx, badAnswer{b.qemu}) }()
		synctest.Wait()
		if !strings.Contains(b.log.String(), "err=\"query-fdsets: ") {
			t.Errorf("log:\n%s", b.log)
		}
		b.wantSets("QEMU talks nonsense", hdc, "")
		b.wantClosed()
		cancel()
		<-b.ended
	})
}

type badAnswer struct{ Monitor }

func (badAnswer) Execute(context.Context, string, any) (json.RawMessage, error) {
	return json.RawMessage(`{"fdset-id":1}`), nil
}

// A QEMU that does not answer holds neither the descriptor nor the keeper for ever.
func TestStuckQEMU(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.qemu.fail = func(ctx context.Context, _ string) error {
			<-ctx.Done()
			return ctx.Err()
		}
		b.attachQuietly(hdc, "one")
		start := time.Now()
		b.run()
		time.Sleep(requestLimit) // the bubble's clock
		synctest.Wait()
		if took := time.Since(start); took != requestLimit {
			t.Errorf("given up after %v", took)
		}
		b.wantClosed()
		if !strings.Contains(b.log.String(), context.DeadlineExceeded.Error()) {
			t.Errorf("log:\n%s", b.log)
		}
		b.qemu.fail = nil
		b.send(blockEvent)
		b.wantSets("QEMU answers again", hdc, "one")
	})
}

// The disk goes, or is replaced, at each moment of giving it.
func TestVanishes(t *testing.T) {
	t.Run("before the open", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			b.attachQuietly(hdc, "one")
			b.must(os.Remove(b.dir + "/dev/xvdc")) // sysfs still has it
			b.run()
			b.wantSets("there is no device node", hdc, "")
			if b.log.Len() > 0 {
				t.Errorf("a disk that comes and goes is no complaint:\n%s", b.log)
			}
			b.disk(hdc, "two")
			b.send(blockEvent)
			b.wantSets("it is there", hdc, "two")
		})
	})
	t.Run("while QEMU is asked", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBench(t)
			b.attachQuietly(hdc, "one")
			once := sync.OnceFunc(func() { // in the keeper's goroutine
				if err := errors.Join(os.WriteFile(b.dir+"/sys/block/xvdc/diskseq", []byte("99\n"), 0o644), os.WriteFile(b.dir+"/dev/xvdc", []byte("two"), 0o600)); err != nil {
					t.Error(err)
				}
			})
			b.qemu.before = func(name string) {
				if name == "query-fdsets" {
					once()
				}
			}
			b.run()
			b.send(blockEvent) // the new disk's
			b.wantSets("replaced meanwhile", hdc, "two")
			b.wantClosed()
		})
	})
}

// Whatever open gives belongs to the incarnation that it names, also when the disk is replaced all the time, in the kernel's order.
func TestOpenReplaced(t *testing.T) {
	k := &Keeper{Dev: t.TempDir(), Sys: t.TempDir()}
	dev, seq := k.Dev+"/xvdc", k.Sys+"/block/xvdc/diskseq"
	if err := os.MkdirAll(filepath.Dir(seq), 0o755); err != nil {
		t.Fatal(err)
	}
	quit := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		for i := 1; ; i++ {
			select {
			case <-quit:
				return
			default:
			}
			for _, path := range []string{seq, dev} {
				if err := os.WriteFile(path+".new", fmt.Append(nil, i), 0o644); err != nil {
					t.Error(err)
					return
				}
			}
			for _, step := range []func() error{
				func() error { return os.Remove(dev) }, func() error { return os.Remove(seq) },
				func() error { return os.Rename(seq+".new", seq) }, func() error { return os.Rename(dev+".new", dev) },
			} {
				if err := step(); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Error(err)
					return
				}
			}
		}
	})
	defer swapping.Wait()
	defer close(quit)
	opened := 0
	for end := time.Now().Add(5 * time.Second); opened < 5000 && time.Now().Before(end); {
		f, incarnation, err := k.open(hdc)
		if gone(err) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(f)
		f.Close()
		if string(content) != incarnation || err != nil {
			t.Fatalf("a disk of incarnation %s was given as %s (%v)", content, incarnation, err)
		}
		opened++
	}
	if opened == 0 {
		t.Error("the disk was never there")
	}
}

// Errors of xenstore while it runs are logged; the next event looks again.
func TestStoreFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.run()
		b.store.SetFaults(xenstoretest.Faults{Fail: func(op, path string) syscall.Errno {
			if op == "list" {
				return syscall.EIO
			}
			return 0
		}})
		b.attach(hdc, "one")
		if !strings.Contains(b.log.String(), "cannot list removable disks") {
			t.Errorf("log:\n%s", b.log)
		}
		b.store.SetFaults(xenstoretest.Faults{})
		b.send(blockEvent)
		b.wantSets("xenstore works again", hdc, "one")
	})
}

// Run ends with its context and with either source; the bubble fails for a goroutine that is left.
func TestRunEnds(t *testing.T) {
	broken := errors.New("netlink is broken")
	for _, tt := range []struct {
		name string
		end  func(*bench)
		want error
	}{
		{"context", func(b *bench) { b.stop() }, context.Canceled},
		{"uevents", func(b *bench) { b.send(broken) }, broken},
		{"xenstore", func(b *bench) { b.store.Hangup(self) }, io.EOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				b.attachQuietly(hdc, "one")
				b.run()
				tt.end(b)
				if err := <-b.ended; !errors.Is(err, tt.want) {
					t.Errorf("Run: %v, want %v", err, tt.want)
				}
				if n := b.events.waiting.Load(); n != 0 {
					t.Error("Run did not wait for its goroutines")
				}
				if n := b.store.Watches(self); n != 0 {
					t.Errorf("%d watches are left", n)
				}
				b.wantClosed()
			})
		})
	}
}

// Without a watch there is nothing to run.
func TestRunWithoutWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.store.SetFaults(xenstoretest.Faults{Fail: func(op, path string) syscall.Errno {
			if op == "watch" {
				return syscall.ENOSPC
			}
			return 0
		}})
		if err := b.keeper.Run(t.Context(), b.qemu); !errors.Is(err, syscall.ENOSPC) {
			t.Errorf("Run: %v, want ENOSPC", err)
		}
	})
}
