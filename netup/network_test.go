package netup

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// fakeStore is a xenstore of a few nodes that notes what is done to it.
type fakeStore struct {
	mu    sync.Mutex
	nodes map[string]string
	err   map[string]error // by operation
	done  []string
	wake  chan struct{} // closed at the next set; nil while nobody waits
	seen  chan<- bool   // told when WaitFor has called ok, unless nil
}

func (s *fakeStore) set(path, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.nodes[path] = value
	if s.wake != nil {
		close(s.wake)
		s.wake = nil
	}
}

func (s *fakeStore) WaitFor(ctx context.Context, path string, ok func(string, bool) bool) (string, error) {
	for {
		s.mu.Lock()
		v, exists := s.nodes[path]
		if s.wake == nil {
			s.wake = make(chan struct{})
		}
		wake := s.wake
		s.mu.Unlock()
		done := ok(v, exists)
		if s.seen != nil {
			s.seen <- done
		}
		if done {
			return v, nil
		}
		select {
		case <-wake:
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}

func (s *fakeStore) op(name, path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done = append(s.done, name+" "+path)
	if err := s.err[name]; err != nil {
		return fmt.Errorf("%s %s: %w", name, path, err)
	}
	return nil
}

func (s *fakeStore) Read(_ context.Context, path string) (string, error) {
	s.mu.Lock()
	v, ok := s.nodes[path]
	s.mu.Unlock()
	if ok {
		return v, s.op("read", path)
	}
	return "", fmt.Errorf("read %s: %w", path, syscall.ENOENT)
}

func (s *fakeStore) Write(_ context.Context, path, value string) error {
	return s.op("write", path+"="+value)
}

func (s *fakeStore) Remove(_ context.Context, path string) error { return s.op("remove", path) }

// fakeSys makes a sysfs with vif's driver, whose unbind is a file that takes anything.
func fakeSys(t *testing.T) (sys, unbind string) {
	sys = t.TempDir()
	unbind = filepath.Join(sys, "bus/xen/drivers/vif/unbind")
	if err := os.MkdirAll(filepath.Dir(unbind), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(unbind, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return sys, unbind
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func openNetwork(t *testing.T, opts Options) *Network {
	t.Helper()
	if opts.Log == nil {
		opts.Log = quiet()
	}
	n, err := New(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.Close() })
	return n
}

func TestCloseVif(t *testing.T) {
	for _, tt := range []struct {
		name  string
		state string
		err   map[string]error
		want  []string
		fails error
	}{
		{"the driver has closed it", "6", nil, []string{"read device/vif/2/state", "remove device/vif/2"}, nil},
		{"no driver had it", "1", nil, []string{"read device/vif/2/state", "write device/vif/2/state=6", "remove device/vif/2"}, nil},
		{"removed before", "", nil, nil, nil},
		{"may not be removed", "6", map[string]error{"remove": syscall.EACCES}, []string{"read device/vif/2/state", "remove device/vif/2"}, nil},
		{"xenstore fails", "6", map[string]error{"remove": syscall.EIO}, []string{"read device/vif/2/state", "remove device/vif/2"}, syscall.EIO},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sys, unbind := fakeSys(t)
			store := &fakeStore{nodes: make(map[string]string), err: tt.err}
			if tt.state != "" {
				store.nodes["device/vif/2/state"] = tt.state
			}
			n := openNetwork(t, Options{Store: store, Sys: sys})
			if err := n.closeVif(t.Context(), &port{NIC: NIC{Vif: 2}}); !errors.Is(err, tt.fails) {
				t.Errorf("closeVif: %v, want %v", err, tt.fails)
			}
			if d := cmp.Diff(tt.want, store.done); d != "" {
				t.Error(d)
			}
			if got, err := os.ReadFile(unbind); err != nil || string(got) != "vif-2" {
				t.Errorf("unbind got %q, %v", got, err)
			}
		})
	}
}

// A NIC is up when its vif's link has a carrier and the vif's backend has connected, whichever is first.
func TestUpWithBackendAndCarrier(t *testing.T) {
	const state = "/backend/state"
	var log bytes.Buffer // guarded by the network's mutex, which report is called with
	store := &fakeStore{nodes: map[string]string{state: "2"}}
	up := 0 // likewise
	n := openNetwork(t, Options{Store: store, Log: slog.New(slog.NewTextHandler(&log, nil)), Up: func(nic string) {
		up++
		if nic != "nic0" {
			t.Errorf("Up(%q), want nic0", nic)
		}
	}})
	p := &port{NIC: NIC{ID: "nic0", Backend: "/backend"}, link: "eth0", index: 7}
	n.ports = []*port{p}
	seen := make(chan bool, 16)
	store.seen = seen
	var wg sync.WaitGroup
	wg.Go(func() { n.followBackend(t.Context(), p, time.Now()) })
	<-seen

	set := func(value string) func() { return func() { store.set(state, value); <-seen } }
	carrier := func(l link) func() {
		return func() {
			l.index = p.index
			n.see(l, time.Now())
		}
	}
	for _, step := range []struct {
		name string
		do   func()
		want string // in the log
	}{
		{"carrier, and the backend waits", carrier(link{running: true}), ""},
		{"backend connects", set(stateConnected), "level=INFO msg=\"NIC's link is up\" nic=nic0 link=eth0"},
		{"carrier lost", carrier(link{}), "level=WARN msg=\"NIC's link is down\""},
		{"carrier again", carrier(link{running: true}), "level=INFO msg=\"NIC's link is up\""},
		{"backend closes", set("5"), "level=WARN msg=\"NIC's link is down\""},
		{"backend connects again", set(stateConnected), "level=INFO msg=\"NIC's link is up\""},
		{"link gone", carrier(link{gone: true}), "level=WARN msg=\"vif is gone\" nic=nic0 link=eth0"},
		{"backend closes, unplugged", func() { n.unplugged("nic0"); store.set(state, stateClosed); <-seen }, ""},
	} {
		n.mu.Lock()
		log.Reset()
		n.mu.Unlock()
		step.do()
		n.mu.Lock()
		if got := log.String(); step.want == "" && got != "" || !strings.Contains(got, step.want) {
			t.Errorf("%s: log %q, want %q", step.name, got, step.want)
		}
		n.mu.Unlock()
	}
	wg.Wait() // nothing is followed after an unplug
	if up != 3 {
		t.Errorf("Up was called %d times, want 3", up)
	}
}

func TestUnbindWithoutDriver(t *testing.T) {
	n := openNetwork(t, Options{Sys: t.TempDir()})
	if err := n.unbind(t.Context(), &port{}); err != nil {
		t.Error(err)
	}
}

func TestUnbindFailsThenWorks(t *testing.T) {
	sys, unbind := fakeSys(t)
	n := openNetwork(t, Options{Sys: sys})
	p := &port{NIC: NIC{Vif: 2}}
	if err := os.Remove(unbind); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(unbind, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := n.unbind(t.Context(), p); !errors.Is(err, syscall.EISDIR) || !strings.Contains(err.Error(), unbind) {
		t.Errorf("unbind: %v, want EISDIR of %s", err, unbind)
	}
	if err := os.Remove(unbind); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(unbind, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.unbind(t.Context(), p); err != nil {
		t.Error(err)
	}
}

// A backend that does not answer holds the write in the kernel. A FIFO that nobody reads does the same. When it answers at last, the
// frontend goes without a further call.
func TestUnbindIsBounded(t *testing.T) {
	sys, unbind := fakeSys(t)
	if err := os.Remove(unbind); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(unbind, 0o600); err != nil {
		t.Fatal(err)
	}
	store := &fakeStore{nodes: map[string]string{"device/vif/2/state": "6"}}
	var log bytes.Buffer
	n := openNetwork(t, Options{Sys: sys, Store: store, Log: slog.New(slog.NewTextHandler(&log, nil))})
	p := &port{NIC: NIC{ID: "nic1", Vif: 2, Backend: "/local/domain/5/backend/vif/8/2"}}
	for range 2 { // the second call waits for the same write
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		err := n.closeVif(ctx, p)
		cancel()
		if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), p.Backend) {
			t.Errorf("closeVif: %v, want a deadline that names the backend", err)
		}
	}
	f, err := os.Open(unbind)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := n.unbind(t.Context(), p); err != nil {
		t.Error(err)
	}
	buf := make([]byte, 64)
	if got, err := f.Read(buf); err != nil || string(buf[:got]) != "vif-2" {
		t.Errorf("unbind got %q, %v", buf[:got], err)
	}
	n.unbinds.Wait()
	if d := cmp.Diff([]string{"read device/vif/2/state", "remove device/vif/2"}, store.done); d != "" {
		t.Error(d)
	}
	if want := "has closed at last; its vif is gone\" nic=nic1"; !strings.Contains(log.String(), want) {
		t.Errorf("log %q, want %s", log.String(), want)
	}
}

func TestUnplugUnknown(t *testing.T) {
	n := openNetwork(t, Options{})
	n.ports = []*port{{NIC: NIC{Tap: "a"}}}
	for _, id := range []string{"", "nic9"} {
		if err := n.Unplug(t.Context(), id); !errors.Is(err, ErrNoNIC) {
			t.Errorf("Unplug(%q) = %v, want ErrNoNIC", id, err)
		}
	}
}

func TestMatchEqualAddresses(t *testing.T) {
	sys := t.TempDir()
	for link, dev := range map[string]string{"eth0": "vif-1", "eth1": "vif-0", "eth2": "vif-9"} {
		dir := filepath.Join(sys, "class/net", link)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink("../../../"+dev, filepath.Join(dir, "device")); err != nil {
			t.Fatal(err)
		}
	}
	n := openNetwork(t, Options{Sys: sys})
	a := mac("00:16:3e:00:00:01")
	n.ports = []*port{{NIC: NIC{Vif: 0, MAC: a}}, {NIC: NIC{Vif: 1, MAC: a}}, {NIC: NIC{Vif: NoVif, MAC: a}}}
	vifOf := func(name string) int {
		if p := n.match(link{index: 9, name: name, mac: a}); p != nil {
			return p.Vif
		}
		return NoVif
	}
	got := []int{vifOf("eth0"), vifOf("eth1"), vifOf("eth2"), vifOf("nosysfs")}
	if d := cmp.Diff([]int{1, 0, NoVif, 0}, got); d != "" {
		t.Error(d)
	}
	n.ports[0].index = 4
	got = []int{vifOf("eth0"), vifOf("eth1"), vifOf("nosysfs")}
	if d := cmp.Diff([]int{1, NoVif, 1}, got); d != "" {
		t.Errorf("one has joined: %s", d)
	}
}

// linkMessage is the payload of an rtnetlink message as the kernel writes it: struct ifinfomsg, then IFLA_IFNAME (3), IFLA_ADDRESS (1),
// IFLA_OPERSTATE (16) and IFLA_MTU (4), each padded to 4 bytes.
func linkMessage(family byte, flags uint32, operstate byte) []byte {
	ne := binary.NativeEndian
	b := []byte{family, 0, 1, 0}
	b = ne.AppendUint32(b, 7)
	b = ne.AppendUint32(b, flags)
	b = ne.AppendUint32(b, 0)
	b = ne.AppendUint16(ne.AppendUint16(b, 9), 3)
	b = append(b, "eth0\x00\x00\x00\x00"...)
	b = ne.AppendUint16(ne.AppendUint16(b, 10), 1)
	b = append(b, 0, 0x16, 0x3e, 0, 0, 1, 0, 0)
	b = ne.AppendUint16(ne.AppendUint16(b, 5), 16)
	b = append(b, operstate, 0, 0, 0)
	b = ne.AppendUint16(ne.AppendUint16(b, 8), 4)
	return ne.AppendUint32(b, 9000)
}

func TestParseLink(t *testing.T) {
	want := link{index: 7, name: "eth0", mac: mac("00:16:3e:00:00:01"), mtu: 9000}
	up := want
	up.up, up.running = true, true
	starting := want
	starting.up = true
	gone := want
	gone.gone = true
	for _, tt := range []struct {
		name string
		kind uint16
		msg  []byte
		want link
		ok   bool
	}{
		{"new", unix.RTM_NEWLINK, linkMessage(unix.AF_UNSPEC, 0, 2), want, true},
		{"up", unix.RTM_NEWLINK, linkMessage(unix.AF_UNSPEC, unix.IFF_UP|unix.IFF_RUNNING, 6), up, true},
		{"up, state not known yet", unix.RTM_NEWLINK, linkMessage(unix.AF_UNSPEC, unix.IFF_UP|unix.IFF_RUNNING, 0), starting, true},
		{"carrier of a link that is down", unix.RTM_NEWLINK, linkMessage(unix.AF_UNSPEC, 0, 6), want, true},
		{"gone", unix.RTM_DELLINK, linkMessage(unix.AF_UNSPEC, 0, 2), gone, true},
		{"a port left its bridge", unix.RTM_DELLINK, linkMessage(unix.AF_BRIDGE, 0, 6), link{}, false},
		{"an address", unix.RTM_NEWADDR, linkMessage(unix.AF_UNSPEC, 0, 2), link{}, false},
		{"short", unix.RTM_NEWLINK, make([]byte, 15), link{}, false},
		{"bad attribute", unix.RTM_NEWLINK, append(make([]byte, 16), 200, 0, 0, 0), link{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := parseLink(tt.kind, tt.msg)
			if ok != tt.ok {
				t.Errorf("ok = %v", ok)
			}
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(link{})); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestIoctlNumbers(t *testing.T) {
	// linux/if_tun.h and linux/sockios.h; the same on amd64 and arm64.
	got := []int{unix.TUNSETIFF, unix.TUNSETPERSIST, unix.TUNSETOWNER, unix.TUNSETGROUP, unix.SIOCGIFINDEX, tapFlags}
	want := []int{0x400454ca, 0x400454cb, 0x400454cc, 0x400454ce, 0x8933, 0x5002}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestErrorsNameTheLink(t *testing.T) {
	n := openNetwork(t, Options{})
	err := n.do(Op{Kind: SetPort, Link: "nosuchtap", MAC: mac("fe:ff:00:00:00:01"), Bridge: "nosuchbridge"})
	if !errors.Is(err, unix.ENODEV) {
		t.Errorf("%v is not ENODEV", err)
	}
	want := "set nosuchtap address fe:ff:00:00:00:01 master nosuchbridge up: ioctl SIOCGIFINDEX: no such device"
	if err == nil || err.Error() != want {
		t.Errorf("error %q, want %q", err, want)
	}
	if err := n.do(Op{Kind: 99}); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("unknown operation: %v", err)
	}
}
