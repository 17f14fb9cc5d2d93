package peer

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"time"
)

// The bulk protocol: a reliable one-way transfer over UDP, go-back-N with cumulative acknowledgements. ../src/bulk.c is
// the guest's side. Every datagram is a header (big-endian) and, for DATA, one segment of payload:
//
//	0  u32 "SBLK"
//	4  u8  type: OPEN, DATA, ACK, FIN, FINACK
//	5  u8  flags: 1 = acknowledge this now
//	6  u16 segment size; all segments but the last have it, a multiple of 4
//	8  u32 session, chosen by the sender
//	12 u32 sequence: DATA: number of the segment; ACK: the next one expected; FIN, FINACK: number of all segments
//	16 u32 bytes in all
//	20 u32 CRC-32 of all bytes, in FIN the sender's, in FINACK the receiver's
//
// The sender opens, sends a window of segments, asks for an acknowledgement with every eighth and the window's last,
// goes back to the first one missing after a time-out or three equal acknowledgements, and ends with FIN. The receiver
// takes segments in order only and answers at once whatever is out of order.
const (
	bulkMagic      = 0x53424c4b
	bulkHeaderSize = 24
	flagAnswer     = 1
	answerEvery    = 8
	windowSegments = 32
	windowBytes    = 48 << 10
	firstTimeout   = 300 * time.Millisecond
	longestTimeout = 2 * time.Second
)

const (
	bulkOpen = iota + 1
	bulkData
	bulkAck
	bulkFin
	bulkFinAck
)

type header struct {
	kind, flags                   uint8
	segment                       uint16
	session, sequence, total, crc uint32
}

var errNotBulk = errors.New("not a datagram of the bulk protocol")

func (h header) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, bulkMagic)
	b = append(b, h.kind, h.flags)
	b = binary.BigEndian.AppendUint16(b, h.segment)
	for _, v := range []uint32{h.session, h.sequence, h.total, h.crc} {
		b = binary.BigEndian.AppendUint32(b, v)
	}
	return b
}

func parseHeader(b []byte) (header, []byte, error) {
	if len(b) < bulkHeaderSize || binary.BigEndian.Uint32(b) != bulkMagic || b[4] < bulkOpen || b[4] > bulkFinAck {
		return header{}, nil, errNotBulk
	}
	u32 := func(at int) uint32 { return binary.BigEndian.Uint32(b[at:]) }
	return header{b[4], b[5], binary.BigEndian.Uint16(b[6:]), u32(8), u32(12), u32(16), u32(20)}, b[bulkHeaderSize:], nil
}

// segments is the number of segments in all; the segment size must not be 0.
func (h header) segments() uint32 {
	return uint32((uint64(h.total) + uint64(h.segment) - 1) / uint64(h.segment))
}

func (h header) size(sequence uint32) int {
	return int(min(uint64(h.segment), uint64(h.total)-uint64(sequence)*uint64(h.segment)))
}

// Transfer is how a bulk transfer went.
type Transfer struct {
	Bytes   uint32
	CRC     uint32 // IEEE, equal on both sides
	Resent  int    // segments sent more than once; sender only
	Elapsed time.Duration
}

// Send transfers bytes of the pattern of seed to ip's port.
func (h *Host) Send(ctx context.Context, ip netip.Addr, port uint16, bytes, seed uint32) (Transfer, error) {
	to := netip.AddrPortFrom(ip, port)
	fail := func(err error) (Transfer, error) { return Transfer{}, fmt.Errorf("bulk send to %v: %w", to, err) }
	mac, err := h.Resolve(ctx, ip)
	if err != nil {
		return fail(err)
	}
	local, queue, err := h.open(0)
	if err != nil {
		return fail(err)
	}
	defer h.release(local)
	s := sender{
		host: h, mac: mac, local: local, to: to, queue: queue, seed: seed,
		header: header{segment: uint16(h.cfg.MTU-ipSize-udpSize-bulkHeaderSize) &^ 3, session: rand.Uint32(), total: bytes},
	}
	s.window = min(windowSegments, max(1, windowBytes/uint32(s.header.segment)))
	if err := s.run(ctx); err != nil {
		return fail(err)
	}
	return Transfer{bytes, s.crc, s.resent, time.Since(s.started)}, nil
}

type sender struct {
	host   *Host
	mac    net.HardwareAddr
	local  uint16
	to     netip.AddrPort
	queue  <-chan datagram
	header header
	seed   uint32
	window uint32

	acked, next, hashed, recover uint32
	duplicates, resent           int
	crc                          uint32
	started                      time.Time
}

func (s *sender) post(kind, flags uint8, sequence, crc uint32, payload int) error {
	h := s.header
	h.kind, h.flags, h.sequence, h.crc = kind, flags, sequence, crc
	b := h.append(make([]byte, 0, bulkHeaderSize+payload))
	if payload > 0 {
		b = b[:bulkHeaderSize+payload]
		Pattern(s.seed, uint64(sequence)*uint64(h.segment), b[bulkHeaderSize:])
		if sequence == s.hashed {
			s.crc = crc32.Update(s.crc, crc32.IEEETable, b[bulkHeaderSize:])
			s.hashed++
		} else {
			s.resent++
		}
	}
	return s.host.sendUDP(s.mac, s.local, s.to, b)
}

// ask sends a header of its own until an answer of the wanted kind is there.
func (s *sender) ask(ctx context.Context, kind, answer uint8, sequence, crc uint32) (header, error) {
	timeout := firstTimeout
	for {
		if err := s.post(kind, flagAnswer, sequence, crc, 0); err != nil {
			return header{}, err
		}
		timer := time.NewTimer(timeout)
		for {
			got, ok, err := s.answer(ctx, timer.C)
			if err != nil {
				timer.Stop()
				return header{}, err
			}
			if !ok {
				break
			}
			if got.kind == answer {
				timer.Stop()
				return got, nil
			}
		}
		timeout = min(2*timeout, longestTimeout)
	}
}

// answer waits for a datagram of this session; ok = false when the timer fired.
func (s *sender) answer(ctx context.Context, timer <-chan time.Time) (header, bool, error) {
	for {
		d, ok, err := s.host.next(ctx, s.queue, timer)
		if err != nil || !ok {
			return header{}, false, err
		}
		if got, _, err := parseHeader(d.data); err == nil && d.from == s.to && got.session == s.header.session {
			return got, true, nil
		}
	}
}

func (s *sender) run(ctx context.Context) error {
	if _, err := s.ask(ctx, bulkOpen, bulkAck, 0, 0); err != nil {
		return fmt.Errorf("no receiver: %w", err)
	}
	s.started = time.Now()
	timeout := firstTimeout
	for count := s.header.segments(); s.acked < count; {
		for s.next < count && s.next-s.acked < s.window {
			var flags uint8
			if s.next%answerEvery == answerEvery-1 || s.next+1 == count || s.next+1-s.acked == s.window {
				flags = flagAnswer
			}
			if err := s.post(bulkData, flags, s.next, 0, s.header.size(s.next)); err != nil {
				return err
			}
			s.next++
		}
		timer := time.NewTimer(timeout)
		got, ok, err := s.answer(ctx, timer.C)
		timer.Stop()
		switch {
		case err != nil:
			return fmt.Errorf("after %d of %d segments: %w", s.acked, count, err)
		case !ok:
			s.goBack()
			timeout = min(2*timeout, longestTimeout)
		case got.kind != bulkAck || got.sequence > s.hashed:
		case got.sequence > s.acked:
			s.acked, s.next, s.duplicates, timeout = got.sequence, max(s.next, got.sequence), 0, firstTimeout
		case got.sequence == s.acked && s.next > s.acked:
			if s.duplicates++; s.duplicates == 3 && s.acked >= s.recover {
				s.goBack()
			}
		}
	}
	got, err := s.ask(ctx, bulkFin, bulkFinAck, s.header.segments(), s.crc)
	if err != nil {
		return fmt.Errorf("no final answer: %w", err)
	}
	if got.crc != s.crc {
		return fmt.Errorf("the receiver's CRC is %08x, the sender's %08x", got.crc, s.crc)
	}
	return nil
}

func (s *sender) goBack() {
	s.recover, s.next, s.duplicates = s.next, s.acked, 0
}

// Receive waits for one transfer to the port and takes it.
func (h *Host) Receive(ctx context.Context, port uint16) (Transfer, error) {
	t, err := h.takeTransfer(ctx, port)
	if err != nil {
		return Transfer{}, fmt.Errorf("bulk receive on port %d: %w", port, err)
	}
	return t, nil
}

func (h *Host) takeTransfer(ctx context.Context, port uint16) (Transfer, error) {
	_, queue, err := h.open(port)
	if err != nil {
		return Transfer{}, err
	}
	defer h.release(port)
	var open header // of the transfer that is being taken; kind 0: none yet
	var from netip.AddrPort
	var next, crc uint32
	var started time.Time
	for {
		d, _, err := h.next(ctx, queue, nil)
		if err != nil {
			return Transfer{}, fmt.Errorf("after %d segments: %w", next, err)
		}
		got, payload, err := parseHeader(d.data)
		if err != nil {
			continue
		}
		if open.kind == 0 && got.kind == bulkOpen && got.segment != 0 {
			open, from, started = got, d.from, time.Now()
		}
		if open.kind == 0 || got.session != open.session || d.from != from {
			continue
		}
		answer := open
		answer.kind, answer.flags, answer.crc = bulkAck, 0, 0
		switch got.kind {
		case bulkData:
			if got.sequence == next && next < open.segments() && len(payload) == open.size(next) {
				crc = crc32.Update(crc, crc32.IEEETable, payload)
				next++
				if got.flags&flagAnswer == 0 {
					continue
				}
			}
		case bulkFin:
			if next != open.segments() {
				continue
			}
			answer.kind, answer.crc = bulkFinAck, crc
		case bulkOpen:
		default:
			continue
		}
		answer.sequence = next
		h.mu.Lock()
		mac := h.neigh[from.Addr()]
		if answer.kind == bulkFinAck {
			h.finished[open.session] = answer // before the answer goes out, so that a repeated FIN finds it
		}
		h.mu.Unlock()
		if err := h.sendUDP(mac, port, from, answer.append(nil)); err != nil {
			return Transfer{}, err
		}
		if answer.kind == bulkFinAck {
			if got.crc != crc {
				return Transfer{}, fmt.Errorf("the sender's CRC is %08x, the receiver's %08x", got.crc, crc)
			}
			return Transfer{Bytes: open.total, CRC: crc, Elapsed: time.Since(started)}, nil
		}
	}
}

// repeatFIN returns the last answer of a transfer that is over, when its sender asks again. The caller holds mu.
func (h *Host) repeatFIN(data []byte) ([]byte, bool) {
	got, _, err := parseHeader(data)
	if err != nil || got.kind != bulkFin {
		return nil, false
	}
	answer, ok := h.finished[got.session]
	if !ok {
		return nil, false
	}
	return answer.append(nil), true
}
