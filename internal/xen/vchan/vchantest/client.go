package vchantest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// Offsets and values of the shared page, written down here a second time: the
// client must not learn them from the server.
const (
	leftCons   = 0
	leftProd   = 4
	rightCons  = 8
	rightProd  = 12
	leftOrder  = 16
	rightOrder = 18
	cliLive    = 20
	srvLive    = 21
	cliNotify  = 22 // read by the client when it has done something
	srvNotify  = 23
	grantList  = 24

	notifyWrite = 1
	notifyRead  = 2
)

var (
	errNoNodes = errors.New("no endpoint in xenstore")
	errBind    = errors.New("event channel cannot be bound")
	errMap     = errors.New("grant cannot be mapped")
	errRevoked = errors.New("server has hung up")
)

// Client is one client. Its steps are small: each touches shared memory, or
// asks Xen, a single time, or calls Trace in between.
type Client struct {
	// Trace is called after each access to shared memory. Nil: never.
	Trace func(op string, v uint32)

	x     *Xen
	ref   uint32
	port  uint32
	bound uint32 // the port that is bound, 0 none
	page  []byte
	left  buffer // we write
	right buffer // we read

	mu       sync.Mutex
	cond     *sync.Cond
	pending  bool // event
	serial   int  // of the last event
	closed   bool
	rd, wr   deadline
	reading  sync.Mutex
	writing  sync.Mutex
	detached bool
}

// buffer is a ring in one piece or in pages.
type buffer struct {
	size  uint32
	pages [][]byte
}

func (b *buffer) at(i uint32) []byte {
	i &= b.size - 1
	n := uint32(len(b.pages[0]))
	return b.pages[i/n][i%n:]
}

type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) expired() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

// NewClient returns a client that has not done anything yet.
func NewClient(x *Xen) *Client {
	c := &Client{x: x}
	c.cond = sync.NewCond(&c.mu)
	return c
}

// Dial attaches a client as vchan-socket-proxy does: it waits for xenstore's
// values to change when it cannot attach with what they say.
func Dial(ctx context.Context, x *Xen) (*Client, error) {
	for {
		_, _, changed := x.Published()
		c := NewClient(x)
		err := c.Attach()
		if err == nil {
			return c, nil
		}
		c.Close()
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("dial: %w (%w)", ctx.Err(), err)
		}
	}
}

func (c *Client) traced(op string, v uint32) {
	if c.Trace != nil {
		c.Trace(op, v)
	}
}

// Attach is libxenvchan_client_init.
func (c *Client) Attach() error {
	c.ref, _, _ = c.x.Published()
	c.traced("ring-ref", c.ref)
	_, c.port, _ = c.x.Published()
	c.traced("event-channel", c.port)
	if c.ref == 0 || c.port == 0 {
		return errNoNodes
	}
	if err := c.bind(); err != nil {
		return err
	}
	c.traced("bind", c.port)
	if err := c.mapPages(); err != nil {
		return err
	}
	c.traced("map", c.ref)
	storeByte(c.page, cliLive, 1)
	c.traced("cli_live", 1)
	storeByte(c.page, srvNotify, notifyWrite)
	c.traced("srv_notify", notifyWrite)
	c.notify()
	return nil
}

func (c *Client) bind() error {
	c.x.mu.Lock()
	other, ok := c.x.ports[c.port]
	if !ok || other != nil {
		c.x.mu.Unlock()
		return errBind
	}
	c.x.ports[c.port] = c
	c.bound = c.port
	c.x.mu.Unlock()
	// Xen makes the binder's port pending at once.
	c.wake()
	return nil
}

func (c *Client) mapPages() error {
	c.x.mu.Lock()
	defer c.x.mu.Unlock()
	g := c.x.grants[c.ref]
	if g == nil {
		return errMap
	}
	page := g.mem
	refs := grantList
	ring := func(order uint16) (buffer, error) {
		switch {
		case order == 10 || order == 11:
			return buffer{size: 1 << order, pages: [][]byte{page[1<<order : 2<<order]}}, nil
		case order < 12 || order > 20:
			return buffer{}, fmt.Errorf("order %d", order)
		}
		b := buffer{size: 1 << order}
		for range 1 << (order - 12) {
			g := c.x.grants[load32(page, refs)]
			refs += 4
			if g == nil {
				return b, errMap
			}
			b.pages = append(b.pages, g.mem)
		}
		return b, nil
	}
	var err error
	if c.left, err = ring(load16(page, leftOrder)); err != nil {
		return err
	}
	if c.right, err = ring(load16(page, rightOrder)); err != nil {
		return err
	}
	c.page = page
	return nil
}

// notify sends an event to the server, if the channel is bound.
func (c *Client) notify() {
	c.x.mu.Lock()
	if _, ok := c.x.ports[c.bound]; ok && c.bound != 0 {
		c.x.pending = true
		c.x.events++
		c.x.event.Signal()
	}
	c.x.mu.Unlock()
	c.traced("event", c.bound)
}

// wake is an event for the client.
func (c *Client) wake() {
	c.mu.Lock()
	c.pending = true
	c.serial++
	c.cond.Broadcast()
	c.mu.Unlock()
}

// TakeEvent takes a pending event, as reading the event channel does.
func (c *Client) TakeEvent() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.pending
	c.pending = false
	return p
}

// Pending says whether there is an event to take.
func (c *Client) Pending() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.pending
}

// Detach is libxenvchan_close, and what the kernel does for a client that is
// killed: the live byte is cleared, then comes an event, then the channel is
// closed. It is a client's last step and does nothing a second time.
func (c *Client) Detach() {
	if c.detached {
		return
	}
	c.detached = true
	if c.page != nil {
		storeByte(c.page, cliLive, 0)
		c.traced("cli_live", 0)
		c.notify()
	}
	c.x.mu.Lock()
	if c.x.ports[c.bound] == c {
		c.x.ports[c.bound] = nil
	}
	c.x.mu.Unlock()
	c.traced("unbind", c.bound)
}

// own loads an index that only clients write: no place for others to run.
func (c *Client) own(off int) uint32 { return atomic.LoadUint32(word(c.page, off)) }

func (c *Client) load(op string, off int) uint32 {
	v := atomic.LoadUint32(word(c.page, off))
	c.traced(op, v)
	return v
}

// open is libxenvchan_is_open.
func (c *Client) open() bool {
	v := loadByte(c.page, srvLive)
	c.traced("srv_live", uint32(v))
	return v != 0
}

// request is request_notify: a client's wishes are in srv_notify.
func (c *Client) request(bit byte) {
	atomic.OrUint32(word(c.page, cliLive), uint32(bit)<<24)
	c.traced("request", uint32(bit))
}

// asked is send_notify's test: what the server wants to know is in cli_notify.
func (c *Client) asked(bit byte) bool {
	old := atomic.AndUint32(word(c.page, cliLive), ^(uint32(bit) << 16))
	c.traced("asked", old>>16&uint32(bit))
	return byte(old>>16)&bit != 0
}

// Wanted says whether the server has asked for an event: 1 for a write, 2 for a
// read.
func (c *Client) Wanted(bit byte) bool { return loadByte(c.page, cliNotify)&bit != 0 }

func (c *Client) ready() uint32 {
	n := c.load("right.prod", rightProd) - c.own(rightCons)
	if n > c.right.size {
		return 0
	}
	return n
}

func (c *Client) space() uint32 {
	n := c.left.size - (c.own(leftProd) - c.load("left.cons", leftCons))
	if n > c.left.size {
		return 0
	}
	return n
}

// TryRead is libxenvchan_read of a vchan that does not block: 0 bytes if there
// are none, io.EOF when the server has hung up and all is read.
func (c *Client) TryRead(p []byte) (int, error) {
	n := c.ready()
	if uint64(n) < uint64(len(p)) {
		c.request(notifyWrite)
		n = c.ready()
	}
	n = uint32(min(uint64(n), uint64(len(p))))
	if n == 0 {
		if len(p) > 0 && !c.open() {
			return 0, io.EOF
		}
		return 0, nil
	}
	cons := c.own(rightCons)
	for got := uint32(0); got < n; {
		got += uint32(copy(p[got:n], c.right.at(cons+got)))
	}
	c.traced("copied", uint32(p[0]))
	atomic.StoreUint32(word(c.page, rightCons), cons+n)
	c.traced("right.cons=", cons+n)
	if c.asked(notifyRead) {
		c.notify()
	}
	return int(n), nil
}

// TryWrite is libxenvchan_write of a vchan that does not block.
func (c *Client) TryWrite(p []byte) (int, error) {
	if !c.open() {
		return 0, errRevoked
	}
	n := c.space()
	if uint64(n) < uint64(len(p)) {
		c.request(notifyRead)
		n = c.space()
	}
	n = uint32(min(uint64(n), uint64(len(p))))
	if n == 0 {
		return 0, nil
	}
	prod := c.own(leftProd)
	for put := uint32(0); put < n; {
		put += uint32(copy(c.left.at(prod+put), p[put:n]))
	}
	atomic.StoreUint32(word(c.page, leftProd), prod+n)
	c.traced("left.prod=", prod+n)
	if c.asked(notifyWrite) {
		c.notify()
	}
	return int(n), nil
}

// wait waits for an event later than seen, a deadline or Close.
func (c *Client) wait(d *deadline, seen int) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return net.ErrClosed
		case d.expired():
			return os.ErrDeadlineExceeded
		case c.serial != seen:
			return nil
		}
		c.cond.Wait()
	}
}

// check returns why a call must not go on, or the last event's serial number.
func (c *Client) check(d *deadline) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed:
		return 0, net.ErrClosed
	case d.expired():
		return 0, os.ErrDeadlineExceeded
	}
	return c.serial, nil
}

// Read reads at least one byte, waiting for it: net.Conn.
func (c *Client) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	for {
		seen, err := c.check(&c.rd)
		if err != nil {
			return 0, opError("read", err)
		}
		if n, err := c.TryRead(p); n > 0 || err != nil || len(p) == 0 {
			return n, opError("read", err)
		}
		if err := c.wait(&c.rd, seen); err != nil {
			return 0, opError("read", err)
		}
	}
}

// Write writes all of p: net.Conn.
func (c *Client) Write(p []byte) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	for total := 0; ; {
		seen, err := c.check(&c.wr)
		if err != nil {
			return total, opError("write", err)
		}
		n, err := c.TryWrite(p[total:])
		total += n
		if err != nil || total == len(p) {
			return total, opError("write", err)
		}
		if n > 0 {
			continue
		}
		if err := c.wait(&c.wr, seen); err != nil {
			return total, opError("write", err)
		}
	}
}

func opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return &net.OpError{Op: op, Net: "vchan", Err: err}
}

// Close detaches.
func (c *Client) Close() error {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil
	}
	c.closed = true
	c.cond.Broadcast()
	c.mu.Unlock()
	// Reads and Writes under way see closed at their next look.
	c.reading.Lock()
	c.writing.Lock()
	c.Detach()
	c.writing.Unlock()
	c.reading.Unlock()
	return nil
}

// LocalAddr returns an address without meaning.
func (c *Client) LocalAddr() net.Addr { return vchanAddr{} }

// RemoteAddr returns an address without meaning.
func (c *Client) RemoteAddr() net.Addr { return vchanAddr{} }

type vchanAddr struct{}

func (vchanAddr) Network() string { return "vchan" }
func (vchanAddr) String() string  { return "client" }

// SetDeadline sets both deadlines.
func (c *Client) SetDeadline(t time.Time) error { return c.set(t, &c.rd, &c.wr) }

// SetReadDeadline sets the deadline of Read.
func (c *Client) SetReadDeadline(t time.Time) error { return c.set(t, &c.rd) }

// SetWriteDeadline sets the deadline of Write.
func (c *Client) SetWriteDeadline(t time.Time) error { return c.set(t, &c.wr) }

func (c *Client) set(t time.Time, ds ...*deadline) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, d := range ds {
		d.at = t
		if d.timer != nil {
			d.timer.Stop()
			d.timer = nil
		}
		if left := time.Until(t); !t.IsZero() && left > 0 {
			d.timer = time.AfterFunc(left, func() {
				c.mu.Lock()
				defer c.mu.Unlock()
				c.cond.Broadcast()
			})
		}
		c.cond.Broadcast()
	}
	return nil
}

// Page returns the shared page, for peers that do not keep to the protocol.
func (c *Client) Page() []byte { return c.page }
