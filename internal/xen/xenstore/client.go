// Package xenstore is a client of xenstored through the kernel's
// /dev/xen/xenbus (drivers/xen/xenbus/xenbus_dev_frontend.c).
//
// A path without a leading slash ("device/vif") is relative to the domain's
// own folder, /local/domain/<domid>. Values are bytes held in a string: they
// may be empty, and may hold NUL or bytes from 0x80 on.
package xenstore

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
)

// Device is the kernel's door to xenstored.
const Device = "/dev/xen/xenbus"

const (
	// maxCalls bounds the requests without an answer, given-up ones included:
	// their answers still have to be told apart when they come.
	maxCalls = 1024
	// undoLimit is the time for what must be said to xenstored though the
	// caller's context has ended: end of a transaction, end of a watch.
	undoLimit = 5 * time.Second
)

// Error says which operation failed on which path. Err holds a syscall.Errno
// if the kernel or xenstored refused, so that errors.Is(err, fs.ErrNotExist)
// and the like work; fs.ErrClosed after Close; io.EOF after xenbus closed its end.
type Error struct {
	Op   string // "read", "write", "watch", …
	Path string // empty where the operation has none
	Err  error
}

func (e *Error) Error() string {
	if e.Path == "" {
		return "xenstore: " + e.Op + ": " + e.Err.Error()
	}
	return "xenstore: " + e.Op + " " + e.Path + ": " + e.Err.Error()
}

func (e *Error) Unwrap() error { return e.Err }

// Client is one connection to xenstored, for use by any number of goroutines.
type Client struct {
	conn io.ReadWriteCloser
	send chan *call
	done chan struct{} // closed when the connection has ended; err is set by then

	wg sync.WaitGroup // the reader, the writer, undo calls

	mu      sync.Mutex
	err     error
	lastID  uint32
	calls   map[uint32]*call
	token   uint64
	watches map[string]*Watch // by token
}

// call is a request on its way.
type call struct {
	request wire.Message
	answer  chan answer // takes one answer without blocking
	// undo, if not nil, takes back what the request has done. It runs when
	// the answer comes after the caller has gone.
	undo func(ctx context.Context, payload []byte)
	gone bool
}

type answer struct {
	payload []byte
	err     error
}

// Open connects through Device. The kernel's own writes block until xenstored
// has answered a watch, so Close may wait as long.
func Open() (*Client, error) { return open(Device) }

func open(path string) (*Client, error) {
	// The descriptor stays with Go's poller: Close then ends a Read. Fd() would
	// make it blocking for good.
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		var pe *fs.PathError
		if errors.As(err, &pe) {
			err = pe.Err
		}
		return nil, &Error{Op: "open", Path: path, Err: err}
	}
	return NewClient(f), nil
}

// NewClient speaks xenstore's protocol over conn, which it owns from now on.
// Close must end a Read that waits. Each request is one Write; a Write that
// returns a syscall.Errno and no bytes fails that request alone.
func NewClient(conn io.ReadWriteCloser) *Client {
	c := &Client{
		conn:    conn,
		send:    make(chan *call),
		done:    make(chan struct{}),
		calls:   make(map[uint32]*call),
		watches: make(map[string]*Watch),
	}
	c.wg.Go(c.read)
	c.wg.Go(c.write)
	return c
}

// Close ends the connection and waits for its goroutines. Waiting calls return
// an error that is fs.ErrClosed.
func (c *Client) Close() error {
	err := c.end(fs.ErrClosed)
	c.wg.Wait()
	return err
}

// Done is closed when the connection has ended, for whatever reason.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err says why the connection has ended; nil while it lives.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// end ends the connection for a reason; only the first one counts.
func (c *Client) end(reason error) error {
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return nil
	}
	c.err = &Error{Op: "connection", Err: reason}
	c.mu.Unlock()
	// Wake the waiters before Close: on xenbus it waits for a Write that the kernel holds.
	close(c.done)
	if err := c.conn.Close(); err != nil {
		return &Error{Op: "close", Err: err}
	}
	return nil
}

func (c *Client) read() {
	r := bufio.NewReaderSize(c.conn, wire.HeaderSize+wire.MaxPayload)
	for {
		m, err := wire.Receive(r)
		if err == nil {
			err = c.dispatch(m)
		} else if errors.Is(err, io.EOF) {
			err = fmt.Errorf("xenbus closed its end: %w", err)
		}
		if err != nil {
			c.end(err)
			return
		}
	}
}

// dispatch hands m to whom it is for. It never blocks.
func (c *Client) dispatch(m wire.Message) error {
	if m.Type == wire.WatchEvent { // its ReqID and TxID are undefined
		list, err := wire.Split(m.Payload)
		if err != nil || len(list) != 2 {
			return fmt.Errorf("bad watch event %q: not a path and a token", m.Payload)
		}
		c.mu.Lock()
		w := c.watches[list[1]]
		c.mu.Unlock()
		if w != nil { // else it was sent before the watch's end
			w.push(list[0])
		}
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	call := c.calls[m.ReqID]
	switch {
	case call == nil:
		return fmt.Errorf("bad header: answer of type %q to request %d, which is not waiting", m.Type, m.ReqID)
	case m.Type == wire.Error:
		c.finish(call, answer{err: wire.ParseError(m.Payload)})
	case m.Type == call.request.Type:
		c.finish(call, answer{payload: m.Payload})
	default:
		return fmt.Errorf("bad header: answer of type %q to request %d of type %q", m.Type, m.ReqID, call.request.Type)
	}
	return nil
}

// finish ends a call. c.mu is held.
func (c *Client) finish(call *call, a answer) {
	delete(c.calls, call.request.ReqID)
	if !call.gone {
		call.answer <- a
		return
	}
	if call.undo != nil && a.err == nil && c.err == nil {
		// Not here: the undo's own answer comes through this goroutine.
		c.wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.Background(), undoLimit)
			defer cancel()
			call.undo(ctx, a.payload)
		})
	}
}

func (c *Client) write() {
	var b []byte
	for {
		select {
		case <-c.done:
			return
		case call := <-c.send:
			b = call.request.Append(b[:0])
			n, err := c.conn.Write(b)
			if err == nil {
				continue
			}
			var errno syscall.Errno
			if n != 0 || !errors.As(err, &errno) {
				c.end(fmt.Errorf("write a message of type %q: %w", call.request.Type, err))
				return
			}
			// The kernel refused this message and has forgotten it: so says a
			// watch that xenstored did not accept.
			c.mu.Lock()
			c.finish(call, answer{err: errno})
			c.mu.Unlock()
		}
	}
}

// roundTrip sends one request and waits for its answer.
func (c *Client) roundTrip(ctx context.Context, typ wire.Type, tx uint32, payload []byte, undo func(context.Context, []byte)) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if size := wire.HeaderSize + len(payload); size > wire.MaxRequest {
		return nil, fmt.Errorf("message of %d bytes, xenbus takes %d: %w", size, wire.MaxRequest, syscall.E2BIG)
	}
	call := &call{
		request: wire.Message{Type: typ, TxID: tx, Payload: payload},
		answer:  make(chan answer, 1),
		undo:    undo,
	}
	if err := c.register(call); err != nil {
		return nil, err
	}
	select {
	case c.send <- call:
	case <-c.done:
		return nil, c.Err()
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.calls, call.request.ReqID)
		c.mu.Unlock()
		return nil, fmt.Errorf("not sent, an earlier request blocks: %w", ctx.Err())
	}
	select {
	case a := <-call.answer:
		return a.payload, a.err
	case <-c.done:
	case <-ctx.Done():
	}
	// An answer that came at the same time counts: with it the caller owns what it brought.
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case a := <-call.answer:
		return a.payload, a.err
	default:
	}
	if c.err != nil {
		return nil, c.err
	}
	call.gone = true
	return nil, fmt.Errorf("no answer from xenstored: %w", ctx.Err())
}

func (c *Client) register(call *call) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	if len(c.calls) >= maxCalls {
		return fmt.Errorf("%d requests without an answer from xenstored: %w", len(c.calls), syscall.EBUSY)
	}
	for {
		c.lastID++
		if _, used := c.calls[c.lastID]; !used {
			break
		}
	}
	call.request.ReqID = c.lastID
	c.calls[c.lastID] = call
	return nil
}
