// Package vchan is the server side of libxenvchan's protocol (Xen's public
// header io/libxenvchan.h): byte streams over shared pages. It serves one
// unmodified client at a time and misses none of its reconnects.
//
// layout.go and ring.go are memory only, endpoint.go is one shared page with
// its rings, server.go the rules of sessions, conn.go a session as a net.Conn.
package vchan

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"time"
)

// Default ring orders: 16 KiB from the client, 64 KiB to it. Rings of whole
// pages save events on large answers.
const (
	DefaultLeftOrder  = 14
	DefaultRightOrder = 16
)

// publishLimit is how long xenstored may take for one publication.
const publishLimit = 10 * time.Second

// ErrSessionEnded is the error of a Write after the client has left.
var ErrSessionEnded = errors.New("the client has left")

// Options are what a Listener can be told, apart from where it listens.
type Options struct {
	// LeftOrder and RightOrder are the binary logarithms of the ring sizes
	// in bytes, left from the client, right to it: 10 or 11 (inside the
	// shared page, not both the same), or 12 to 20. 0 means the default.
	LeftOrder, RightOrder uint
	// Marker is for protocols in which the server speaks first and text is
	// all there is, such as QMP. A client has nothing to say before it is
	// acknowledged, so what is in the ring by then is dropped. The byte 0x01
	// says "a new connection": dropped at a session's start, a new session
	// later. Downstream clients send it. JSON never holds it.
	// Without Marker every byte is data, and a client may write at once;
	// should one die before the server has looked a first time, the next
	// one's data may have that one's in front.
	Marker bool
	// Log gets a line when something is wrong that no caller sees. nil: none.
	Log *slog.Logger
}

// Listener is a vchan server for one client at a time, a net.Listener whose
// connections are sessions of that client.
//
// # Sessions
//
// libxenvchan's client attaches by writing cli_live = 1 and leaves by writing
// 0 (its kernel does so when it dies). A server that only looks at 0 and 1
// misses a client that left and one that came between two looks. So:
//
//   - The server changes the 1 of a client that it has seen to 3 with a
//     compare-and-swap: 3 is the same client, 0 none, and 1 always a new one.
//   - Then, before it writes a single byte to that client, it publishes the
//     next endpoint (new pages, new event channel, new values in xenstore),
//     and looks again. Still 3: whoever comes after this client finds the next
//     endpoint, because clients come one after the other and read xenstore
//     when they attach. From here on this endpoint belongs to this client, is
//     "sealed", and no byte of it, read or unread, can ever reach another one.
//   - Not 3 any more: no output was written, so there is nothing to leak. The
//     endpoint stays open beside the next one, because a client that read the
//     old values may be just about to attach to it, until either has a client.
//     Such a client may even have read the old ring-ref and the new
//     event-channel: it is told of events on both channels.
//
// Input needs more care where one endpoint sees two clients, which is only
// before it is sealed: bytes that are in the ring when a client is
// acknowledged may be those of one before it, even of one that came and went
// unseen, and are dropped (see Options.Marker). A client that waits for a
// greeting, as QMP's do, loses nothing by that, since it gets one only after
// the acknowledgement; nor does one that sends the marker byte at once.
//
// # Without a successor
//
// When publishing fails (xenstored does not answer, no grants are left), the
// session is served all the same, on an endpoint that stays published. At its
// end unread input is dropped and unread output rewound, if that is possible
// without a next client seeing any (see endpoint.reset). If it is not, the
// client that has come meanwhile is hung up on, to find the fresh endpoint
// that is published then; if that fails too, the Listener fails.
//
// # Hostile clients
//
// Sizes, places and our own indices are kept outside of the shared page. The
// client's indices are read once and checked. A bad one ends the session.
type Listener struct {
	t    Transport
	opt  Options
	addr Addr

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	done   chan struct{} // closed when run has ended
	once   sync.Once
	closed error // result of Close

	// scanning is held by whoever changes endpoints, before mu. It may be
	// held while xenstored is asked; mu never is.
	scanning sync.Mutex

	mu    sync.Mutex
	ready *sync.Cond // pending or err has changed
	// open are the endpoints that a client may attach to, oldest first. The
	// last one is the published one.
	open []*endpoint
	// next is an endpoint whose publication has failed or is under way.
	next *endpoint
	// spare is what next will be. Nobody knows of it: it is made between
	// sessions, when no client waits. nil: none.
	spare *endpoint
	// conn is the session of the client that is attached, nil if none is.
	conn *Conn
	// pending is a session that Accept has not returned yet.
	pending *Conn
	// news are the sessions whose Notify is to be called, once mu is free.
	news  []*Conn
	err   error // why there will be no more sessions
	trace func(op string, v uint32)
}

// Addr is the address of both ends: the xenstore path.
type Addr string

// Network returns "vchan".
func (Addr) Network() string { return "vchan" }

// String returns the xenstore path.
func (a Addr) String() string { return string(a) }

// NewListener publishes a first endpoint through t and waits for clients. The
// Listener owns t from then on, also when an error is returned. ctx limits the
// first publication only. path is for messages and Addr.
func NewListener(ctx context.Context, t Transport, path string, opt Options) (*Listener, error) {
	l, err := newListener(ctx, t, path, opt, nil)
	if err != nil {
		return nil, err
	}
	go l.run()
	return l, nil
}

func newListener(ctx context.Context, t Transport, path string, opt Options, trace func(string, uint32)) (*Listener, error) {
	if opt.LeftOrder == 0 {
		opt.LeftOrder = DefaultLeftOrder
	}
	if opt.RightOrder == 0 {
		opt.RightOrder = DefaultRightOrder
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	l := &Listener{t: t, opt: opt, addr: Addr(path), done: make(chan struct{}), trace: trace}
	l.ready = sync.NewCond(&l.mu)
	l.ctx, l.cancel = context.WithCancel(context.Background())
	err := checkOrders(opt.LeftOrder, opt.RightOrder)
	if err == nil {
		l.mu.Lock()
		err = l.publish(ctx)
		l.mu.Unlock()
	}
	if err != nil {
		l.cancel()
		if l.next != nil {
			err = errors.Join(err, l.next.retire(t))
		}
		return nil, errors.Join(l.opError("listen", err), t.Close())
	}
	return l, nil
}

func (l *Listener) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: "vchan", Addr: l.addr, Err: err}
}

// run waits for events until Close. Sessions that are told of news by Notify do their
// work here, too.
func (l *Listener) run() {
	defer close(l.done)
	for {
		if err := l.t.Wait(); err != nil {
			l.scanning.Lock()
			l.mu.Lock()
			l.fail(err)
			l.mu.Unlock()
			l.scanning.Unlock()
			l.tell()
			return
		}
		l.scan()
	}
}

// fail ends everything. l.scanning and l.mu are held.
func (l *Listener) fail(err error) {
	if l.err == nil {
		l.err = err
	}
	if c := l.conn; c != nil {
		if e := l.end(l.err); c.sealed {
			l.retire(e)
		}
	}
	l.ready.Broadcast()
}

// tell calls the Notify of sessions that have something new. No lock is held.
func (l *Listener) tell() {
	for {
		l.mu.Lock()
		if len(l.news) == 0 {
			l.mu.Unlock()
			return
		}
		c := l.news[0]
		l.news = slices.Delete(l.news, 0, 1)
		c.news = false
		notify := c.notify
		l.mu.Unlock()
		notify()
	}
}

// scan looks at everything that a client can have done since the last look.
func (l *Listener) scan() {
	l.scanLocked()
	l.tell()
}

func (l *Listener) scanLocked() {
	l.scanning.Lock()
	defer l.scanning.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		return
	}
	l.look()
	for l.err == nil && l.attach() {
	}
	if l.err == nil && l.conn == nil && l.next == nil && l.spare == nil {
		l.prepare()
	}
}

// prepare makes the endpoint that the next publication is of. l.mu is held.
func (l *Listener) prepare() {
	// An error comes again when the endpoint is needed, and is told then.
	l.spare, _ = newEndpoint(l.t, l.opt.LeftOrder, l.opt.RightOrder, l.trace)
}

// look finds out whether the session goes on. l.mu is held.
func (l *Listener) look() {
	c := l.conn
	if c == nil {
		return
	}
	live := c.e.page.live()
	switch {
	case live == liveAcked && (c.closed || c.broken != nil):
		l.hangUp(c)
	case live == liveAcked:
		c.wake()
	case c.sealed:
		if live == liveGone {
			c.keepRest()
		}
		l.retire(l.end(nil))
	default:
		e := l.end(nil)
		// Without a successor: see the Listener's comment.
		if err := e.dropInput(); err != nil || !e.reset(c.wrote) {
			l.replace(e)
		}
	}
}

// hangUp ends a session whose client is still attached. l.mu is held.
func (l *Listener) hangUp(c *Conn) {
	if e := l.end(nil); c.sealed {
		l.retire(e)
	} else {
		l.replace(e)
	}
}

// replace gives up an endpoint that is open to clients. The one that takes its
// place is published first, for whoever is hung up on to find. l.mu is held.
func (l *Listener) replace(e *endpoint) {
	var err error
	switch e {
	case l.next:
		l.next = nil
	case l.open[len(l.open)-1]:
		err = l.publish(l.ctx)
	}
	if newest := l.open[len(l.open)-1]; newest != e {
		e.also = newest.port // who came during the publication hears it, too
	}
	l.open = slices.DeleteFunc(l.open, func(o *endpoint) bool { return o == e })
	l.retire(e)
	if err != nil {
		l.fail(fmt.Errorf("no endpoint left: %w", err))
	}
}

// end takes the endpoint from the Conn of the session and returns it. What
// becomes of it is the caller's affair. l.mu is held.
func (l *Listener) end(reason error) *endpoint {
	c, e := l.conn, l.conn.e
	l.conn = nil
	c.finish(reason)
	if l.pending == c {
		l.pending = nil
	}
	return e
}

// retire gives up an endpoint. l.mu is held.
func (l *Listener) retire(e *endpoint) {
	if err := e.retire(l.t); err != nil {
		l.opt.Log.Warn("vchan endpoint not given back in full", "path", l.addr, "err", err)
	}
}

// attach looks for a client that has attached, and begins its session. It
// returns true if there was one and it did not stay, so that another may have
// come. l.mu is held, but not throughout.
func (l *Listener) attach() bool {
	candidates := l.open
	if l.next != nil {
		// Its publication has failed, or we do not know that it has not.
		candidates = append(slices.Clone(l.open), l.next)
	}
	for i, e := range slices.Backward(candidates) {
		if l.conn != nil && l.conn.e == e {
			continue
		}
		live := e.page.ack()
		if live == liveGone && !e.sound() {
			l.replace(e)
			return l.err == nil
		}
		if live != liveNew {
			continue
		}
		if newest := candidates[len(candidates)-1]; e != newest {
			e.also = newest.port
		}
		candidates = slices.Clone(candidates) // l.open changes
		if e == l.next {
			l.next = nil
			l.open = append(l.open, e)
		}
		// Clients come one after the other: who was on an older endpoint,
		// or about to be, is gone.
		if c := l.conn; c != nil {
			if e := l.end(nil); c.sealed {
				l.retire(e)
			}
		}
		for _, old := range candidates[:i] {
			l.retire(old)
		}
		l.open = slices.DeleteFunc(l.open, func(o *endpoint) bool { return slices.Contains(candidates[:i], o) })
		return l.begin(e)
	}
	return false
}

// begin starts the session of a client that was acknowledged on e. It returns
// false if the session stands. l.mu is held, but not while xenstored is asked.
func (l *Listener) begin(e *endpoint) bool {
	if e.used || l.opt.Marker {
		if err := e.dropInput(); err != nil {
			l.replace(e)
			return true
		}
	}
	e.used = true
	c := newConn(l, e)
	l.conn, l.pending = c, c
	l.ready.Broadcast()

	if e == l.open[len(l.open)-1] {
		if err := l.publish(l.ctx); err != nil {
			if l.ctx.Err() != nil {
				return false // closing
			}
			l.opt.Log.Warn("vchan serves a session without the next one's endpoint", "path", l.addr, "err", err)
			if e.page.live() != liveAcked {
				l.look()
				return true
			}
			c.begin(false)
			return false
		}
		if e.page.live() != liveAcked {
			// Nothing was written: the next client may have it.
			l.end(nil)
			return true
		}
	}
	l.open = slices.DeleteFunc(l.open, func(o *endpoint) bool { return o == e })
	c.begin(true)
	return false
}

// publish makes an endpoint and tells clients of it. l.mu is held, but not
// while xenstored is asked.
func (l *Listener) publish(ctx context.Context) error {
	if l.next == nil {
		l.next, l.spare = l.spare, nil
	}
	if l.next == nil {
		e, err := newEndpoint(l.t, l.opt.LeftOrder, l.opt.RightOrder, l.trace)
		if err != nil {
			return err
		}
		l.next = e
	}
	e := l.next
	ctx, cancel := context.WithTimeout(ctx, publishLimit)
	defer cancel()
	if err := l.publishUnlocked(ctx, e); err != nil {
		return err
	}
	l.next = nil
	l.open = append(l.open, e)
	return nil
}

func (l *Listener) publishUnlocked(ctx context.Context, e *endpoint) error {
	l.mu.Unlock()
	defer l.mu.Lock()
	return l.t.Publish(ctx, e.mem.Refs[0], e.port)
}

// Accept waits for a client and returns its session. A session that ends
// before Accept could return it is never seen.
func (l *Listener) Accept() (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.pending == nil && l.err == nil {
		l.ready.Wait()
	}
	if l.err != nil {
		return nil, l.opError("accept", l.err)
	}
	c := l.pending
	l.pending = nil
	return c, nil
}

// Addr returns where the Listener is published.
func (l *Listener) Addr() net.Addr { return l.addr }

// Close ends the session, takes the endpoint back and waits until all is given
// back.
func (l *Listener) Close() error {
	l.once.Do(func() {
		l.cancel()
		l.t.Interrupt()
		<-l.done
		l.closed = l.shutDown()
		l.tell()
	})
	return l.closed
}

// shutDown gives everything back after run has ended.
func (l *Listener) shutDown() error {
	l.scanning.Lock()
	defer l.scanning.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	gone := l.open
	for _, e := range []*endpoint{l.next, l.spare} {
		if e != nil {
			gone = append(gone, e)
		}
	}
	l.err = net.ErrClosed
	l.fail(net.ErrClosed)
	l.open, l.next, l.spare = nil, nil, nil

	ctx, cancel := context.WithTimeout(context.Background(), publishLimit)
	defer cancel()
	err := l.t.Unpublish(ctx)
	for _, e := range gone {
		err = errors.Join(err, e.retire(l.t))
	}
	if err := errors.Join(err, l.t.Close()); err != nil {
		return l.opError("close", err)
	}
	return nil
}
