package peer

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// wire is one end of a link in memory that can lose and spoil frames.
type wire struct {
	out, in chan []byte
	closed  chan struct{}
	once    sync.Once
	mu      sync.Mutex
	change  func(frame []byte) []byte // nil: lost
}

func newWire() (*wire, *wire) {
	a, b := make(chan []byte, 1024), make(chan []byte, 1024)
	return &wire{out: a, in: b, closed: make(chan struct{})}, &wire{out: b, in: a, closed: make(chan struct{})}
}

func (w *wire) ReadFrame(b []byte) (int, bool, error) {
	select {
	case frame := <-w.in:
		return copy(b, frame), false, nil
	case <-w.closed:
		return 0, false, os.ErrClosed
	}
}

func (w *wire) WriteFrame(frame []byte) error {
	frame = append([]byte(nil), frame...)
	w.mu.Lock()
	if w.change != nil {
		frame = w.change(frame)
	}
	w.mu.Unlock()
	if frame == nil {
		return nil
	}
	select {
	case w.out <- frame:
	default: // the other side is behind: lost
	}
	return nil
}

func (w *wire) Close() error {
	w.once.Do(func() { close(w.closed) })
	return nil
}

var (
	macA, macB = net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	ipA, ipB   = netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
)

// pair is two hosts on a wire; change, if any, applies to both directions.
func pair(t *testing.T, mtu int, change func([]byte) []byte) (*Host, *Host) {
	t.Helper()
	wa, wb := newWire()
	wa.change, wb.change = change, change
	a, b := NewHost(wa, Config{macA, ipA, mtu}), NewHost(wb, Config{macB, ipB, mtu})
	t.Cleanup(func() {
		for _, h := range []*Host{a, b} {
			if err := h.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	return a, b
}

func deadline(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestPattern(t *testing.T) {
	// Any part made alone is the same as in the whole.
	whole := make([]byte, 4096)
	Pattern(7, 0, whole)
	for _, span := range [][2]int{{0, 1}, {1, 2}, {3, 9}, {4, 8}, {510, 1027}, {4095, 4096}} {
		part := make([]byte, span[1]-span[0])
		Pattern(7, uint64(span[0]), part)
		if diff := cmp.Diff(whole[span[0]:span[1]], part); diff != "" {
			t.Errorf("bytes %v made alone differ (-want +got):\n%s", span, diff)
		}
	}
	if got, want := PatternCRC(7, 100, 3000), crc32.ChecksumIEEE(whole[100:3100]); got != want {
		t.Errorf("PatternCRC = %08x, want %08x", got, want)
	}
	// Seen from the guest: `ata 0 write 2048 1000 7` answered with this CRC.
	if got := PatternCRC(7, 2048*512, 1000*512); got != 0xcdd7ab86 {
		t.Errorf("1000 sectors of seed 7 from LBA 2048 on: CRC %08x, the guest's is cdd7ab86", got)
	}
}

func TestGoldenFrames(t *testing.T) {
	h := &Host{cfg: Config{macA, ipA, 1500}}
	for _, test := range []struct {
		name string
		got  []byte
		want string
	}{
		{"ARP request", appendARP(appendEther(nil, macB, macA, typeARP), 1, macA, ipA, make([]byte, 6), ipB),
			"020000000002 020000000001 0806 0001 0800 06 04 0001 020000000001 0a000001 000000000000 0a000002"},
		{"UDP", h.udpFrame(macB, 49153, netip.AddrPortFrom(ipB, 7), []byte("abc")),
			"020000000002 020000000001 0800 4500001f 00004000 401126cc 0a000001 0a000002 c0010007000b 676a 616263"},
		{"ICMP echo", appendEcho(nil, 8, []byte{0, 1, 0, 2, 0xff}), "0800 f8fb 0001 0002 ff"},
		{"bulk header", header{bulkData, flagAnswer, 1448, 0x01020304, 5, 6, 0xdeadbeef}.append(nil),
			"53424c4b 02 01 05a8 01020304 00000005 00000006 deadbeef"},
	} {
		want, err := hex.DecodeString(strings.ReplaceAll(test.want, " ", ""))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, test.got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

func TestHost(t *testing.T) {
	a, b := pair(t, 1500, nil)
	ctx := deadline(t, 20*time.Second)
	for _, size := range []int{0, 1, 56, 1472} {
		if _, err := a.Ping(ctx, ipB, size); err != nil {
			t.Error(err)
		}
		if err := b.Echo(ctx, ipA, size, 9); err != nil {
			t.Error(err)
		}
	}
	if _, err := a.Ping(ctx, ipB, 1473); err == nil || !strings.Contains(err.Error(), "MTU") {
		t.Errorf("a ping larger than the MTU: %v", err)
	}
	if err := a.Echo(ctx, ipB, 1473, 9); err == nil || !strings.Contains(err.Error(), "MTU") {
		t.Errorf("a datagram larger than the MTU: %v", err)
	}
	if _, err := a.Ping(deadline(t, 20*time.Millisecond), netip.MustParseAddr("10.0.0.9"), 0); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a ping to nobody: %v", err)
	}

	// Frames other than IP, taken by type and in order.
	frame := func(etherType uint16, n byte) []byte { return append(appendEther(nil, macB, macA, etherType), n) }
	for n := range byte(3) {
		for _, etherType := range []uint16{0x888e, 0x8100} {
			if err := a.SendFrame(frame(etherType, n)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, etherType := range []uint16{0x8100, 0x888e} {
		for n := range byte(3) {
			got, err := b.Frame(ctx, etherType)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(frame(etherType, n), got); diff != "" {
				t.Errorf("frame (-want +got):\n%s", diff)
			}
		}
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Frame(ctx, 0x88cc); !errors.Is(err, os.ErrClosed) {
		t.Errorf("waiting on a closed host: %v", err)
	}
}

func TestBulk(t *testing.T) {
	source := rand.New(rand.NewPCG(1, 2))
	lossy := func(frame []byte) []byte {
		switch n := source.IntN(100); {
		case n < 5:
			return nil
		case n < 8:
			frame[len(frame)-1] ^= 0x10 // UDP's checksum finds it
		}
		return frame
	}
	var mu sync.Mutex // source is shared by both directions
	for _, test := range []struct {
		name   string
		mtu    int
		size   uint32
		change func([]byte) []byte
	}{
		{"empty", 1500, 0, nil},
		{"one byte", 1500, 1, nil},
		{"one segment", 1500, 1448, nil},
		{"several", 1500, 300_001, nil},
		{"jumbo", 9000, 2_000_000, nil},
		{"lossy", 1500, 60_000, func(f []byte) []byte { mu.Lock(); defer mu.Unlock(); return lossy(f) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			a, b := pair(t, test.mtu, test.change)
			ctx := deadline(t, 50*time.Second)
			var sent, received Transfer
			var sendErr, receiveErr error
			var wg sync.WaitGroup
			wg.Go(func() { sent, sendErr = a.Send(ctx, ipB, 7001, test.size, 3) })
			wg.Go(func() { received, receiveErr = b.Receive(ctx, 7001) })
			wg.Wait()
			if sendErr != nil || receiveErr != nil {
				t.Fatal(sendErr, receiveErr)
			}
			want := PatternCRC(3, 0, uint64(test.size))
			if sent.Bytes != test.size || sent.CRC != want || received.Bytes != test.size || received.CRC != want {
				t.Errorf("sent %+v, received %+v, want %d bytes with CRC %08x", sent, received, test.size, want)
			}
			if test.change != nil && sent.Resent == 0 {
				t.Error("frames were lost and none was sent again")
			}
		})
	}
}

// A receiver whose data differ from the sender's is an error on both sides.
func TestBulkWrongCRC(t *testing.T) {
	a, b := pair(t, 1500, func(frame []byte) []byte {
		// Spoil the payload of a DATA segment and set the UDP checksum to "none".
		if p := etherSize + ipSize + udpSize; len(frame) > p+bulkHeaderSize && frame[p+4] == bulkData {
			frame[p+bulkHeaderSize] ^= 1
			binary.BigEndian.PutUint16(frame[etherSize+ipSize+6:], 0)
		}
		return frame
	})
	ctx := deadline(t, 20*time.Second)
	var wg sync.WaitGroup
	wg.Go(func() {
		if _, err := b.Receive(ctx, 1); err == nil || !strings.Contains(err.Error(), "CRC") {
			t.Errorf("receiver: %v", err)
		}
	})
	if _, err := a.Send(ctx, ipB, 1, 100, 1); err == nil || !strings.Contains(err.Error(), "CRC") {
		t.Errorf("sender: %v", err)
	}
	wg.Wait()
}

func TestBulkNobody(t *testing.T) {
	a, b := pair(t, 1500, nil)
	if _, err := a.Send(deadline(t, 50*time.Millisecond), ipB, 1, 100, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("sender without a receiver: %v", err)
	}
	if _, err := b.Receive(deadline(t, 20*time.Millisecond), 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("receiver without a sender: %v", err)
	}
	if got := b.Stats(); got.Unclaimed == 0 {
		t.Errorf("the datagrams to nobody are not counted: %+v", got)
	}
}

func TestReceiveCountsWhatIsWrong(t *testing.T) {
	h := &Host{cfg: Config{macA, ipA, 1500}, changed: make(chan struct{}), neigh: map[netip.Addr]net.HardwareAddr{},
		pongs: map[uint16][]byte{}, ports: map[uint16]chan datagram{}, finished: map[uint32]header{}}
	other := &Host{cfg: Config{macB, ipB, 1500}}
	good := other.udpFrame(macA, 1, netip.AddrPortFrom(ipA, 2), []byte("data"))
	spoil := func(at int) []byte {
		f := append([]byte(nil), good...)
		f[at] ^= 1
		return f
	}
	for _, frame := range [][]byte{
		good, good[:10], good[:etherSize+ipSize-1], good[:len(good)-1], spoil(len(good) - 1), spoil(etherSize + 8), spoil(etherSize),
		spoil(5), append([]byte(nil), appendEther(nil, macA, macB, typeARP)...), appendEther(nil, macA, macB, typeIPv6),
		append(appendEther(nil, net.HardwareAddr{1, 0, 0x5e, 0, 0, 0x16}, macB, typeIPv4), 0x46), // IGMP has an IP option
	} {
		h.dispatch(frame, false)
	}
	h.dispatch(spoil(len(good)-1), true)
	want := Stats{Frames: 12, UDP: 2, Unclaimed: 2, Malformed: 5, BadChecksum: 2, PartialChecksum: 1}
	if diff := cmp.Diff(want, h.Stats()); diff != "" {
		t.Errorf("counts (-want +got):\n%s", diff)
	}
}

// No frame may make a host fall over; what it answers must be a frame.
func FuzzDispatch(f *testing.F) {
	other := &Host{cfg: Config{macB, ipB, 1500}}
	f.Add(appendARP(appendEther(nil, macA, macB, typeARP), 1, macB, ipB, make([]byte, 6), ipA), false)
	f.Add(other.udpFrame(macA, 1, netip.AddrPortFrom(ipA, echoPort), []byte("data")), false)
	f.Add(other.udpFrame(macA, 1, netip.AddrPortFrom(ipA, 9), header{kind: bulkFin, session: 5}.append(nil)), true)
	echo := appendEcho(nil, 8, []byte{0, 1, 0, 2})
	f.Add(append(appendIPv4(appendEther(nil, macA, macB, typeIPv4), ipB, ipA, protocolICMP, len(echo)), echo...), false)
	f.Fuzz(func(t *testing.T, frame []byte, partial bool) {
		h := &Host{cfg: Config{macA, ipA, 1500}, changed: make(chan struct{}), neigh: map[netip.Addr]net.HardwareAddr{},
			pongs: map[uint16][]byte{}, ports: map[uint16]chan datagram{9: make(chan datagram, 1)},
			finished: map[uint32]header{5: {kind: bulkFinAck, session: 5}}}
		if answer := h.dispatch(frame, partial); answer != nil && (len(answer) < etherSize || net.HardwareAddr(answer[6:12]).String() != macA.String()) {
			t.Errorf("answer %x", answer)
		}
	})
}

func FuzzParseHeader(f *testing.F) {
	f.Add(header{bulkOpen, flagAnswer, 1448, 1, 2, 3, 4}.append(nil))
	f.Add([]byte("SBLK"))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, payload, err := parseHeader(b)
		if err != nil {
			return
		}
		if got := append(h.append(nil), payload...); string(got) != string(b) {
			t.Errorf("%x is written back as %x", b, got)
		}
	})
}
