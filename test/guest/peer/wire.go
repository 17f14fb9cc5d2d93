package peer

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
)

// Sizes and numbers of Ethernet, ARP (RFC 826), IPv4 (RFC 791), ICMP (RFC 792) and UDP (RFC 768).
const (
	etherSize = 14
	arpSize   = 28
	ipSize    = 20
	icmpSize  = 8
	udpSize   = 8

	typeIPv4 = 0x0800
	typeARP  = 0x0806
	typeIPv6 = 0x86dd

	protocolICMP = 1
	protocolUDP  = 17

	echoPort = 7
)

var (
	errShort    = errors.New("packet is cut short")
	errChecksum = errors.New("wrong checksum")
	errFragment = errors.New("fragment")
	errForm     = errors.New("not the plain form")
)

func appendEther(b []byte, to, from net.HardwareAddr, etherType uint16) []byte {
	b = append(b, to...)
	b = append(b, from...)
	return binary.BigEndian.AppendUint16(b, etherType)
}

func sum(s uint32, b []byte) uint32 {
	for ; len(b) > 1; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		s += uint32(b[0]) << 8
	}
	return s
}

func fold(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return ^uint16(s)
}

// appendIPv4 appends a header for a payload of the given size.
func appendIPv4(b []byte, from, to netip.Addr, protocol byte, size int) []byte {
	at := len(b)
	b = append(b, 0x45, 0)
	b = binary.BigEndian.AppendUint16(b, uint16(ipSize+size))
	b = append(b, 0, 0, 0x40, 0, 64, protocol, 0, 0)
	b = append(b, from.AsSlice()...)
	b = append(b, to.AsSlice()...)
	binary.BigEndian.PutUint16(b[at+10:], fold(sum(0, b[at:])))
	return b
}

type ipv4 struct {
	from, to netip.Addr
	protocol byte
	payload  []byte
}

func parseIPv4(b []byte) (ipv4, error) {
	if len(b) < ipSize {
		return ipv4{}, errShort
	}
	size := int(binary.BigEndian.Uint16(b[2:]))
	switch {
	case b[0] != 0x45 || size < ipSize:
		return ipv4{}, errForm
	case size > len(b):
		return ipv4{}, errShort
	case fold(sum(0, b[:ipSize])) != 0:
		return ipv4{}, errChecksum
	case binary.BigEndian.Uint16(b[6:])&0x3fff != 0:
		return ipv4{}, errFragment
	}
	return ipv4{netip.AddrFrom4([4]byte(b[12:])), netip.AddrFrom4([4]byte(b[16:])), b[9], b[ipSize:size]}, nil
}

func pseudoSum(from, to netip.Addr, size int) uint32 {
	return sum(sum(protocolUDP+uint32(size), from.AsSlice()), to.AsSlice())
}

func appendUDP(b []byte, from, to netip.AddrPort, data []byte) []byte {
	at := len(b)
	b = binary.BigEndian.AppendUint16(b, from.Port())
	b = binary.BigEndian.AppendUint16(b, to.Port())
	b = binary.BigEndian.AppendUint16(b, uint16(udpSize+len(data)))
	b = append(b, 0, 0)
	b = append(b, data...)
	s := fold(sum(pseudoSum(from.Addr(), to.Addr(), udpSize+len(data)), b[at:]))
	if s == 0 {
		s = 0xffff
	}
	binary.BigEndian.PutUint16(b[at+6:], s)
	return b
}

type udp struct {
	from, to uint16
	data     []byte
}

// parseUDP verifies the checksum unless it is absent or partial.
func parseUDP(p ipv4, partial bool) (udp, error) {
	b := p.payload
	if len(b) < udpSize {
		return udp{}, errShort
	}
	size := int(binary.BigEndian.Uint16(b[4:]))
	if size < udpSize || size > len(b) {
		return udp{}, errShort
	}
	b = b[:size]
	if !partial && binary.BigEndian.Uint16(b[6:]) != 0 && fold(sum(pseudoSum(p.from, p.to, size), b)) != 0 {
		return udp{}, errChecksum
	}
	return udp{binary.BigEndian.Uint16(b), binary.BigEndian.Uint16(b[2:]), b[udpSize:]}, nil
}

func appendARP(b []byte, operation uint16, fromMAC net.HardwareAddr, from netip.Addr, toMAC net.HardwareAddr, to netip.Addr) []byte {
	b = append(b, 0, 1, 8, 0, 6, 4)
	b = binary.BigEndian.AppendUint16(b, operation)
	b = append(b, fromMAC...)
	b = append(b, from.AsSlice()...)
	b = append(b, toMAC...)
	return append(b, to.AsSlice()...)
}

type arp struct {
	operation uint16
	mac       net.HardwareAddr
	from, to  netip.Addr
}

func parseARP(b []byte) (arp, error) {
	if len(b) < arpSize {
		return arp{}, errShort
	}
	if [6]byte(b) != [6]byte{0, 1, 8, 0, 6, 4} {
		return arp{}, errForm
	}
	return arp{binary.BigEndian.Uint16(b[6:]), net.HardwareAddr(b[8:14]),
		netip.AddrFrom4([4]byte(b[14:])), netip.AddrFrom4([4]byte(b[24:]))}, nil
}
