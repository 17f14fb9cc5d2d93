package vchan

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// ErrPeerIndex is the reason of a session that ended because the client put
// an impossible index into the shared page.
var ErrPeerIndex = errors.New("peer's ring index is out of range")

// ring is one direction of a vchan: a buffer of a power of two bytes and two
// indices that count bytes modulo 2^32. It is memory and nothing else. Our
// own index is kept here and only ever written to the page; the peer's is
// read once an operation, checked, and not looked at again.
type ring struct {
	page *page
	cons *uint32
	prod *uint32
	data []byte
	own  uint32 // cons of a ring that we read, prod of one that we write
}

func newRing(p *page, off int, data []byte) ring {
	return ring{
		page: p,
		cons: p.word(off + offIndexCons),
		prod: p.word(off + offIndexProd),
		data: data,
	}
}

func (r *ring) size() uint32 { return uint32(len(r.data)) }

// unread returns how many bytes the client has written and we have not read.
func (r *ring) unread() (uint32, error) {
	prod := atomic.LoadUint32(r.prod)
	r.page.traced("prod", prod)
	if n := prod - r.own; n <= r.size() {
		return n, nil
	}
	return 0, fmt.Errorf("%w: producer %#x, consumer %#x, ring of %d", ErrPeerIndex, prod, r.own, r.size())
}

// untaken returns how many bytes we have written and the client has not read.
func (r *ring) untaken() (uint32, error) {
	cons := atomic.LoadUint32(r.cons)
	r.page.traced("cons", cons)
	if n := r.own - cons; n <= r.size() {
		return n, nil
	}
	return 0, fmt.Errorf("%w: consumer %#x, producer %#x, ring of %d", ErrPeerIndex, cons, r.own, r.size())
}

// peek copies unread bytes into p, as many as fit, and leaves them in the
// ring. What is decided on the bytes must be decided on the copy.
func (r *ring) peek(p []byte) (int, error) {
	n, err := r.unread()
	if err != nil {
		return 0, err
	}
	p = p[:min(uint64(len(p)), uint64(n))]
	at := r.own & (r.size() - 1)
	c := copy(p, r.data[at:])
	copy(p[c:], r.data)
	return len(p), nil
}

// skip takes n bytes, which peek or unread has seen, out of the ring.
func (r *ring) skip(n int) {
	r.own += uint32(n)
	atomic.StoreUint32(r.cons, r.own)
	r.page.traced("skip", r.own)
}

// write copies as much of p into the ring as there is room for.
func (r *ring) write(p []byte) (int, error) {
	used, err := r.untaken()
	if err != nil {
		return 0, err
	}
	n := min(uint64(len(p)), uint64(r.size()-used))
	if n == 0 {
		return 0, nil
	}
	p = p[:n]
	at := r.own & (r.size() - 1)
	c := copy(r.data[at:], p)
	copy(r.data, p[c:])
	r.own += uint32(n)
	atomic.StoreUint32(r.prod, r.own)
	r.page.traced("write", r.own)
	return int(n), nil
}

// rewind takes back what the client has not read. Only right while nobody is
// attached: a client that had already seen the old index would read on past
// the new one. So the caller makes sure afterwards that nobody came.
func (r *ring) rewind() error {
	n, err := r.untaken()
	if err != nil || n == 0 {
		return err
	}
	r.own -= n
	atomic.StoreUint32(r.prod, r.own)
	r.page.traced("rewind", r.own)
	return nil
}
