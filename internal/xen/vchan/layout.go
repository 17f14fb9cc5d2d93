package vchan

import (
	"errors"
	"fmt"
	"sync/atomic"
	"unsafe"
)

// The shared page, struct vchan_interface of xen/io/libxenvchan.h. All fields
// are little endian, which is also the byte order of every machine that runs
// Xen.
const (
	pageSize  = 4096
	pageShift = 12

	offLeft       = 0  // ring_shared: u32 cons, u32 prod; the client writes, the server reads
	offRight      = 8  // ring_shared: the server writes, the client reads
	offLeftOrder  = 16 // u16
	offRightOrder = 18 // u16
	offState      = 20 // the four bytes below, one aligned word
	offCliLive    = 20
	offSrvLive    = 21
	offCliNotify  = 22 // what the client has to tell the server
	offSrvNotify  = 23 // what the server has to tell the client
	offGrants     = 24 // u32 a page, the left ring's first

	offIndexCons = 0 // inside ring_shared
	offIndexProd = 4

	minOrder   = 10 // in the shared page, at offset 1024
	largeOrder = 11 // in the shared page, at offset 2048
	maxOrder   = 20 // the most that libxenvchan's client maps
)

// The state word on a little endian machine.
const (
	shiftCliLive   = 8 * (offCliLive - offState)
	shiftSrvLive   = 8 * (offSrvLive - offState)
	shiftCliNotify = 8 * (offCliNotify - offState)
	shiftSrvNotify = 8 * (offSrvNotify - offState)
)

// Values of cli_live. The client writes 1 when it attaches and 0 when it
// leaves (its kernel writes 0 when it dies) and never reads the byte, so that
// the server may use it to remember whom it has seen: 3 is ours alone.
const (
	liveGone  = 0
	liveNew   = 1
	liveNever = 2
	liveAcked = 3
)

// Bits of cli_notify and srv_notify.
const (
	notifyWrite = 1 // VCHAN_NOTIFY_WRITE: tell when data was written
	notifyRead  = 2 // VCHAN_NOTIFY_READ: tell when data was read
)

var errOrder = errors.New("bad ring order")

// ringPages returns how many pages of its own a ring of that order has.
func ringPages(order uint) int {
	if order < pageShift {
		return 0
	}
	return 1 << (order - pageShift)
}

// checkOrders refuses what libxenvchan's client would refuse or overrun.
func checkOrders(left, right uint) error {
	for _, o := range []uint{left, right} {
		if o < minOrder || o > maxOrder {
			return fmt.Errorf("%w %d: want %d to %d", errOrder, o, minOrder, maxOrder)
		}
	}
	if left == right && left < pageShift {
		return fmt.Errorf("%w: left and right are both %d and would share their place in the page", errOrder, left)
	}
	end := pageSize
	for _, o := range []uint{left, right} {
		if o < pageShift {
			end = min(end, 1<<o)
		}
	}
	if n := ringPages(left) + ringPages(right); offGrants+4*n > end {
		return fmt.Errorf("%w: %d grants of left %d and right %d do not fit into the shared page", errOrder, n, left, right)
	}
	return nil
}

// page is the shared page. Of what stands in it only the client's own indices
// and the state word are ever read. Orders and grants are only written, again
// for each client: what one makes of them harms nobody else.
type page struct {
	mem []byte
	// trace is called after each access to shared memory, with the value
	// read or written. Tests stop there to let the peer run; nil otherwise.
	trace func(op string, v uint32)
}

func (p *page) word(off int) *uint32 {
	return (*uint32)(unsafe.Pointer(&p.mem[off : off+4][0]))
}

func (p *page) traced(op string, v uint32) {
	if p.trace != nil {
		p.trace(op, v)
	}
}

// live returns cli_live.
func (p *page) live() byte {
	v := byte(atomic.LoadUint32(p.word(offState)) >> shiftCliLive)
	p.traced("live", uint32(v))
	return v
}

// ack moves cli_live from 1 to 3 and returns what it was. A client that
// attaches or leaves at the same moment wins: its byte store makes the
// compare-and-swap fail.
func (p *page) ack() byte {
	w := p.word(offState)
	for {
		old := atomic.LoadUint32(w)
		live := byte(old >> shiftCliLive)
		if live != liveNew {
			p.traced("ack", uint32(live))
			return live
		}
		if atomic.CompareAndSwapUint32(w, old, old&^(0xff<<shiftCliLive)|liveAcked<<shiftCliLive) {
			p.traced("acked", liveAcked)
			return live
		}
	}
}

// describe writes what clients read to find the rings, and srv_live.
func (p *page) describe(leftOrder, rightOrder uint, grants []uint32) {
	atomic.StoreUint32(p.word(offLeftOrder), uint32(leftOrder|rightOrder<<16))
	for i, ref := range grants {
		atomic.StoreUint32(p.word(offGrants+4*i), ref)
	}
	w := p.word(offState)
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xff<<shiftSrvLive)|1<<shiftSrvLive) {
			return
		}
	}
}

// hangUp clears srv_live: the client's calls fail from now on, except reads
// of what is in the ring.
func (p *page) hangUp() {
	atomic.AndUint32(p.word(offState), ^uint32(0xff<<shiftSrvLive))
	p.traced("hangup", 0)
}

// request asks the client for an event when it writes or reads next. The
// caller looks at the ring again afterwards: the client may have moved its
// index just before it could see the request.
func (p *page) request(bit uint32) {
	atomic.OrUint32(p.word(offState), bit<<shiftCliNotify)
	p.traced("request", bit)
}

// asked says whether the client wants an event for what was just done, and
// takes the request back.
func (p *page) asked(bit uint32) bool {
	old := atomic.AndUint32(p.word(offState), ^(bit << shiftSrvNotify))
	p.traced("asked", old>>shiftSrvNotify&bit)
	return old>>shiftSrvNotify&bit != 0
}
