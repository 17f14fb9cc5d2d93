package qmpbridge

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// A fakeStore is a xenstore whose nodes are all there, but those of late, which
// come after the time given.
type fakeStore struct {
	nodes map[string]string
	late  map[string]time.Duration
}

func (s fakeStore) Read(_ context.Context, path string) (string, error) {
	if v, ok := s.nodes[path]; ok && s.late[path] == 0 {
		return v, nil
	}
	return "", fmt.Errorf("read %s: %w", path, fs.ErrNotExist)
}

func (s fakeStore) List(_ context.Context, path string) (names []string, err error) {
	for p := range s.nodes {
		if dir, name := filepath.Split(p); dir == path+"/" {
			names = append(names, name)
		}
	}
	if names == nil {
		return nil, fmt.Errorf("list %s: %w", path, fs.ErrNotExist)
	}
	return names, nil
}

func (s fakeStore) WaitFor(ctx context.Context, path string, ok func(string, bool) bool) (string, error) {
	v, exists := s.nodes[path]
	if !exists || ok("", false) || !ok(v, true) {
		<-ctx.Done()
		return "", fmt.Errorf("wait for %s: %w", path, ctx.Err())
	}
	select {
	case <-time.After(s.late[path]):
		return v, nil
	case <-ctx.Done():
		return "", fmt.Errorf("wait for %s: %w", path, ctx.Err())
	}
}

// fakeUevents gives an event for each value of its channel.
type fakeUevents struct {
	events chan struct{}
	closed bool
}

func (u *fakeUevents) Until(ctx context.Context, ok func() bool) error {
	for !ok() {
		select {
		case <-u.events:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (u *fakeUevents) Close() error { u.closed = true; return nil }

const backend = "/local/domain/0/backend/pci/5/0"

func pciStore() fakeStore {
	return fakeStore{nodes: map[string]string{
		"device/pci/0/backend": backend,
		backend + "/state":     "4",
		backend + "/num_devs":  "3",
		backend + "/dev-0":     "0000:02:00.0",
		backend + "/vdev-0":    "0000:00:00.00",
		backend + "/dev-2":     "0000:03:00.1", // dev-1 was unplugged
		backend + "/vdev-2":    "0000:00:01.01",
		backend + "/dev-3":     "0000:04:1f.7",
	}}
}

func TestPCIReady(t *testing.T) {
	for _, tt := range []struct {
		name, hostaddr string
		change         func(*fakeStore)
		node           string        // comes in sysfs
		after          time.Duration // with an event
		want           time.Duration
		err            string // part of it, with %s for the sysfs root
	}{
		{name: "there already", hostaddr: "0000:03:00.1", node: "0000:00:01.1"},
		{name: "short form", hostaddr: "03:00.1", node: "0000:00:01.1"},
		{name: "comes later", hostaddr: "0000:03:00.1", node: "0000:00:01.1", after: 4600 * time.Millisecond, want: 4600 * time.Millisecond},
		{name: "backend is late", hostaddr: "02:00.0", node: "0000:00:00.0", want: 2 * time.Second,
			change: func(s *fakeStore) { s.late = map[string]time.Duration{backend + "/vdev-0": 2 * time.Second} }},
		{name: "another device comes", hostaddr: "0000:03:00.1", node: "0000:03:00.1", after: time.Second, want: 10 * time.Second,
			err: "PCI device 0000:03:00.1: %s/bus/pci/devices/0000:00:01.1/config has not come: context deadline exceeded"},
		{name: "backend gives no address", hostaddr: "04:1f.7", want: 10 * time.Second,
			err: "PCI device 0000:04:1f.7: wait for " + backend + "/vdev-3: context deadline exceeded"},
		{name: "not assigned", hostaddr: "0000:05:00.0", err: "PCI device 0000:05:00.0: not in xenstore: no dev-N of " + backend + " has it"},
		{name: "no frontend", hostaddr: "0000:03:00.1", change: func(s *fakeStore) { s.nodes = nil },
			err: "PCI device 0000:03:00.1: read device/pci/0/backend: file does not exist"},
		{name: "empty backend", hostaddr: "0000:03:00.1", change: func(s *fakeStore) { s.nodes["device/pci/0/backend"] = "" },
			err: "PCI device 0000:03:00.1: device/pci/0/backend is empty in xenstore"},
		{name: "bad address of ours", hostaddr: "02:00.0", change: func(s *fakeStore) { s.nodes[backend+"/vdev-0"] = "x" }, err: `"x" is not a PCI address`},
		{name: "bad address", hostaddr: "eth0", err: `"eth0" is not a PCI address such as 0000:03:00.0`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sysfs := t.TempDir()
			synctest.Test(t, func(t *testing.T) {
				come := func() {
					dir := filepath.Join(sysfs, "bus/pci/devices", tt.node)
					if err := os.MkdirAll(dir, 0o755); err != nil {
						t.Error(err)
					}
					if err := os.WriteFile(filepath.Join(dir, "config"), make([]byte, 256), 0o644); err != nil {
						t.Error(err)
					}
				}
				store := pciStore()
				if tt.change != nil {
					tt.change(&store)
				}
				u := &fakeUevents{events: make(chan struct{}, 1)}
				listened := false
				p := &PCI{Xenstore: store, Sysfs: sysfs, Listen: func() (Uevents, error) { listened = true; return u, nil }}
				switch {
				case tt.node == "":
				case tt.after == 0:
					come()
				default:
					u.events <- struct{}{} // of something else
					time.AfterFunc(tt.after, func() { come(); u.events <- struct{}{} })
				}
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				defer cancel()
				start := time.Now()
				err := p.Ready(ctx, tt.hostaddr)
				if took := time.Since(start); took != tt.want {
					t.Errorf("took %v, want %v", took, tt.want)
				}
				want := tt.err
				if strings.Contains(want, "%s") {
					want = fmt.Sprintf(want, sysfs)
				}
				if got := fmt.Sprint(err); (err == nil) != (want == "") || !strings.Contains(got, want) {
					t.Errorf("error %q, want %q", got, want)
				}
				if listened && !u.closed {
					t.Error("the listener was not closed")
				}
			})
		})
	}
}

func TestPCINoUevents(t *testing.T) {
	broken := errors.New("uevents: socket: operation not permitted")
	p := &PCI{Xenstore: pciStore(), Sysfs: t.TempDir(), Listen: func() (Uevents, error) { return nil, broken }}
	if err := p.Ready(t.Context(), "03:00.1"); !errors.Is(err, broken) {
		t.Errorf("got %v, want %v", err, broken)
	}
}

func TestParseBDF(t *testing.T) {
	for in, want := range map[string]string{
		"0000:03:00.0": "0000:03:00.0", "03:00.0": "0000:03:00.0", "0000:00:1f.07": "0000:00:1f.7", "10000:E1:00.1": "10000:e1:00.1",
		"": "", "03": "", "03:00": "", "03:20.0": "", "03:00.8": "", "100:00.0": "", "0:0:0:0.0": "", "x3:00.0": "", "03:00.0,permissive=1": "", "-1:00.0": "",
	} {
		got, err := parseBDF(in)
		if (err == nil) != (want != "") || err == nil && got.String() != want {
			t.Errorf("%q: %v, %v; want %q", in, got, err, want)
		}
	}
}
