package vchan

import "errors"

// endpoint is one vchan: pages, event channel, and what we know of them.
type endpoint struct {
	page  page
	left  ring // the client writes
	right ring // we write
	mem   Memory
	port  uint32
	// also is the event channel of the endpoint that was published after
	// this one. A client reads ring-ref and event-channel one after the
	// other; between the two it may have read the newer port. 0: none.
	also uint32
	used bool // a client has been attached
	// describe writes what the next client reads before it attaches, whatever
	// the last one has made of it.
	describe func()
}

// newEndpoint makes an endpoint that nobody knows of yet.
func newEndpoint(t Transport, leftOrder, rightOrder uint, trace func(string, uint32)) (*endpoint, error) {
	port, err := t.Bind()
	if err != nil {
		return nil, err
	}
	nl, nr := ringPages(leftOrder), ringPages(rightOrder)
	mem, err := t.Share(1+nl+nr, offSrvLive, port)
	if err != nil {
		return nil, errors.Join(err, t.Unbind(port))
	}
	e := &endpoint{mem: mem, port: port}
	e.page = page{mem: mem.Bytes[:pageSize:pageSize], trace: trace}
	place := func(order uint, pages []byte) []byte {
		if order < pageShift {
			return e.page.mem[1<<order : 2<<order : 2<<order]
		}
		return pages[: 1<<order : 1<<order]
	}
	e.left = newRing(&e.page, offLeft, place(leftOrder, mem.Bytes[pageSize:]))
	e.right = newRing(&e.page, offRight, place(rightOrder, mem.Bytes[pageSize*(1+nl):]))

	e.page.mem[offCliLive] = liveNever
	e.describe = func() { e.page.describe(leftOrder, rightOrder, mem.Refs[1:]) }
	e.describe()
	return e, nil
}

// notify sends the client an event.
func (e *endpoint) notify(t Transport) error {
	if e.also != 0 {
		// Not ours to complain about: e.port is what counts.
		_ = t.Notify(e.also)
	}
	return t.Notify(e.port)
}

// retire tells whoever is attached that this endpoint is over, and gives
// everything back. The client keeps its own mapping and may read the rest.
func (e *endpoint) retire(t Transport) error {
	e.page.hangUp()
	return errors.Join(e.notify(t), e.mem.Free(), t.Unbind(e.port))
}

// reset makes an endpoint that has no successor ready for its next client,
// after a session that wrote output or did not. It returns false when the
// endpoint cannot be used any more, because a next client may have seen
// output of the last one.
//
// With nobody attached the output is rewound, and then looked at again. A
// client that attached before the rewind is either still there (cli_live is
// not 0), or has left, so that all its stores are done. With somebody
// attached nothing helps: it may be between reading prod and writing cons, or
// may have read all of it already, which looks as if the last client had.
func (e *endpoint) reset(wrote bool) bool {
	e.describe()
	if !wrote {
		return true
	}
	if e.page.live() != liveGone || e.right.rewind() != nil {
		return false
	}
	if e.page.live() != liveGone {
		return false
	}
	n, err := e.right.untaken()
	return err == nil && n == 0
}

// dropInput forgets what was written before the session that begins now.
func (e *endpoint) dropInput() error {
	n, err := e.left.unread()
	if err == nil && n > 0 {
		e.left.skip(int(n))
	}
	return err
}

// sound says whether a next client can use what is there after one that came
// and went before we looked.
func (e *endpoint) sound() bool {
	e.describe()
	if _, err := e.left.unread(); err != nil {
		return false
	}
	n, err := e.right.untaken()
	return err == nil && n == 0
}
