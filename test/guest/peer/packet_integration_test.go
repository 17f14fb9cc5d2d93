//go:build integration

package peer

import (
	"encoding/hex"
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Two hosts on the ends of a veth pair in a network namespace of their own.
func vethPair(t *testing.T) (*Host, *Host) {
	t.Helper()
	runtime.LockOSThread() // the thread ends with the test, and the namespace with its last socket
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("new network namespace (run as root): %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "left", 9000
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "right", PeerMTU: 9000}); err != nil {
		t.Fatal(err)
	}
	open := func(name string, cfg Config) *Host {
		dev, err := netlink.LinkByName(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := netlink.LinkSetUp(dev); err != nil {
			t.Fatal(err)
		}
		link, err := OpenPacket(name)
		if err != nil {
			t.Fatal(err)
		}
		h := NewHost(link, cfg)
		t.Cleanup(func() {
			if err := h.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
				t.Error(err)
			}
		})
		return h
	}
	return open("left", Config{macA, ipA, 9000}), open("right", Config{macB, ipB, 9000})
}

func TestPacketSockets(t *testing.T) {
	a, b := vethPair(t)
	ctx := deadline(t, time.Minute)
	for _, size := range []int{0, 1472, 8972} {
		if _, err := a.Ping(ctx, ipB, size); err != nil {
			t.Fatal(err)
		}
	}
	const size = 3 << 20
	var wg sync.WaitGroup
	wg.Go(func() {
		if got, err := b.Receive(ctx, 7001); err != nil || got.CRC != PatternCRC(8, 0, size) {
			t.Errorf("receive: %+v, %v", got, err)
		}
	})
	got, err := a.Send(ctx, ipB, 7001, size, 8)
	wg.Wait()
	if err != nil || got.CRC != PatternCRC(8, 0, size) {
		t.Errorf("send: %+v, %v", got, err)
	}
	for name, head := range map[string]string{
		"802.1X": "0180c2000003020000000001888e0100",
		"LLDP":   "0180c200000e02000000000188cc0207",
		"VLAN":   "02000000000202000000000181000064080045",
	} {
		frame, err := hex.DecodeString(head)
		if err != nil {
			t.Fatal(err)
		}
		frame = append(frame, make([]byte, 64)...)
		if err := a.SendFrame(frame); err != nil {
			t.Fatal(err)
		}
		got, err := b.Frame(ctx, uint16(frame[12])<<8|uint16(frame[13]))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(frame, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
	if s := b.Stats(); s.BadChecksum != 0 || s.Malformed != 0 {
		t.Errorf("bad packets: %+v", s)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Frame(ctx, 0x888e); !errors.Is(err, os.ErrClosed) {
		t.Errorf("waiting on a closed host: %v", err)
	}
}

func TestOpenPacketMissing(t *testing.T) {
	if _, err := OpenPacket("no-such-if"); err == nil {
		t.Error("an interface that does not exist was opened")
	}
}
