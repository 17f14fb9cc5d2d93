//go:build integration

package media

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stubinit/stubinit/internal/qemu"
	"github.com/stubinit/stubinit/internal/qmp"
)

// A realQEMU runs a PC with an empty CD-ROM drive. The agent's monitor stays connected; the toolstack connects for each operation.
type realQEMU struct {
	t         *testing.T
	ctx       context.Context
	pid       int
	agent     *qmp.Monitor
	toolstack string // path of its socket
}

func listen(t *testing.T, path string) *os.File {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	defer ln.Close()
	f, err := ln.File()
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func startQEMU(t *testing.T, sets []Set) *realQEMU {
	t.Helper()
	binary, err := qemu.Find()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	q := &realQEMU{t: t, toolstack: dir + "/toolstack"}
	var cancel context.CancelFunc
	q.ctx, cancel = context.WithTimeout(context.Background(), time.Minute)
	files := []*os.File{listen(t, dir+"/agent"), listen(t, q.toolstack)}
	args := []string{"-M", "pc", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none",
		"-device", "ide-cd,id=ide-5632,bus=ide.1",
		"-chardev", "socket,id=a,fd=3,server=on,wait=off", "-mon", "chardev=a,mode=control",
		"-chardev", "socket,id=t,fd=4,server=on,wait=off", "-mon", "chardev=t,mode=control"}
	for i, s := range sets {
		args = append(args, "-add-fd", fmt.Sprintf("fd=%d,set=%d,opaque=%s", 3+len(files), 2+i, s.Opaque))
		files = append(files, s.File)
	}
	cmd := exec.CommandContext(q.ctx, binary, args...)
	cmd.ExtraFiles = files
	cmd.Stderr = t.Output()
	err = cmd.Start()
	for _, f := range files {
		f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel() // kills it
		cmd.Wait()
	})
	q.pid = cmd.Process.Pid
	q.agent = q.connect(dir + "/agent")
	t.Cleanup(func() { q.agent.Disconnect() })
	return q
}

func (q *realQEMU) connect(path string) *qmp.Monitor {
	q.t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		q.t.Fatal(err)
	}
	m := qmp.New(conn)
	if err := m.ConnectContext(q.ctx); err != nil {
		q.t.Fatal(err)
	}
	return m
}

// session runs one command in a session of its own, as libxl does.
func (q *realQEMU) session(command string, args any) json.RawMessage {
	q.t.Helper()
	m := q.connect(q.toolstack)
	defer m.Disconnect()
	answer, err := m.Execute(q.ctx, command, args)
	if err != nil {
		q.t.Fatal(err)
	}
	return answer
}

// find gives the fdset of an opaque, as libxl looks for it; -1 is none.
func (q *realQEMU) find(opaque string) int64 {
	q.t.Helper()
	var sets []struct {
		ID  int64 `json:"fdset-id"`
		FDs []struct {
			Opaque string `json:"opaque"`
		} `json:"fds"`
	}
	if err := json.Unmarshal(q.session("query-fdsets", nil), &sets); err != nil {
		q.t.Fatal(err)
	}
	for _, s := range sets {
		for _, fd := range s.FDs {
			if fd.Opaque == opaque {
				return s.ID
			}
		}
	}
	return -1
}

// poll is libxl's wait for the set.
func (q *realQEMU) poll(opaque string) int64 {
	q.t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if id := q.find(opaque); id >= 0 {
			return id
		}
	}
	q.t.Fatalf("no fdset %s", opaque)
	return -1
}

// release is the first half of a change: eject, remove-fd. QEMU then has no descriptor of the disk, or the PV detach would fail.
func (q *realQEMU) release(devid int) {
	q.t.Helper()
	q.session("eject", map[string]any{"id": fmt.Sprint("ide-", devid), "force": true})
	q.session("remove-fd", map[string]any{"fdset-id": q.find(Opaque(devid))})
}

// disks counts QEMU's descriptors of files below dir, and of all but sockets: the last session's may be closing still.
func (q *realQEMU) disks(dir string) (below, all int) {
	q.t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", q.pid))
	if err != nil {
		q.t.Fatal(err)
	}
	for _, e := range entries {
		path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", q.pid, e.Name()))
		if err != nil || strings.HasPrefix(path, "socket:") {
			continue
		}
		all++
		if strings.HasPrefix(path, dir) {
			below++
		}
	}
	return below, all
}

// Ten changes, every third an eject, against a real QEMU: no descriptor is in the way of a detach or stays.
func TestRealQEMU(t *testing.T) {
	store, events := newRealBench(t)
	sets, err := store.keeper.Initial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	q := startQEMU(t, sets)
	stop := store.runReal(q.agent)
	if id := q.find(Opaque(hdc)); id != 2 {
		t.Errorf("the initial set is %d, want 2", id)
	}
	_, before := q.disks(store.dir)
	for i := range 10 {
		q.release(hdc)
		if n, _ := q.disks(store.dir); n != 0 {
			t.Fatalf("change %d: QEMU holds %d descriptors of the disk", i, n)
		}
		store.wantClosed()
		store.noDisk(hdc)
		medium := strings.Repeat(fmt.Sprint(i), 64<<10)
		if i%3 == 1 {
			medium = ""
		}
		store.disk(hdc, medium)
		events <- blockEvent
		set := q.poll(Opaque(hdc))
		if medium != "" {
			q.session("blockdev-change-medium", map[string]any{"id": "ide-5632", "filename": fmt.Sprint("/dev/fdset/", set), "format": "raw"})
			if info := string(q.session("query-block", nil)); !strings.Contains(info, fmt.Sprintf("/dev/fdset/%d", set)) {
				t.Errorf("change %d: the medium is not there: %s", i, info)
			}
		}
	}
	q.release(hdc)
	if _, after := q.disks(store.dir); after != before-1 { // the set's member
		t.Errorf("QEMU has %d descriptors after ten changes, had %d with one set", after, before)
	}
	stop()
}

// While QEMU is stopped a removed set's descriptors go at once from 9.1 on; before, they stay until it runs and a monitor closes.
// xl pause does not stop QEMU.
func TestRealQEMUStopped(t *testing.T) {
	store, _ := newRealBench(t)
	sets, err := store.keeper.Initial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	q := startQEMU(t, sets)
	defer store.runReal(q.agent)()
	q.session("stop", nil)
	q.release(hdc)
	want := 0
	if v := q.agent.Version().QEMU; v.Major < 9 || v.Major == 9 && v.Minor < 1 {
		want = 1
	}
	if n, _ := q.disks(store.dir); n != want {
		t.Errorf("QEMU %+v, stopped, holds %d descriptors of a removed set, want %d", q.agent.Version().QEMU, n, want)
	}
	q.session("cont", nil)
	q.session("query-status", nil)
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		n, _ := q.disks(store.dir)
		if n == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("QEMU runs and holds %d descriptors of a removed set", n)
		}
		q.session("query-status", nil)
	}
}

// newRealBench has one drive with a medium.
func newRealBench(t *testing.T) (*bench, chan<- any) {
	b := newBench(t)
	dir, err := filepath.EvalSymlinks(b.dir) // as /proc shows it
	if err != nil {
		t.Fatal(err)
	}
	b.dir = dir
	b.attachQuietly(hdc, strings.Repeat("x", 64<<10))
	return b, b.events.c
}

// runReal runs the keeper until stop.
func (b *bench) runReal(m Monitor) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	go func() { b.ended <- b.keeper.Run(ctx, m) }()
	return func() {
		cancel()
		<-b.ended
		if b.t.Failed() {
			b.t.Log(b.log)
		}
	}
}
