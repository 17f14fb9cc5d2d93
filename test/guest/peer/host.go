// Package peer is the other end of the test guest's network: a small host on any link that carries Ethernet frames. It
// answers ARP, ICMP echo and UDP echo (port 7), and pings, transfers in bulk and exchanges raw frames on demand. It
// brings its own MAC and IPv4 address, so that nothing of it depends on the machine's own network stack.
package peer

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"
)

// Config is a Host's own addresses. MTU counts from the IPv4 header on; 0 means 1500.
type Config struct {
	MAC net.HardwareAddr
	IP  netip.Addr
	MTU int
}

// Stats counts what a Host received.
type Stats struct {
	Frames, ARP, ICMP, UDP int
	BadChecksum            int // IPv4, ICMP or UDP
	PartialChecksum        int // left to hardware by the sender, see Link
	Malformed              int // too short, options, fragments
	Other                  int // neither IP nor ARP
	Unclaimed              int // datagrams that nobody waits for
	Overrun                int // datagrams dropped because their receiver was behind
	Unsent                 int // answers that the link did not take
}

const (
	otherKept = 256
	portQueue = 256
	retry     = 500 * time.Millisecond
)

var broadcast = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

// Host is one host on one link. Its methods may be called concurrently.
type Host struct {
	link Link
	cfg  Config
	done chan struct{} // closed when the reader has ended

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced whenever something that a method waits for is new
	err      error         // why the reader ended
	neigh    map[netip.Addr]net.HardwareAddr
	pongs    map[uint16][]byte // payload of echo replies by sequence
	sequence uint16
	ports    map[uint16]chan datagram
	nextPort uint16
	finished map[uint32]header // last answer of transfers that were received, by session
	other    [][]byte
	stats    Stats
}

type datagram struct {
	from netip.AddrPort
	data []byte
}

// NewHost starts a host on the link and owns it from then on.
func NewHost(link Link, cfg Config) *Host {
	if cfg.MTU == 0 {
		cfg.MTU = 1500
	}
	h := &Host{
		link: link, cfg: cfg, done: make(chan struct{}), changed: make(chan struct{}),
		neigh: map[netip.Addr]net.HardwareAddr{}, pongs: map[uint16][]byte{}, ports: map[uint16]chan datagram{},
		finished: map[uint32]header{}, nextPort: 49152,
	}
	go h.read()
	return h
}

// Close closes the link and waits for the reader.
func (h *Host) Close() error {
	err := h.link.Close()
	<-h.done
	return err
}

// Done is closed when the host can receive no more: after Close, or when the link failed.
func (h *Host) Done() <-chan struct{} { return h.done }

// Stats returns the counts so far.
func (h *Host) Stats() Stats {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stats
}

func (h *Host) read() {
	defer close(h.done)
	b := make([]byte, 64<<10)
	for {
		n, partial, err := h.link.ReadFrame(b)
		if err == nil {
			h.receive(b[:n], partial)
			continue
		}
		h.mu.Lock()
		h.err = err
		h.notify()
		h.mu.Unlock()
		return
	}
}

// notify wakes all that wait; the caller holds mu.
func (h *Host) notify() {
	close(h.changed)
	h.changed = make(chan struct{})
}

// wait returns once ready, called with mu held, says so.
func (h *Host) wait(ctx context.Context, ready func() bool) error {
	for {
		h.mu.Lock()
		ok, err, changed := ready(), h.err, h.changed
		h.mu.Unlock()
		switch {
		case ok:
			return nil
		case err != nil:
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// receive handles one frame. An answer that cannot be written is lost, as on a wire.
func (h *Host) receive(frame []byte, partial bool) {
	h.mu.Lock()
	answer := h.dispatch(frame, partial)
	h.mu.Unlock()
	if answer == nil {
		return
	}
	if err := h.link.WriteFrame(answer); err != nil {
		h.mu.Lock()
		h.stats.Unsent++
		h.mu.Unlock()
	}
}

// dispatch returns the frame to answer with, or nil. The caller holds mu.
func (h *Host) dispatch(frame []byte, partial bool) (answer []byte) {
	h.stats.Frames++
	if len(frame) < etherSize {
		h.stats.Malformed++
		return nil
	}
	if frame[0]&1 == 0 && !bytes.Equal(frame[:6], h.cfg.MAC) {
		return nil
	}
	var err error
	from, payload := net.HardwareAddr(bytes.Clone(frame[6:12])), frame[etherSize:]
	switch binary.BigEndian.Uint16(frame[12:]) {
	case typeARP:
		answer, err = h.receiveARP(payload)
	case typeIPv4:
		if frame[0]&1 != 0 && !bytes.Equal(frame[:6], broadcast) {
			return nil // to a group, of which we are in none: IGMP of other hosts, with options
		}
		answer, err = h.receiveIP(from, payload, partial)
	case typeIPv6:
	default:
		h.stats.Other++
		if len(h.other) == otherKept {
			h.other = h.other[1:]
		}
		h.other = append(h.other, bytes.Clone(frame))
		h.notify()
	}
	switch {
	case errors.Is(err, errChecksum):
		h.stats.BadChecksum++
	case err != nil:
		h.stats.Malformed++
	}
	return answer
}

func (h *Host) receiveARP(b []byte) ([]byte, error) {
	a, err := parseARP(b)
	if err != nil {
		return nil, err
	}
	h.stats.ARP++
	mac := bytes.Clone(a.mac)
	h.neigh[a.from] = mac
	h.notify()
	if a.operation != 1 || a.to != h.cfg.IP {
		return nil, nil
	}
	return appendARP(appendEther(nil, mac, h.cfg.MAC, typeARP), 2, h.cfg.MAC, h.cfg.IP, mac, a.from), nil
}

func (h *Host) receiveIP(from net.HardwareAddr, b []byte, partial bool) ([]byte, error) {
	p, err := parseIPv4(b)
	if err != nil || p.to != h.cfg.IP {
		return nil, err
	}
	if partial {
		h.stats.PartialChecksum++
	}
	switch p.protocol {
	case protocolICMP:
		return h.receiveICMP(from, p)
	case protocolUDP:
		return h.receiveUDP(from, p, partial)
	}
	return nil, nil
}

func (h *Host) receiveICMP(from net.HardwareAddr, p ipv4) ([]byte, error) {
	b := p.payload
	if len(b) < icmpSize {
		return nil, errShort
	}
	if fold(sum(0, b)) != 0 {
		return nil, errChecksum
	}
	h.stats.ICMP++
	switch b[0] {
	case 0:
		h.pongs[binary.BigEndian.Uint16(b[6:])] = bytes.Clone(b[icmpSize:])
		h.notify()
	case 8:
		frame := appendIPv4(appendEther(nil, from, h.cfg.MAC, typeIPv4), h.cfg.IP, p.from, protocolICMP, len(b))
		return appendEcho(frame, 0, b[4:]), nil
	}
	return nil, nil
}

// appendEcho appends an ICMP echo message; rest begins with identifier and sequence.
func appendEcho(b []byte, kind byte, rest []byte) []byte {
	at := len(b)
	b = append(b, kind, 0, 0, 0)
	b = append(b, rest...)
	binary.BigEndian.PutUint16(b[at+2:], fold(sum(0, b[at:])))
	return b
}

func (h *Host) receiveUDP(from net.HardwareAddr, p ipv4, partial bool) ([]byte, error) {
	u, err := parseUDP(p, partial)
	if err != nil {
		return nil, err
	}
	h.stats.UDP++
	remote := netip.AddrPortFrom(p.from, u.from)
	h.neigh[p.from] = from
	if u.to == echoPort {
		if u.from == echoPort {
			return nil, nil // two echo services would never end
		}
		return h.udpFrame(from, echoPort, remote, u.data), nil
	}
	if answer, ok := h.repeatFIN(u.data); ok {
		return h.udpFrame(from, u.to, remote, answer), nil
	}
	queue, ok := h.ports[u.to]
	if !ok {
		h.stats.Unclaimed++
		return nil, nil
	}
	select {
	case queue <- datagram{remote, bytes.Clone(u.data)}:
	default:
		h.stats.Overrun++
	}
	return nil, nil
}

func (h *Host) udpFrame(mac net.HardwareAddr, from uint16, to netip.AddrPort, data []byte) []byte {
	frame := appendEther(make([]byte, 0, etherSize+ipSize+udpSize+len(data)), mac, h.cfg.MAC, typeIPv4)
	frame = appendIPv4(frame, h.cfg.IP, to.Addr(), protocolUDP, udpSize+len(data))
	return appendUDP(frame, netip.AddrPortFrom(h.cfg.IP, from), to, data)
}

func (h *Host) sendUDP(mac net.HardwareAddr, from uint16, to netip.AddrPort, data []byte) error {
	if size := ipSize + udpSize + len(data); size > h.cfg.MTU {
		return fmt.Errorf("send a datagram to %v: %d bytes do not fit the MTU of %d", to, size, h.cfg.MTU)
	}
	return h.link.WriteFrame(h.udpFrame(mac, from, to, data))
}

// open claims a UDP port, 0 for any. The caller hands it back with release.
func (h *Host) open(port uint16) (uint16, <-chan datagram, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for port == 0 {
		if h.nextPort++; h.nextPort < 49152 {
			h.nextPort = 49152
		}
		if h.ports[h.nextPort] == nil {
			port = h.nextPort
		}
	}
	if h.ports[port] != nil {
		return 0, nil, fmt.Errorf("UDP port %d is in use", port)
	}
	queue := make(chan datagram, portQueue)
	h.ports[port] = queue
	return port, queue, nil
}

func (h *Host) release(port uint16) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.ports, port)
}

// next returns the next datagram of a claimed port, or ok = false when the timer fires first.
func (h *Host) next(ctx context.Context, queue <-chan datagram, timer <-chan time.Time) (d datagram, ok bool, err error) {
	select {
	case d := <-queue:
		return d, true, nil
	case <-timer:
		return datagram{}, false, nil
	case <-h.done:
		return datagram{}, false, h.err
	case <-ctx.Done():
		return datagram{}, false, context.Cause(ctx)
	}
}

// Resolve asks for the MAC of ip, again and again until ctx ends.
func (h *Host) Resolve(ctx context.Context, ip netip.Addr) (net.HardwareAddr, error) {
	request := appendARP(appendEther(nil, broadcast, h.cfg.MAC, typeARP), 1, h.cfg.MAC, h.cfg.IP, make(net.HardwareAddr, 6), ip)
	var mac net.HardwareAddr
	known := func() bool { mac = h.neigh[ip]; return mac != nil }
	err := h.insist(ctx, request, known)
	if err != nil {
		return nil, fmt.Errorf("resolve %v: %w", ip, err)
	}
	return mac, nil
}

// insist sends frame unless ready, and again every half second until ready.
func (h *Host) insist(ctx context.Context, frame []byte, ready func() bool) error {
	h.mu.Lock()
	already := ready()
	h.mu.Unlock()
	if already {
		return nil
	}
	for {
		if err := h.link.WriteFrame(frame); err != nil {
			return err
		}
		attempt, cancel := context.WithTimeout(ctx, retry)
		err := h.wait(attempt, ready)
		cancel()
		if err == nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
}

// Ping sends one echo request with size bytes of payload and waits for its answer.
func (h *Host) Ping(ctx context.Context, ip netip.Addr, size int) (time.Duration, error) {
	mac, err := h.Resolve(ctx, ip)
	if err != nil {
		return 0, fmt.Errorf("ping: %w", err)
	}
	if ipSize+icmpSize+size > h.cfg.MTU {
		return 0, fmt.Errorf("ping %v: %d bytes do not fit the MTU of %d", ip, size, h.cfg.MTU)
	}
	h.mu.Lock()
	h.sequence++
	sequence := h.sequence
	h.mu.Unlock()

	rest := binary.BigEndian.AppendUint16([]byte{0x73, 0x74}, sequence)
	rest = append(rest, make([]byte, size)...)
	Pattern(uint32(sequence), 0, rest[4:])
	frame := appendIPv4(appendEther(nil, mac, h.cfg.MAC, typeIPv4), h.cfg.IP, ip, protocolICMP, icmpSize+size)
	frame = appendEcho(frame, 8, rest)

	start := time.Now()
	if err := h.link.WriteFrame(frame); err != nil {
		return 0, fmt.Errorf("ping %v: %w", ip, err)
	}
	var pong []byte
	if err := h.wait(ctx, func() (ok bool) { pong, ok = h.pongs[sequence]; delete(h.pongs, sequence); return ok }); err != nil {
		return 0, fmt.Errorf("ping %v: %w", ip, err)
	}
	if !bytes.Equal(pong, rest[4:]) {
		return 0, fmt.Errorf("ping %v: the answer's %d bytes are not those sent", ip, len(pong))
	}
	return time.Since(start), nil
}

// Echo sends one datagram of pattern to ip's echo service and compares what comes back.
func (h *Host) Echo(ctx context.Context, ip netip.Addr, size int, seed uint32) error {
	mac, err := h.Resolve(ctx, ip)
	if err != nil {
		return fmt.Errorf("UDP echo: %w", err)
	}
	port, queue, err := h.open(0)
	if err != nil {
		return fmt.Errorf("UDP echo: %w", err)
	}
	defer h.release(port)
	data := make([]byte, size)
	Pattern(seed, 0, data)
	if err := h.sendUDP(mac, port, netip.AddrPortFrom(ip, echoPort), data); err != nil {
		return fmt.Errorf("UDP echo: %w", err)
	}
	d, _, err := h.next(ctx, queue, nil)
	if err != nil {
		return fmt.Errorf("UDP echo from %v: %w", ip, err)
	}
	if !bytes.Equal(d.data, data) {
		return fmt.Errorf("UDP echo from %v: the answer's %d bytes are not the %d sent", ip, len(d.data), size)
	}
	return nil
}

// SendFrame sends a whole Ethernet frame as it is.
func (h *Host) SendFrame(frame []byte) error { return h.link.WriteFrame(frame) }

// Frame takes the oldest frame of an EtherType other than IP and ARP that was received, or waits for one. A VLAN-tagged
// frame's EtherType is that of its tag.
func (h *Host) Frame(ctx context.Context, etherType uint16) ([]byte, error) {
	var found []byte
	err := h.wait(ctx, func() bool {
		for i, f := range h.other {
			if binary.BigEndian.Uint16(f[12:]) == etherType {
				found = f
				h.other = append(h.other[:i:i], h.other[i+1:]...)
				return true
			}
		}
		return false
	})
	if err != nil {
		return nil, fmt.Errorf("wait for a frame of type %#04x: %w", etherType, err)
	}
	return found, nil
}

// Frames takes all frames of an EtherType, as Frame does, that have been received and kept: the last 256 of all types.
func (h *Host) Frames(etherType uint16) (found [][]byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.other = slices.DeleteFunc(h.other, func(f []byte) bool {
		if binary.BigEndian.Uint16(f[12:]) != etherType {
			return false
		}
		found = append(found, f)
		return true
	})
	return found
}
