package vchan

import (
	"bytes"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// marker is the byte that downstream clients send on each connection.
const marker = 0x01

// Conn is one session of a client, a net.Conn.
//
// When the client leaves, Read still gives what that client had written, then
// io.EOF; Write fails with ErrSessionEnded. The first Read and Write may wait for
// the publication of the next endpoint, one xenstore transaction.
type Conn struct {
	l *Listener

	// One Read and one Write at a time: a second one could take the wake-up
	// that the first waits for.
	reading, writing sync.Mutex

	// The rest is guarded by l.mu.
	rd, wr half
	e      *endpoint // nil when the session is over
	begun  bool      // bytes may flow
	sealed bool      // no other client will come to e
	wrote  bool      // output went into e's ring in this session
	marked bool      // a marker or a byte of data was read
	rest   []byte    // what the client had written when it left
	reason error     // of the end, nil if the client just left
	broken error     // what made the session unfit to go on
	closed bool      // by Close
	notify func()    // of Notify
	news   bool      // notify is to be called
}

// half is what Read and Write wait on.
type half struct {
	cond    *sync.Cond
	waiting bool
	expired bool
	timer   *time.Timer
	serial  int // of the deadline that timer is for
}

func newConn(l *Listener, e *endpoint) *Conn {
	c := &Conn{l: l, e: e}
	c.rd.cond = sync.NewCond(&l.mu)
	c.wr.cond = sync.NewCond(&l.mu)
	return c
}

// begin lets bytes flow.
func (c *Conn) begin(sealed bool) {
	c.begun, c.sealed = true, sealed
	c.broadcast()
}

func (c *Conn) broadcast() {
	c.proceed(&c.rd)
	c.proceed(&c.wr)
}

// proceed lets whoever waits on h try again.
func (c *Conn) proceed(h *half) {
	h.cond.Broadcast()
	h.waiting = false
	if c.notify != nil && !c.news {
		c.news = true
		c.l.news = append(c.l.news, c)
	}
}

// wake lets Read and Write go on if there is something for them. If not, the
// event was for something older: a client moves its index first and takes our
// request later, and that may have been the request for the next move. So the
// request is made again, and again the ring is looked at afterwards.
func (c *Conn) wake() {
	if c.rd.waiting {
		n, err := c.e.left.unread()
		if n == 0 && err == nil {
			c.e.page.request(notifyWrite)
			n, err = c.e.left.unread()
		}
		if n > 0 || err != nil {
			c.proceed(&c.rd)
		}
	}
	if c.wr.waiting {
		n, err := c.e.right.untaken()
		if n == c.e.right.size() && err == nil {
			c.e.page.request(notifyRead)
			n, err = c.e.right.untaken()
		}
		if n < c.e.right.size() || err != nil {
			c.proceed(&c.wr)
		}
	}
}

// keepRest copies what the client had written before it left.
func (c *Conn) keepRest() {
	n, err := c.e.left.unread()
	if err != nil {
		c.broken = err
		return
	}
	c.rest = make([]byte, n)
	// The client may still scribble; then it gets what it deserves.
	got, err := c.e.left.peek(c.rest)
	if err != nil {
		c.broken = err
	}
	c.rest = c.rest[:got]
}

// finish takes the endpoint from the Conn.
func (c *Conn) finish(reason error) {
	if c.reason == nil {
		c.reason = reason
	}
	if c.reason == nil {
		c.reason = c.broken
	}
	c.e = nil
	c.rd.stop()
	c.wr.stop()
	c.broadcast()
}

// Read reads what the client writes. It waits for at least one byte.
func (c *Conn) Read(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	c.l.mu.Lock()
	asked := false
	for {
		n, err := c.tryRead(p)
		if n > 0 || err != nil || len(p) == 0 {
			return n, c.unlock("read", err)
		}
		if !asked && c.begun && c.e != nil {
			c.e.page.request(notifyWrite)
			asked = true
			continue
		}
		c.rd.wait()
		asked = false
	}
}

// TryRead reads what there is: 0 bytes and no error if that is nothing yet.
// Notify's function is called when there is more.
func (c *Conn) TryRead(p []byte) (int, error) {
	c.reading.Lock()
	defer c.reading.Unlock()
	c.l.mu.Lock()
	n, err := c.tryRead(p)
	if n == 0 && err == nil && len(p) > 0 {
		if c.begun && c.e != nil {
			c.e.page.request(notifyWrite)
			n, err = c.tryRead(p)
		}
		c.rd.waiting = n == 0 && err == nil
	}
	return n, c.unlock("read", err)
}

// unlock ends an operation that holds c.l.mu, and the session if that found it
// broken. It gives the operation's error.
func (c *Conn) unlock(op string, err error) error {
	broken := c.broken != nil && c.e != nil
	c.l.mu.Unlock()
	if broken {
		c.l.scan()
	}
	return c.opError(op, err)
}

// Notify has f called whenever a TryRead or TryWrite that came short would do
// more, and at the session's end. f may be called by any goroutine, with no lock
// held, and without need.
func (c *Conn) Notify(f func()) error {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	c.notify = f
	return nil
}

// tryRead is Read without waiting: 0 bytes and no error mean that there is
// nothing yet. c.l.mu is held.
func (c *Conn) tryRead(p []byte) (int, error) {
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case c.rd.expired:
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case c.e == nil && len(c.rest) == 0:
			if c.reason != nil {
				return 0, c.reason
			}
			return 0, io.EOF
		case c.broken != nil:
			return 0, c.broken
		case !c.begun:
			if c.e != nil {
				return 0, nil
			}
		}
		n, err := c.peek(p)
		if err != nil {
			c.broken = err
			return 0, err
		}
		if n == 0 {
			return 0, nil
		}
		if !c.l.opt.Marker {
			return n, c.skip(n)
		}
		first := !c.marked
		c.marked = true
		switch i := bytes.IndexByte(p[:n], marker); {
		case i < 0:
			return n, c.skip(n)
		case i > 0:
			return i, c.skip(i)
		}
		if err := c.skip(1); err != nil {
			return 0, err
		}
		if !first {
			c.restart()
		}
	}
}

func (c *Conn) peek(p []byte) (int, error) {
	if c.e == nil {
		return copy(p, c.rest), nil
	}
	n, err := c.e.left.peek(p)
	if n > 0 && !c.sealed && c.e.page.live() != liveAcked {
		return 0, nil // maybe written by a next client already
	}
	return n, err
}

// skip takes n bytes out of the ring and tells the client if it wants to know.
func (c *Conn) skip(n int) error {
	if c.e == nil {
		c.rest = c.rest[n:]
		return nil
	}
	c.e.left.skip(n)
	return c.tell(notifyRead)
}

// tell sends an event if the client has asked for one.
func (c *Conn) tell(bit uint32) error {
	if !c.e.page.asked(bit) {
		return nil
	}
	err := c.e.notify(c.l.t)
	if err != nil {
		c.broken = err
	}
	return err
}

// restart ends the session at a marker and gives what follows to a new one.
// The client is the same and stays attached, so what it has not yet read of
// this session's output cannot be taken back.
func (c *Conn) restart() {
	c.rest = nil
	if c.e == nil {
		return // the new connection, too, is over
	}
	l, e := c.l, c.e
	n := newConn(l, e)
	n.marked, n.wrote = true, c.wrote
	l.end(nil)
	l.conn, l.pending = n, n
	n.begin(c.sealed)
	l.ready.Broadcast()
}

// Write writes all of p, waiting for the client to make room.
func (c *Conn) Write(p []byte) (int, error) { return c.write(p, true) }

// TryWrite writes what there is room for, perhaps nothing. Notify's function is
// called when there is more.
func (c *Conn) TryWrite(p []byte) (int, error) { return c.write(p, false) }

func (c *Conn) write(p []byte, wait bool) (int, error) {
	c.writing.Lock()
	defer c.writing.Unlock()
	c.l.mu.Lock()
	total, asked := 0, false
	for {
		n, err := c.tryWrite(p[total:])
		total += n
		if err != nil || total == len(p) {
			return total, c.unlock("write", err)
		}
		if n > 0 {
			asked = false
			continue
		}
		if !asked && c.begun {
			c.e.page.request(notifyRead)
			asked = true
			continue
		}
		if !wait {
			c.wr.waiting = true
			return total, c.unlock("write", nil)
		}
		c.wr.wait()
		asked = false
	}
}

// tryWrite is Write without waiting. c.l.mu is held.
func (c *Conn) tryWrite(p []byte) (int, error) {
	switch {
	case c.closed:
		return 0, net.ErrClosed
	case c.wr.expired:
		return 0, os.ErrDeadlineExceeded
	case c.e == nil:
		if c.reason != nil {
			return 0, c.reason
		}
		return 0, ErrSessionEnded
	case c.broken != nil:
		return 0, c.broken
	case len(p) == 0 || !c.begun:
		return 0, nil
	}
	n, err := c.e.right.write(p)
	if err != nil {
		c.broken = err
		return 0, err
	}
	if n == 0 {
		return 0, nil
	}
	c.wrote = true
	return n, c.tell(notifyWrite)
}

// opError names operation and path; io.EOF goes bare, as net.Conn's users
// expect it.
func (c *Conn) opError(op string, err error) error {
	if err == nil || err == io.EOF {
		return err
	}
	return c.l.opError(op, err)
}

// Close hangs up: the client's calls fail, and the next one finds a fresh
// endpoint. A client can still read what was written to it. Close waits for a
// publication that is under way; nothing if the client has left already.
func (c *Conn) Close() error {
	l := c.l
	l.mu.Lock()
	if c.closed {
		l.mu.Unlock()
		return nil
	}
	c.closed = true
	c.rest = nil
	if l.pending == c {
		l.pending = nil
	}
	c.rd.stop()
	c.wr.stop()
	c.broadcast()
	attached := c.e != nil
	l.mu.Unlock()
	if attached {
		l.scan()
	}
	return nil
}

// LocalAddr returns the xenstore path of the endpoint.
func (c *Conn) LocalAddr() net.Addr { return c.l.addr }

// RemoteAddr returns the xenstore path too: the client has no address.
func (c *Conn) RemoteAddr() net.Addr { return c.l.addr }

// SetDeadline sets the deadlines of Read and Write.
func (c *Conn) SetDeadline(t time.Time) error {
	return c.setDeadline("set deadline", t, &c.rd, &c.wr)
}

// SetReadDeadline sets the deadline of Read.
func (c *Conn) SetReadDeadline(t time.Time) error {
	return c.setDeadline("set read deadline", t, &c.rd)
}

// SetWriteDeadline sets the deadline of Write.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline("set write deadline", t, &c.wr)
}

func (c *Conn) setDeadline(op string, t time.Time, halves ...*half) error {
	c.l.mu.Lock()
	defer c.l.mu.Unlock()
	if c.closed {
		return c.opError(op, net.ErrClosed)
	}
	for _, h := range halves {
		h.stop()
		left := time.Until(t)
		h.expired = !t.IsZero() && left <= 0
		if !t.IsZero() && left > 0 && c.e != nil {
			serial := h.serial
			h.timer = time.AfterFunc(left, func() {
				c.l.mu.Lock()
				defer c.l.mu.Unlock()
				if h.serial == serial {
					h.expired = true
					h.cond.Broadcast()
				}
			})
		}
		h.cond.Broadcast()
	}
	return nil
}

func (h *half) wait() {
	h.waiting = true
	h.cond.Wait()
	h.waiting = false
}

// stop forgets the deadline that was set.
func (h *half) stop() {
	h.serial++
	if h.timer != nil {
		h.timer.Stop()
		h.timer = nil
	}
}
