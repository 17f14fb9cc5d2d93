//go:build integration

package netup

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// newNetns moves the test, and nothing else, to a network namespace of its own, which goes with the test's thread.
func newNetns(t testing.TB) {
	t.Helper()
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		t.Fatalf("unshare the network namespace (run as root, on a kernel with CONFIG_NET_NS): %v", err)
	}
	if _, err := os.Stat(tunDevice); err != nil {
		t.Fatalf("%v (load the module tun)", err)
	}
}

// lines passes log lines on, "LEVEL message key=value…".
type lines struct {
	slog.Handler
	ch chan string
}

func newLines() lines {
	l := lines{ch: make(chan string, 1000)}
	l.Handler = slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug, ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}})
	return l
}

func (l lines) Write(b []byte) (int, error) {
	l.ch <- string(b)
	return len(b), nil
}

// wait returns the next line that holds all the words.
func (l lines) wait(t testing.TB, words ...string) string {
	t.Helper()
	limit := time.After(20 * time.Second)
next:
	for {
		select {
		case line := <-l.ch:
			for _, w := range words {
				if !strings.Contains(line, w) {
					continue next
				}
			}
			return line // earlier ones are passed over
		case <-limit:
			t.Fatalf("no line with %q was logged", words)
		}
	}
}

func descriptors(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// lab is a network of n NICs, running.
type lab struct {
	*Network
	nics  []NIC
	log   lines
	store *fakeStore
	sys   string
}

func guestMAC(i int) net.HardwareAddr { return net.HardwareAddr{0, 0x16, 0x3e, 0, 0, byte(i + 1)} }

func makePlan(t testing.TB, count, mtu int) []NIC {
	t.Helper()
	var vifs []Vif
	var args []string
	for i := range count {
		vifs = append(vifs, Vif{ID: i, MAC: guestMAC(i), MTU: mtu, Backend: fmt.Sprintf("/local/domain/0/backend/vif/8/%d", i)})
		args = append(args, "-device", fmt.Sprintf("e1000,id=nic%d,netdev=net%d,mac=%s", i, i, guestMAC(i)),
			"-netdev", fmt.Sprintf("type=tap,id=net%d,ifname=vif7.%d-emu,script=no,downscript=no", i, i))
	}
	nics, err := Plan(vifs, args)
	if err != nil {
		t.Fatal(err)
	}
	return nics
}

// connected is a xenstore where the backends of makePlan's vifs have connected.
func connected(count int) *fakeStore {
	s := &fakeStore{nodes: make(map[string]string)}
	for i := range count {
		s.nodes[backendState(i)] = stateConnected
	}
	return s
}

func backendState(i int) string { return fmt.Sprintf("/local/domain/0/backend/vif/8/%d/state", i) }

func setup(t *testing.T, count, mtu int, change func(*Options)) *lab {
	t.Helper()
	newNetns(t)
	l := &lab{nics: makePlan(t, count, mtu), log: newLines(), store: connected(count)}
	l.sys, _ = fakeSys(t)
	for i := range count {
		l.store.nodes[fmt.Sprintf("device/vif/%d/state", i)] = stateClosed
	}
	opts := Options{Log: slog.New(l.log), Store: l.store, Sys: l.sys}
	if change != nil {
		change(&opts)
	}
	before, goroutines := descriptors(t), runtime.NumGoroutine()
	var err error
	if l.Network, err = New(opts); err != nil {
		t.Fatal(err)
	}
	if err := l.Setup(t.Context(), l.nics); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- l.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		l.Close()
		if after := descriptors(t); after > before {
			t.Errorf("%d descriptors before, %d after", before, after)
		}
		// They may still be on their way out after they have given their last result.
		for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > goroutines; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Errorf("%d goroutines before, %d after", goroutines, runtime.NumGoroutine())
				break
			}
		}
	})
	return l
}

// tap is a descriptor of a tap as QEMU has it: frames come and go behind a struct virtio_net_hdr of 10 bytes.
type tap struct{ *os.File }

const vnetHeader = 10

func openAs(t testing.TB, name string) tap {
	t.Helper()
	fd, err := openTap(name, tapFlags|unix.IFF_ONE_QUEUE)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	f := tap{os.NewFile(uintptr(fd), tunDevice)}
	t.Cleanup(func() { f.Close() })
	f.offload(t, 0)
	return f
}

// offload says what frames the reader takes (TUN_F_…).
func (f tap) offload(t testing.TB, features int) {
	t.Helper()
	c, err := f.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var errno error
	if err := c.Control(func(fd uintptr) { errno = unix.IoctlSetInt(int(fd), unix.TUNSETOFFLOAD, features) }); err != nil || errno != nil {
		t.Fatal(err, errno)
	}
}

func (f tap) send(t testing.TB, header, frame []byte) {
	t.Helper()
	if header == nil {
		header = make([]byte, vnetHeader)
	}
	if _, err := f.Write(append(bytes.Clone(header), frame...)); err != nil {
		t.Fatalf("send a frame of %d bytes: %v", len(frame), err)
	}
}

func (f tap) receive(t testing.TB) (header, frame []byte) {
	t.Helper()
	if err := f.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 70000)
	n, err := f.Read(buf)
	if err != nil {
		t.Fatalf("no frame has come: %v", err)
	}
	return buf[:vnetHeader], buf[vnetHeader:n]
}

// addVif makes a tap stand in for a vif: its descriptor is what the backend sends and receives, its carrier the connection.
// The kernel is told of it as of a vif, by a new link with the guest's address.
func addVif(t testing.TB, i int, change func(name string)) (name string, backend tap) {
	t.Helper()
	name = fmt.Sprintf("eth%d", i)
	if err := addTap(name, 0, 0); err != nil {
		t.Fatal(err)
	}
	backend = openAs(t, name)
	if change != nil {
		change(name)
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetHardwareAddr(l, guestMAC(i)); err != nil {
		t.Fatal(err)
	}
	return name, backend
}

func linkNamed(t testing.TB, name string) netlink.Link {
	t.Helper()
	l, err := netlink.LinkByName(name)
	if err != nil {
		t.Fatalf("link %s: %v", name, err)
	}
	return l
}

// waitUp returns when the link has a carrier, of which the kernel tells itself, and the bridge, a little after it has one.
func waitUp(t testing.TB, name string) {
	t.Helper()
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribeWithOptions(updates, done, netlink.LinkSubscribeOptions{ListExisting: true}); err != nil {
		t.Fatal(err)
	}
	limit := time.After(10 * time.Second)
	for {
		select {
		case u, ok := <-updates:
			if !ok {
				t.Fatal("link events have ended")
			}
			if u.Attrs().Name == name && u.Attrs().OperState == netlink.OperUp {
				go func() { // it sends until it sees that it is done
					for range updates {
					}
				}()
				return
			}
		case <-limit:
			t.Fatalf("%s is not up", name)
		}
	}
}

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// ether builds a frame; its payload is a pattern of that many bytes.
func ether(dst, src net.HardwareAddr, header []byte, payload int) []byte {
	b := append(append(append([]byte{}, dst...), src...), header...)
	for i := range payload {
		b = append(b, byte(i*7+i>>8))
	}
	return b
}

func TestFrames(t *testing.T) {
	l := setup(t, 1, 9000, nil)
	_, backend := addVif(t, 0, nil)
	qemu := openAs(t, l.nics[0].Tap)
	l.log.wait(t, "link is up", "nic=nic0", "link=eth0")
	waitUp(t, l.nics[0].Tap)
	guest, peer := guestMAC(0), mac("00:16:3e:99:99:99")
	for _, tt := range []struct {
		name   string
		dst    net.HardwareAddr
		header []byte // from the EtherType on
		size   int
	}{
		{"unicast", nil, []byte{0x08, 0x00}, 46},
		{"broadcast", broadcast, []byte{0x08, 0x06}, 46},
		{"multicast nobody joined", mac("01:00:5e:01:02:03"), []byte{0x08, 0x00}, 46},
		{"802.1X", mac("01:80:c2:00:00:03"), []byte{0x88, 0x8e}, 46},
		{"LLDP", mac("01:80:c2:00:00:0e"), []byte{0x88, 0xcc}, 46},
		{"spanning tree of the guest", mac("01:80:c2:00:00:00"), []byte{0, 38, 0x42, 0x42, 3}, 43},
		{"VLAN", nil, []byte{0x81, 0x00, 0x60, 0x05, 0x08, 0x00}, 46},
		{"VLAN in VLAN", nil, []byte{0x88, 0xa8, 0x00, 0x07, 0x81, 0x00, 0x60, 0x05, 0x08, 0x00}, 46},
		{"jumbo", nil, []byte{0x88, 0xb5}, 9000},
		{"jumbo VLAN", nil, []byte{0x81, 0x00, 0x00, 0x05, 0x88, 0xb5}, 9000},
		{"IPv6 neighbour discovery", mac("33:33:00:00:00:01"), []byte{0x86, 0xdd}, 46},
	} {
		t.Run(tt.name, func(t *testing.T) {
			to := func(unicast net.HardwareAddr) net.HardwareAddr {
				if tt.dst != nil {
					return tt.dst
				}
				return unicast
			}
			for _, way := range []struct {
				name     string
				from, to tap
				frame    []byte
			}{
				{"to the guest", backend, qemu, ether(to(guest), peer, tt.header, tt.size)},
				{"from the guest", qemu, backend, ether(to(peer), guest, tt.header, tt.size)},
				// The guest's own broadcast, come back from outside, teaches the bridge nothing wrong.
				{"from outside with the guest's address", backend, qemu, ether(to(peer), guest, tt.header, tt.size)},
				{"to the guest after that", backend, qemu, ether(to(guest), peer, tt.header, tt.size)},
			} {
				way.from.send(t, nil, way.frame)
				_, got := way.to.receive(t)
				if d := cmp.Diff(way.frame, got); d != "" {
					t.Errorf("%s: %s", way.name, d)
				}
			}
		})
	}
}

// sum is the Internet checksum of RFC 1071, not yet inverted.
func sum(parts ...[]byte) uint16 {
	var s uint32
	for i, b := range bytes.Join(parts, nil) {
		s += uint32(b) << (8 * uint(1-i%2))
	}
	for s > 0xffff {
		s = s>>16 + s&0xffff
	}
	return uint16(s)
}

const (
	udp, tcp     = 17, 6
	etherIP      = 14 + 20
	needsCsum    = 1 // VIRTIO_NET_HDR_F_NEEDS_CSUM
	gsoTCPv4     = 1 // VIRTIO_NET_HDR_GSO_TCPV4
	checksumUDP  = 6 // offset in the header
	checksumTCP  = 16
	headerUDP    = 8
	headerTCP    = 20
	vlanTagBytes = 4
)

// unfinished is an IPv4 packet in Ethernet whose transport checksum is only the pseudo header's, as NETRXF_csum_blank and a
// virtio-net guest leave it, and the virtio_net_hdr that says so.
func unfinished(proto byte, dst, src net.HardwareAddr, payload int) (header, frame []byte) {
	transport, at := make([]byte, headerUDP), checksumUDP
	if proto == tcp {
		transport, at = make([]byte, headerTCP), checksumTCP
		transport[12], transport[13] = headerTCP/4<<4, 0x10 // ACK
	}
	copy(transport, []byte{0x10, 0x00, 0x20, 0x00})
	if proto == udp {
		binary.BigEndian.PutUint16(transport[4:], uint16(headerUDP+payload))
	}
	length := len(transport) + payload
	ip := []byte{0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, proto, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2}
	binary.BigEndian.PutUint16(ip[2:], uint16(len(ip)+length))
	binary.BigEndian.PutUint16(ip[10:], ^sum(ip))
	binary.BigEndian.PutUint16(transport[at:], sum(ip[12:], []byte{0, proto}, binary.BigEndian.AppendUint16(nil, uint16(length))))

	frame = ether(dst, src, append(append([]byte{8, 0}, ip...), transport...), payload)
	header = make([]byte, vnetHeader)
	header[0] = needsCsum
	binary.NativeEndian.PutUint16(header[6:], etherIP)
	binary.NativeEndian.PutUint16(header[8:], uint16(at))
	return header, frame
}

// checkSums fails unless the packet's IP and transport checksums are right; it returns the transport's payload.
func checkSums(t *testing.T, frame []byte) []byte {
	t.Helper()
	if len(frame) < etherIP+headerUDP || frame[12] != 8 || frame[13] != 0 {
		t.Fatalf("not an IPv4 packet: %x", frame)
	}
	ip, proto := frame[14:etherIP], frame[14+9]
	transport := frame[etherIP : 14+int(binary.BigEndian.Uint16(ip[2:]))]
	if s := sum(ip); s != 0xffff {
		t.Errorf("IP header sums up to %#x", s)
	}
	if s := sum(ip[12:], []byte{0, proto}, binary.BigEndian.AppendUint16(nil, uint16(len(transport))), transport); s != 0xffff {
		t.Errorf("transport (protocol %d) sums up to %#x", proto, s)
	}
	if proto == tcp {
		return transport[headerTCP:]
	}
	return transport[headerUDP:]
}

func TestChecksums(t *testing.T) {
	l := setup(t, 1, 1500, nil)
	_, backend := addVif(t, 0, nil)
	qemu := openAs(t, l.nics[0].Tap)
	l.log.wait(t, "link is up", "nic=nic0")
	waitUp(t, l.nics[0].Tap)
	guest, peer := guestMAC(0), mac("00:16:3e:99:99:99")

	for _, way := range []struct {
		name     string
		from, to tap
		dst, src net.HardwareAddr
	}{
		{"to e1000", backend, qemu, guest, peer}, // takes no offloads
		{"from virtio-net to a backend without checksum offload", qemu, backend, peer, guest},
	} {
		t.Run("UDP "+way.name, func(t *testing.T) {
			header, frame := unfinished(udp, way.dst, way.src, 1000)
			way.from.send(t, header, frame)
			header, got := way.to.receive(t)
			if header[0] != 0 {
				t.Errorf("virtio_net_hdr %x asks the reader to finish the frame", header)
			}
			if d := cmp.Diff(frame[etherIP+headerUDP:], checkSums(t, got)); d != "" {
				t.Error(d)
			}
		})
		t.Run("UDP in a VLAN "+way.name, func(t *testing.T) {
			header, frame := unfinished(udp, way.dst, way.src, 1000)
			frame = append(append(bytes.Clone(frame[:12]), 0x81, 0, 0, 5), frame[12:]...)
			binary.NativeEndian.PutUint16(header[6:], etherIP+vlanTagBytes)
			way.from.send(t, header, frame)
			_, got := way.to.receive(t)
			if !bytes.Equal(got[:16], frame[:16]) {
				t.Fatalf("addresses and tag %x, want %x", got[:16], frame[:16])
			}
			checkSums(t, append(bytes.Clone(got[:12]), got[16:]...))
		})
		t.Run("TCP in one large frame "+way.name, func(t *testing.T) {
			header, frame := unfinished(tcp, way.dst, way.src, 3500)
			header[1] = gsoTCPv4
			binary.NativeEndian.PutUint16(header[2:], etherIP+headerTCP)
			binary.NativeEndian.PutUint16(header[4:], 1000)
			way.from.send(t, header, frame)
			var got []byte
			for _, want := range []int{1000, 1000, 1000, 500} {
				header, segment := way.to.receive(t)
				payload := checkSums(t, segment)
				if len(payload) != want || header[0] != 0 || header[1] != 0 {
					t.Errorf("segment of %d bytes, want %d; virtio_net_hdr %x", len(payload), want, header)
				}
				got = append(got, payload...)
			}
			if d := cmp.Diff(frame[etherIP+headerTCP:], got); d != "" {
				t.Error(d)
			}
		})
	}

	t.Run("UDP to virtio-net", func(t *testing.T) {
		qemu.offload(t, unix.TUN_F_CSUM)
		header, frame := unfinished(udp, guest, peer, 1000)
		backend.send(t, header, frame)
		gotHeader, got := qemu.receive(t)
		if d := cmp.Diff(header, gotHeader); d != "" {
			t.Errorf("virtio_net_hdr: %s", d)
		}
		if d := cmp.Diff(frame, got); d != "" {
			t.Error(d)
		}
	})
}

// The kernel's own UDP through a veth leaves checksums to be filled in.
func TestChecksumFromVeth(t *testing.T) {
	l := setup(t, 1, 0, nil)
	addVeth(t, 0, 1500)
	qemu := openAs(t, l.nics[0].Tap)
	l.log.wait(t, "link is up", "nic=nic0")
	waitUp(t, l.nics[0].Tap)
	outside := linkNamed(t, "out0")
	if err := netlink.AddrAdd(outside, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 0, 0, 1), Mask: net.CIDRMask(24, 32)}}); err != nil {
		t.Fatal(err)
	}
	if err := netlink.NeighAdd(&netlink.Neigh{LinkIndex: outside.Attrs().Index, State: netlink.NUD_PERMANENT,
		IP: net.IPv4(10, 0, 0, 2), HardwareAddr: guestMAC(0)}); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("udp4", "10.0.0.2:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	want := bytes.Repeat([]byte("checksum"), 100)
	if _, err := c.Write(want); err != nil {
		t.Fatal(err)
	}
	_, frame := qemu.receive(t)
	if d := cmp.Diff(want, checkSums(t, frame)); d != "" {
		t.Error(d)
	}
}

// addVeth makes a veth stand in for vif i: eth<i> has the guest's address, out<i> is up. Both have the MTU.
func addVeth(t testing.TB, i, mtu int) {
	t.Helper()
	name, out := fmt.Sprintf("eth%d", i), fmt.Sprintf("out%d", i)
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name, HardwareAddr: guestMAC(i), MTU: mtu}, PeerName: out}); err != nil {
		t.Fatalf("add a veth (CONFIG_VETH): %v", err)
	}
	if err := netlink.LinkSetUp(linkNamed(t, out)); err != nil {
		t.Fatal(err)
	}
}

func TestEightNICs(t *testing.T) {
	l := setup(t, 8, 0, nil)
	for i := 7; i >= 0; i-- { // in an order of their own
		addVeth(t, i, 1500)
		openAs(t, l.nics[i].Tap)
		l.log.wait(t, "link is up", fmt.Sprintf("nic=nic%d", i), fmt.Sprintf("link=eth%d", i))
		waitUp(t, l.nics[i].Tap)
	}
	for len(l.log.ch) > 0 {
		if line := <-l.log.ch; !strings.HasPrefix(line, "level=DEBUG") {
			t.Errorf("more than one line for a link: %s", line)
		}
	}
	addresses := make(map[string]string)
	for i, n := range l.nics {
		br := linkNamed(t, n.Bridge)
		if got := bridgeSettings(t, n.Bridge); got != "stp 0, delay 0, ageing 0, groups 0xfff8, snooping 0" {
			t.Errorf("%s: %s", n.Bridge, got)
		}
		for _, name := range []string{n.Bridge, n.Tap, fmt.Sprintf("eth%d", i)} {
			link := linkNamed(t, name)
			a := link.Attrs()
			if name != n.Bridge && a.MasterIndex != br.Attrs().Index {
				t.Errorf("%s is not in %s", name, n.Bridge)
			}
			if a.Flags&net.FlagUp == 0 || a.OperState != netlink.OperUp {
				t.Errorf("%s is not up: %s, %s", name, a.Flags, a.OperState)
			}
			if other, ok := addresses[a.HardwareAddr.String()]; ok || bytes.Equal(a.HardwareAddr, n.MAC) {
				t.Errorf("%s has the address %s, as has %q or the guest", name, a.HardwareAddr, other)
			}
			addresses[a.HardwareAddr.String()] = name
			addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
			if err != nil {
				t.Fatal(err)
			}
			if len(addrs) != 0 {
				t.Errorf("%s has addresses: %v", name, addrs)
			}
		}
	}
}

// bridgeSettings reads what the kernel made of AddBridge, from rtnetlink.
func bridgeSettings(t *testing.T, name string) string {
	t.Helper()
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, 0)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil || len(msgs) != 1 {
		t.Fatal(len(msgs), err)
	}
	value := make(map[uint16][]byte)
	b := msgs[0][unix.SizeofIfInfomsg:]
	for _, nested := range []uint16{unix.IFLA_LINKINFO, nl.IFLA_INFO_DATA, 0} {
		attrs, err := nl.ParseRouteAttrAsMap(b)
		if err != nil {
			t.Fatal(err)
		}
		b = attrs[nested].Value
		if nested == 0 {
			for k, a := range attrs {
				value[k] = a.Value
			}
		}
	}
	u32 := binary.NativeEndian.Uint32
	return fmt.Sprintf("stp %d, delay %d, ageing %d, groups %#x, snooping %d", u32(value[nl.IFLA_BR_STP_STATE]),
		u32(value[nl.IFLA_BR_FORWARD_DELAY]), u32(value[nl.IFLA_BR_AGEING_TIME]),
		binary.NativeEndian.Uint16(value[nl.IFLA_BR_GROUP_FWD_MASK]), value[nl.IFLA_BR_MCAST_SNOOPING][0])
}

func TestMTU(t *testing.T) {
	for _, tt := range []struct {
		name              string
		xenstore, vif     int
		tapBefore, tapNow int
	}{
		{"neither", 0, 1500, 1500, 1500},
		{"from xenstore", 9000, 1500, 9000, 9000},
		{"from the vif", 0, 9000, 1500, 9000},
		{"smaller, from xenstore", 1400, 1500, 1400, 1400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l := setup(t, 1, tt.xenstore, nil)
			n := l.nics[0]
			got := []int{linkNamed(t, n.Tap).Attrs().MTU}
			addVeth(t, 0, tt.vif)
			l.log.wait(t, "link is up", "nic=nic0")
			for _, name := range []string{n.Tap, n.Bridge, "eth0"} {
				got = append(got, linkNamed(t, name).Attrs().MTU)
			}
			if d := cmp.Diff([]int{tt.tapBefore, tt.tapNow, tt.tapNow, tt.tapNow}, got); d != "" {
				t.Errorf("tap before; tap, bridge, vif: %s", d)
			}
		})
	}
}

// A vif whose backend has no scatter-gather takes no large MTU. A macvlan stands in, which takes none larger than its parent's.
func TestMTURefused(t *testing.T) {
	l := setup(t, 1, 9000, nil)
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "low", MTU: 1500}, PeerName: "lowpeer"}); err != nil {
		t.Fatal(err)
	}
	err := netlink.LinkAdd(&netlink.Macvlan{Mode: netlink.MACVLAN_MODE_PRIVATE,
		LinkAttrs: netlink.LinkAttrs{Name: "eth0", ParentIndex: linkNamed(t, "low").Attrs().Index, HardwareAddr: guestMAC(0)}})
	if err != nil {
		t.Fatalf("add a macvlan (CONFIG_MACVLAN): %v", err)
	}
	l.log.wait(t, "level=WARN", "refuses the MTU", "mtu=9000", l.nics[0].Backend)
	l.log.wait(t, "vif has joined its bridge", "link=eth0")
	if got := linkNamed(t, "eth0").Attrs(); got.MTU != 1500 || got.MasterIndex != linkNamed(t, "br0").Attrs().Index {
		t.Errorf("MTU %d, in bridge %d", got.MTU, got.MasterIndex)
	}
}

func TestLateAndMissingVifs(t *testing.T) {
	l := setup(t, 3, 0, func(o *Options) { o.Limit = 300 * time.Millisecond })
	addVeth(t, 1, 1500)
	l.log.wait(t, "level=INFO", "link is up", "nic=nic1", "after=")
	l.log.wait(t, "level=WARN", "backend has not connected", "nic=nic0", "xenstore=/local/domain/0/backend/vif/8/0")
	l.log.wait(t, "level=WARN", "backend has not connected", "nic=nic2", "xenstore=/local/domain/0/backend/vif/8/2")
	addVeth(t, 2, 1500)
	l.log.wait(t, "level=INFO", "link is up", "nic=nic2", "after=")

	// It goes and comes back.
	if err := netlink.LinkDel(linkNamed(t, "eth2")); err != nil {
		t.Fatal(err)
	}
	l.log.wait(t, "level=WARN", "vif is gone", "nic=nic2")
	addVeth(t, 2, 1500)
	l.log.wait(t, "level=INFO", "link is up", "nic=nic2")
}

func TestVifWithoutCarrier(t *testing.T) {
	l := setup(t, 1, 0, func(o *Options) { o.Limit = 300 * time.Millisecond })
	if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0", HardwareAddr: guestMAC(0)}, PeerName: "out0"}); err != nil {
		t.Fatal(err)
	}
	l.log.wait(t, "level=WARN", "no carrier", "nic=nic0", "xenstore=/local/domain/0/backend/vif/8/0")
	if err := netlink.LinkSetUp(linkNamed(t, "out0")); err != nil {
		t.Fatal(err)
	}
	l.log.wait(t, "level=INFO", "link is up", "nic=nic0")
}

// A frontend has its carrier before its backend has connected.
func TestBackendConnectsLate(t *testing.T) {
	const waits, closing = "2", "5"
	l := setup(t, 2, 0, func(o *Options) {
		o.Limit = 300 * time.Millisecond
		o.Store.(*fakeStore).nodes[backendState(0)] = waits
	})
	addVeth(t, 0, 1500)
	addVeth(t, 1, 1500)
	waitUp(t, "eth0")
	if line := l.log.wait(t, "link is up"); !strings.Contains(line, "nic=nic1") {
		t.Errorf("%s: the backend of nic0 has not connected", line)
	}
	if line := l.log.wait(t, "level=WARN"); !strings.Contains(line, "backend has not connected") || !strings.Contains(line, "nic=nic0") {
		t.Errorf("%s: want that the backend of nic0 has not connected", line)
	}
	l.store.set(backendState(0), stateConnected)
	l.log.wait(t, "level=INFO", "link is up", "nic=nic0", "link=eth0")
	l.store.set(backendState(0), closing)
	l.log.wait(t, "level=WARN", "link is down", "nic=nic0", "xenstore=/local/domain/0/backend/vif/8/0")
}

// A vif may be there, and up, before Run is.
func TestVifBeforeRun(t *testing.T) {
	newNetns(t)
	addVeth(t, 0, 1500)
	if err := netlink.LinkSetUp(linkNamed(t, "eth0")); err != nil {
		t.Fatal(err)
	}
	log := newLines()
	n := openNetwork(t, Options{Log: slog.New(log), Store: connected(1)})
	if err := n.Setup(t.Context(), makePlan(t, 1, 0)); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- n.Run(ctx) }()
	log.wait(t, "link is up", "nic=nic0")
	a := linkNamed(t, "eth0").Attrs()
	if !bytes.Equal(a.HardwareAddr, n.ports[0].VifMAC) || a.MasterIndex != linkNamed(t, "br0").Attrs().Index {
		t.Errorf("eth0 has address %s and is in %d", a.HardwareAddr, a.MasterIndex)
	}
	addrs, err := netlink.AddrList(linkNamed(t, "eth0"), netlink.FAMILY_ALL)
	if err != nil || len(addrs) != 0 {
		t.Errorf("eth0 has addresses %v, %v", addrs, err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run: %v", err)
	}
	if err := n.Run(t.Context()); err == nil {
		t.Error("Run ran twice")
	}
}

// Events that the kernel had to drop are made up for.
func TestLostEvents(t *testing.T) {
	l := setup(t, 2, 0, nil)
	addVeth(t, 1, 1500)
	l.log.wait(t, "link is up", "nic=nic1")
	l.mu.Lock() // Run stops at the next event
	if err := l.events.SetReceiveBufferSize(1, true); err != nil {
		t.Fatal(err)
	}
	addVeth(t, 0, 1500)
	if err := netlink.LinkDel(linkNamed(t, "eth1")); err != nil {
		t.Fatal(err)
	}
	for i := range 20 {
		if err := netlink.LinkSetAlias(linkNamed(t, "lo"), fmt.Sprint("event ", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.events.SetReceiveBufferSize(1<<20, true); err != nil {
		t.Fatal(err)
	}
	l.mu.Unlock()
	for up, gone := false, false; !up || !gone; { // in any order
		line := l.log.wait(t, "nic=nic")
		up = up || strings.Contains(line, "link is up") && strings.Contains(line, "nic=nic0")
		gone = gone || strings.Contains(line, "vif is gone") && strings.Contains(line, "nic=nic1")
	}
}

func TestUnplug(t *testing.T) {
	l := setup(t, 2, 0, nil)
	var qemu []tap
	for i := range 2 {
		addVeth(t, i, 1500)
		qemu = append(qemu, openAs(t, l.nics[i].Tap))
		l.log.wait(t, "link is up", fmt.Sprintf("nic=nic%d", i))
	}

	// As long as QEMU has the tap, all goes but the tap.
	err := l.Unplug(t.Context(), "nic0")
	if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), `netdev_del of "net0"`) {
		t.Errorf("Unplug with the tap open: %v", err)
	}
	if a := linkNamed(t, "eth0").Attrs(); a.MasterIndex != 0 {
		t.Errorf("eth0 is in bridge %d", a.MasterIndex)
	}
	if a := linkNamed(t, l.nics[0].Tap).Attrs(); a.MasterIndex != 0 {
		t.Errorf("tap is in bridge %d", a.MasterIndex)
	}
	if err := netlink.LinkDel(linkNamed(t, "eth0")); err != nil { // as the driver does
		t.Fatal(err)
	}

	qemu[0].Close()
	for range 2 { // and again, when nothing is left
		if err := l.Unplug(t.Context(), "nic0"); err != nil {
			t.Errorf("Unplug: %v", err)
		}
	}
	for _, name := range []string{l.nics[0].Tap, l.nics[0].Bridge} {
		if link, err := netlink.LinkByName(name); err == nil {
			t.Errorf("%s is still there: %v", name, link)
		}
	}
	if got, err := os.ReadFile(filepath.Join(l.sys, "bus/xen/drivers/vif/unbind")); err != nil || string(got) != "vif-0" {
		t.Errorf("unbind got %q, %v", got, err)
	}
	want := strings.Repeat("read device/vif/0/state remove device/vif/0 ", 3)
	if d := cmp.Diff(strings.Fields(want), strings.Fields(strings.Join(l.store.done, " "))); d != "" {
		t.Error(d)
	}

	// The other NIC has not noticed, and a vif that comes with the unplugged one's address stays alone. Events come in order: when
	// the second link is up, the first has been seen.
	if got := linkNamed(t, "eth1").Attrs(); got.MasterIndex == 0 || got.OperState != netlink.OperUp {
		t.Errorf("eth1: in bridge %d, %s", got.MasterIndex, got.OperState)
	}
	addVeth(t, 0, 1500)
	if err := netlink.LinkDel(linkNamed(t, "eth1")); err != nil {
		t.Fatal(err)
	}
	addVeth(t, 1, 1500)
	l.log.wait(t, "vif is gone", "nic=nic1")
	l.log.wait(t, "link is up", "nic=nic1")
	if a := linkNamed(t, "eth0").Attrs(); a.MasterIndex != 0 {
		t.Errorf("the unplugged NIC's vif is in bridge %d", a.MasterIndex)
	}
}

// Setup says what failed, where, and sets up the other NICs.
func TestSetupFails(t *testing.T) {
	newNetns(t)
	if err := addTap("vif7.0-emu", 0, 0); err != nil {
		t.Fatal(err)
	}
	n := openNetwork(t, Options{})
	err := n.Setup(t.Context(), makePlan(t, 2, 0))
	if !errors.Is(err, unix.EBUSY) || !strings.HasPrefix(err.Error(), "add tap vif7.0-emu") || strings.Contains(err.Error(), "\n") {
		t.Errorf("Setup: %v", err)
	}
	if linkNamed(t, "vif7.1-emu").Attrs().MasterIndex != linkNamed(t, "br1").Attrs().Index {
		t.Error("the other NIC is not set up")
	}
	if err := n.Setup(t.Context(), nil); err == nil {
		t.Error("Setup did it twice")
	}
}

// A QEMU that is not root attaches to its own tap and no other, with the flags it likes.
func TestOwner(t *testing.T) {
	const owner, stranger = 64000, 64001
	l := setup(t, 1, 0, func(o *Options) { o.UID, o.GID = owner, owner })
	for _, tt := range []struct {
		uid   int
		flags uint16
		want  error
	}{
		{owner, tapFlags, nil},
		{owner, tapFlags &^ unix.IFF_VNET_HDR, nil},
		{stranger, tapFlags, unix.EPERM},
	} {
		fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC, 0) // in this namespace, as root
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error)
		go func() {
			runtime.LockOSThread() // for good: the thread goes with its user
			ifr, err := unix.NewIfreq(l.nics[0].Tap)
			if err != nil {
				result <- err
				return
			}
			ifr.SetUint16(tt.flags)
			id := uintptr(tt.uid)
			for _, call := range []uintptr{unix.SYS_SETRESGID, unix.SYS_SETRESUID} { // of this thread only
				if _, _, errno := unix.RawSyscall(call, id, id, id); errno != 0 {
					result <- errno
					return
				}
			}
			result <- unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr)
		}()
		if err := <-result; !errors.Is(err, tt.want) {
			t.Errorf("user %d attaches with flags %#x: %v, want %v", tt.uid, tt.flags, err, tt.want)
		}
		unix.Close(fd)
	}
}

// BenchmarkNIC takes one NIC through Setup, its vif's arrival, and Unplug. cpu-ms/NIC is what Setup and the joining cost.
func BenchmarkNIC(b *testing.B) {
	newNetns(b)
	sys := b.TempDir()
	cpu := func() time.Duration {
		var r unix.Rusage
		if err := unix.Getrusage(unix.RUSAGE_SELF, &r); err != nil {
			b.Fatal(err)
		}
		return time.Duration(r.Utime.Nano() + r.Stime.Nano())
	}
	var spent time.Duration
	for b.Loop() {
		log := newLines()
		n, err := New(Options{Log: slog.New(log), Store: &fakeStore{}, Sys: sys})
		if err != nil {
			b.Fatal(err)
		}
		plan := makePlan(b, 1, 0)
		ctx, cancel := context.WithCancel(context.Background())
		ended := make(chan error)
		addVeth(b, 0, 1500)
		start := cpu()
		if err := n.Setup(ctx, plan); err != nil {
			b.Fatal(err)
		}
		go func() { ended <- n.Run(ctx) }()
		log.wait(b, "joined")
		spent += cpu() - start
		if err := n.Unplug(ctx, "nic0"); err != nil {
			b.Fatal(err)
		}
		cancel()
		if err := <-ended; err != nil {
			b.Fatal(err)
		}
		n.Close()
		if err := netlink.LinkDel(linkNamed(b, "eth0")); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(spent.Microseconds())/1000/float64(b.N), "cpu-ms/NIC")
}
