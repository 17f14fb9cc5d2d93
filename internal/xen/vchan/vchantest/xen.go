// Package vchantest has what a vchan server needs in memory, and a client that
// does, step by step, what libxenvchan's client does.
package vchantest

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"sync"
	"sync/atomic"
	"unsafe"

	"github.com/stubinit/stubinit/internal/xen/vchan"
)

const pageSize = 4096

// Xen stands for the hypervisor, both kernels and xenstored: the server's
// domain sees it as a vchan.Transport, clients attach with Attach or Dial.
type Xen struct {
	// Trace is called where another domain may run. Nil: never.
	Trace func(op string, v uint32)
	// Fault may fail the server's calls: "bind", "share", "publish",
	// "unpublish". Nil: none fails.
	Fault func(op string) error

	mu       sync.Mutex
	event    *sync.Cond // pending, over
	pending  bool
	over     bool
	wakeups  int
	events   int
	nextPort uint32
	nextRef  uint32
	ports    map[uint32]*Client // open event channels and who is bound
	grants   map[uint32]*grant
	ref      uint32
	port     uint32
	changed  chan struct{} // closed when ref and port change
	stores   int
}

type grant struct {
	mem   []byte // the page
	freed bool
}

// New returns a Xen without domains.
func New() *Xen {
	x := &Xen{
		nextPort: 10, nextRef: 100,
		ports:   map[uint32]*Client{},
		grants:  map[uint32]*grant{},
		changed: make(chan struct{}),
	}
	x.event = sync.NewCond(&x.mu)
	return x
}

var _ vchan.Transport = (*Xen)(nil)

func (x *Xen) traced(op string, v uint32) {
	if x.Trace != nil {
		x.Trace(op, v)
	}
}

func (x *Xen) fault(op string) error {
	if x.Fault == nil {
		return nil
	}
	return x.Fault(op)
}

// Bind makes an event channel for a client.
func (x *Xen) Bind() (uint32, error) {
	if err := x.fault("bind"); err != nil {
		return 0, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.nextPort++
	x.ports[x.nextPort] = nil
	return x.nextPort, nil
}

// Unbind closes it.
func (x *Xen) Unbind(port uint32) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	if _, ok := x.ports[port]; !ok {
		return fmt.Errorf("port %d is not bound", port)
	}
	delete(x.ports, port)
	return nil
}

// Notify sends an event to the client that is bound to port.
func (x *Xen) Notify(port uint32) error {
	x.mu.Lock()
	c, ok := x.ports[port]
	x.mu.Unlock()
	if !ok {
		return fmt.Errorf("port %d is not bound", port)
	}
	if c != nil {
		c.wake()
	}
	x.traced("notify", port)
	return nil
}

// Wait waits for an event from a client.
func (x *Xen) Wait() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	for !x.pending && !x.over {
		x.event.Wait()
	}
	if x.over {
		return net.ErrClosed
	}
	x.pending = false
	x.wakeups++
	return nil
}

// Pending says whether Wait would return at once.
func (x *Xen) Pending() bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.pending
}

// Wakeups returns how often Wait has returned with an event.
func (x *Xen) Wakeups() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.wakeups
}

// Events returns how many events clients have sent.
func (x *Xen) Events() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.events
}

// Interrupt ends Wait.
func (x *Xen) Interrupt() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.over = true
	x.event.Broadcast()
}

// Raise is an event from outside, as a hostile client can send at any time.
func (x *Xen) Raise() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.pending = true
	x.events++
	x.event.Signal()
}

// Share grants zeroed pages.
func (x *Xen) Share(pages, live int, port uint32) (vchan.Memory, error) {
	if err := x.fault("share"); err != nil {
		return vchan.Memory{}, err
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	// In words, so that the page is aligned.
	words := make([]uint64, pages*pageSize/8)
	m := vchan.Memory{Bytes: unsafe.Slice((*byte)(unsafe.Pointer(&words[0])), pages*pageSize)}
	var granted []*grant
	for i := range pages {
		x.nextRef++
		g := &grant{mem: m.Bytes[i*pageSize : (i+1)*pageSize : (i+1)*pageSize]}
		x.grants[x.nextRef] = g
		granted = append(granted, g)
		m.Refs = append(m.Refs, x.nextRef)
	}
	refs := m.Refs
	m.Free = func() error {
		storeByte(granted[0].mem, live, 0)
		x.Notify(port)
		x.mu.Lock()
		defer x.mu.Unlock()
		for i, g := range granted {
			if g.freed {
				return errors.New("freed twice")
			}
			g.freed = true
			delete(x.grants, refs[i])
		}
		return nil
	}
	return m, nil
}

// Publish writes both nodes, one after the other, and fires watches.
func (x *Xen) Publish(ctx context.Context, ref, port uint32) error {
	x.traced("publish", ref)
	err := x.fault("publish")
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return err
	}
	old, _, _ := x.Published()
	x.store(old, port)
	x.traced("port published", port)
	x.store(ref, port)
	x.traced("published", ref)
	return nil
}

func (x *Xen) store(ref, port uint32) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.ref, x.port = ref, port
	x.stores++
	close(x.changed)
	x.changed = make(chan struct{})
}

// Unpublish removes them.
func (x *Xen) Unpublish(context.Context) error {
	if err := x.fault("unpublish"); err != nil {
		return err
	}
	x.store(0, 0)
	return nil
}

// Close checks that everything was given back.
func (x *Xen) Close() error {
	x.Interrupt()
	x.mu.Lock()
	defer x.mu.Unlock()
	if len(x.ports) > 0 || len(x.grants) > 0 {
		return fmt.Errorf("%d ports and %d grants were not given back", len(x.ports), len(x.grants))
	}
	return nil
}

// Published returns what xenstore says, and a channel that is closed when it
// says something else.
func (x *Xen) Published() (ref, port uint32, changed <-chan struct{}) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.ref, x.port, x.changed
}

// Publications counts the changes of what xenstore says.
func (x *Xen) Publications() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.stores
}

// Hash writes all that one run of a test can differ in from another.
func (x *Xen) Hash(h *maphash.Hash) {
	x.mu.Lock()
	defer x.mu.Unlock()
	b := []byte{0}
	if x.pending {
		b[0] = 1
	}
	for _, v := range []uint32{x.ref, x.port, x.nextRef, x.nextPort} {
		b = binary.LittleEndian.AppendUint32(b, v)
	}
	for port := range x.nextPort + 1 {
		if c, ok := x.ports[port]; ok {
			b = append(b, byte(port), byte(port>>8))
			if c != nil {
				b = append(b, 1)
			}
		}
	}
	h.Write(b)
	for ref := range x.nextRef + 1 {
		if g := x.grants[ref]; g != nil {
			h.Write(g.mem)
		}
	}
}

// Page returns the page that is granted by ref, nil if it is not.
func (x *Xen) Page(ref uint32) []byte {
	x.mu.Lock()
	defer x.mu.Unlock()
	if g := x.grants[ref]; g != nil {
		return g.mem
	}
	return nil
}

func word(mem []byte, off int) *uint32 {
	return (*uint32)(unsafe.Pointer(&mem[off : off+4][0]))
}

// storeByte is a byte store as C does it, for the race detector by way of the
// word.
func storeByte(mem []byte, off int, v byte) {
	w, shift := word(mem, off&^3), 8*(off&3)
	for {
		old := atomic.LoadUint32(w)
		if atomic.CompareAndSwapUint32(w, old, old&^(0xff<<shift)|uint32(v)<<shift) {
			return
		}
	}
}

func loadByte(mem []byte, off int) byte {
	return byte(atomic.LoadUint32(word(mem, off&^3)) >> (8 * (off & 3)))
}

func load16(mem []byte, off int) uint16 { return uint16(load32(mem, off&^3) >> (8 * (off & 3))) }
func load32(mem []byte, off int) uint32 { return atomic.LoadUint32(word(mem, off)) }
