package vchan

import (
	"context"
	"fmt"
	"strings"
)

// Stepper is a Listener whose events the test handles itself.
type Stepper struct{ L *Listener }

// NewStepper makes a Listener without its goroutine. trace is called after
// each access to shared memory.
func NewStepper(t Transport, opt Options, trace func(string, uint32)) (*Stepper, error) {
	l, err := newListener(context.Background(), t, "test", opt, trace)
	if err != nil {
		return nil, err
	}
	return &Stepper{L: l}, nil
}

// Scan is what an event starts.
func (s *Stepper) Scan() { s.L.scan() }

// Pending is Accept without waiting.
func (s *Stepper) Pending() *Conn {
	c := s.L.pending
	s.L.pending = nil
	return c
}

// State is all that the Listener remembers between events.
func (s *Stepper) State() string {
	b := new(strings.Builder)
	show := func(e *endpoint) {
		fmt.Fprint(b, e.port, e.left.own, e.right.own, e.also, e.used, " ")
	}
	for _, e := range s.L.open {
		show(e)
	}
	if s.L.next != nil {
		b.WriteString("next ")
		show(s.L.next)
	}
	if c := s.L.conn; c != nil {
		b.WriteString("conn ")
		show(c.e)
		fmt.Fprint(b, c.begun, c.sealed, c.wrote)
	}
	return b.String()
}

// Err is what Accept would fail with.
func (s *Stepper) Err() error { return s.L.err }

// Close is Listener.Close.
func (s *Stepper) Close() error {
	s.L.once.Do(func() {
		s.L.cancel()
		s.L.t.Interrupt()
		s.L.closed = s.L.shutDown()
	})
	return s.L.closed
}

// StepRead is Read without waiting; after 0 bytes an event is asked for.
func (c *Conn) StepRead(p []byte) (int, error) {
	n, err := c.tryRead(p)
	if n == 0 && err == nil && c.begun && c.e != nil {
		c.e.page.request(notifyWrite)
		n, err = c.tryRead(p)
	}
	c.l.rescan(c)
	return n, err
}

// StepWrite is Write without waiting; after 0 bytes an event is asked for.
func (c *Conn) StepWrite(p []byte) (int, error) {
	n, err := c.tryWrite(p)
	if n == 0 && err == nil && c.begun && c.e != nil {
		c.e.page.request(notifyRead)
		n, err = c.tryWrite(p)
	}
	c.l.rescan(c)
	return n, err
}

func (l *Listener) rescan(c *Conn) {
	if c.broken != nil && c.e != nil {
		l.scan()
	}
}

// Begun says whether bytes may flow.
func (c *Conn) Begun() bool { return c.begun }

// Over says whether the session has ended.
func (c *Conn) Over() bool { return c.e == nil }

// Naive serves one endpoint by the reference server's rules: it sees a client
// come and go only by what cli_live is when an event wakes it.
type Naive struct {
	e         *endpoint
	t         Transport
	connected bool
}

// NewNaive publishes an endpoint.
func NewNaive(t Transport, opt Options, trace func(string, uint32)) (*Naive, error) {
	e, err := newEndpoint(t, opt.LeftOrder, opt.RightOrder, trace)
	if err != nil {
		return nil, err
	}
	return &Naive{e: e, t: t}, t.Publish(context.Background(), e.mem.Refs[0], e.port)
}

// Scan is one wake-up; it greets a client that it sees come.
func (n *Naive) Scan(greeting func() []byte) error {
	was := n.connected
	n.connected = n.e.page.live() == liveNew
	if !n.connected || was {
		return nil
	}
	if _, err := n.e.right.write(greeting()); err != nil {
		return err
	}
	if n.e.page.asked(notifyWrite) {
		return n.e.notify(n.t)
	}
	return nil
}

// Connected says whether it believes that a client is attached.
func (n *Naive) Connected() (bool, uint32) { return n.connected, n.e.right.own }

// Offsets of the shared page, for golden tests.
var Offsets = map[string]int{
	"left.cons": offLeft + offIndexCons, "left.prod": offLeft + offIndexProd,
	"right.cons": offRight + offIndexCons, "right.prod": offRight + offIndexProd,
	"left_order": offLeftOrder, "right_order": offRightOrder,
	"cli_live": offCliLive, "srv_live": offSrvLive,
	"cli_notify": offCliNotify, "srv_notify": offSrvNotify, "grants": offGrants,
}

// CheckOrders is checkOrders.
func CheckOrders(left, right uint) error { return checkOrders(left, right) }
