// Package xenstore is a client of xenstored through the kernel's
// /dev/xen/xenbus (drivers/xen/xenbus/xenbus_dev_frontend.c).
//
// A path without a leading slash ("device/vif") is relative to the domain's
// own folder, /local/domain/<domid>. Values are bytes held in a string: they
// may be empty, and may hold NUL or bytes from 0x80 on.
//
// A connection has one request under way; the next one goes out when the answer
// to it has been read. The protocol allows more, the kernel's driver does not.
// Since Linux 4.11 it has one buffer for each open file, from which the xenbus
// thread copies a payload into xenstored's ring some time after write(2) has
// returned: a second request gets into the first one's payload. And a write of a
// watch waits for that thread with the file's lock held, which the thread takes to hand
// over an earlier answer: both wait for ever, and with them all of the
// kernel's own requests.
package xenstore

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
)

// Device is the kernel's door to xenstored.
const Device = "/dev/xen/xenbus"

// returnLimit is how long a caller waits for the end of a transaction or of a
// watch, whatever has become of its context.
const returnLimit = 5 * time.Second

// errNotSent is wrapped by the error of a request that xenstored has not seen.
var errNotSent = errors.New("not sent")

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
// Their requests are sent in the order in which they were made.
type Client struct {
	conn io.ReadWriteCloser
	turn chan struct{} // holds one token while the writer may have something to send
	done chan struct{} // closed when the connection has ended; err is set by then

	wg sync.WaitGroup // the reader and the writer

	mu      sync.Mutex
	err     error
	lastID  uint32
	queue   []*call // not sent yet, oldest first
	onWire  *call   // sent and not answered; nil if the next one may be sent
	token   uint64
	watches map[string]*Watch // by token
}

// call is a request and the caller that waits for its answer.
type call struct {
	request wire.Message
	// undo, if not nil, makes of the answer the request that takes back what this
	// one did. That one is sent if the caller has gone when the answer comes.
	undo func(payload []byte) (wire.Message, bool)
	// owed keeps the request in the queue when its caller has gone: it gives
	// back what xenstored keeps for this domain and counts against its quota.
	owed bool

	answer chan answer // takes one answer without blocking
	sent   time.Time   // zero while in the queue
	gone   bool        // nobody receives from answer any more
}

type answer struct {
	payload []byte
	err     error
}

// String is what an Error says about the request.
func (c *call) String() string {
	typ := c.request.Type
	if typ == wire.TransactionStart || typ == wire.TransactionEnd {
		return typ.String()
	}
	path, _, _ := strings.Cut(string(c.request.Payload), "\x00")
	return typ.String() + " " + path
}

func (c *call) age() time.Duration { return time.Since(c.sent).Round(time.Millisecond) }

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
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, &Error{Op: "open", Path: path, Err: err}
	}
	return NewClient(&xenbus{f, raw}), nil
}

// xenbus is the kernel's device. Its reads never block; of its writes those of watches do (see above).
type xenbus struct {
	*os.File
	raw syscall.RawConn
}

func (x *xenbus) Read(b []byte) (int, error) { return fdio.Read(x.raw, b) }

// Write writes one message. The kernel only queues it (xenbus_dev_request_and_reply in drivers/xen/xenbus/xenbus_dev_frontend.c),
// unless it is a watch's: that it asks for itself, and waits.
func (x *xenbus) Write(b []byte) (n int, err error) {
	if t := wire.Type(binary.LittleEndian.Uint32(b)); t == wire.Watch || t == wire.Unwatch {
		return x.File.Write(b)
	}
	closed := x.raw.Write(func(fd uintptr) bool {
		n, err = fdio.WriteNow(int(fd), b)
		return true
	})
	if closed != nil {
		return 0, closed
	}
	return n, err
}

// NewClient speaks xenstore's protocol over conn, which it owns from now on.
// Close must end a Read that waits. Each request is one Write, which comes after
// the answer to the one before was read; a Write that returns a syscall.Errno and
// no bytes fails that request alone.
func NewClient(conn io.ReadWriteCloser) *Client {
	c := &Client{
		conn:    conn,
		turn:    make(chan struct{}, 1),
		done:    make(chan struct{}),
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
	switch {
	case c.onWire == nil || m.ReqID != c.onWire.request.ReqID:
		return fmt.Errorf("bad header: answer of type %q to request %d, which is not waiting", m.Type, m.ReqID)
	case m.Type == wire.Error:
		c.finish(answer{err: wire.ParseError(m.Payload)})
	case m.Type == c.onWire.request.Type:
		c.finish(answer{payload: m.Payload})
	default:
		return fmt.Errorf("bad header: answer of type %q to request %d of type %q", m.Type, m.ReqID, c.onWire.request.Type)
	}
	return nil
}

// finish ends the call on the wire and gives the turn to the next. c.mu is held.
func (c *Client) finish(a answer) {
	ended := c.onWire
	c.onWire = nil
	if !ended.gone {
		ended.answer <- a
	} else if ended.undo != nil && a.err == nil {
		if request, ok := ended.undo(a.payload); ok {
			c.queue = slices.Insert(c.queue, 0, &call{request: request, owed: true, gone: true})
		}
	}
	c.wake()
}

// wake makes the writer look for something to send.
func (c *Client) wake() {
	select {
	case c.turn <- struct{}{}:
	default:
	}
}

// next puts the oldest request on the wire; it is nil if there is none or the
// wire is in use.
func (c *Client) next() *call {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.onWire != nil || len(c.queue) == 0 {
		return nil
	}
	call := c.queue[0]
	c.queue = slices.Delete(c.queue, 0, 1)
	c.lastID++
	call.request.ReqID = c.lastID
	call.sent = time.Now()
	c.onWire = call
	return call
}

// write sends the requests. It is a goroutine of its own because the kernel may
// hold a Write until xenstored answers, and callers go when their context ends.
func (c *Client) write() {
	var b []byte
	for {
		select {
		case <-c.done:
			return
		case <-c.turn:
		}
		call := c.next()
		if call == nil {
			continue
		}
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
		if c.onWire == call { // else it was answered all the same
			c.finish(answer{err: errno})
		}
		c.mu.Unlock()
	}
}

// roundTrip sends one request and waits for its answer. If ctx ends first, undo
// (may be nil) takes back what the request does; see call.
func (c *Client) roundTrip(ctx context.Context, request wire.Message, undo func([]byte) (wire.Message, bool)) ([]byte, error) {
	return c.do(ctx, &call{request: request, undo: undo})
}

// giveBack sends a request that ends something in xenstored. It waits for the
// answer, returnLimit at most; the request is sent even if its turn comes later.
func (c *Client) giveBack(request wire.Message) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), returnLimit)
	defer cancel()
	return c.do(ctx, &call{request: request, owed: true})
}

func (c *Client) do(ctx context.Context, call *call) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("%w: %w", errNotSent, err)
	}
	if size := wire.HeaderSize + len(call.request.Payload); size > wire.MaxRequest {
		return nil, fmt.Errorf("message of %d bytes, xenbus takes %d: %w", size, wire.MaxRequest, syscall.E2BIG)
	}
	call.answer = make(chan answer, 1)
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return nil, c.err
	}
	c.queue = append(c.queue, call)
	c.mu.Unlock()
	c.wake()

	select {
	case a := <-call.answer:
		return a.payload, a.err
	case <-c.done:
	case <-ctx.Done():
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	// An answer that came at the same time counts: with it the caller owns what it brought.
	select {
	case a := <-call.answer:
		return a.payload, a.err
	default:
	}
	if c.err != nil {
		return nil, c.err
	}
	call.gone = true
	if !call.sent.IsZero() {
		return nil, fmt.Errorf("no answer from xenstored for %v: %w", call.age(), ctx.Err())
	}
	if !call.owed {
		i := slices.Index(c.queue, call)
		c.queue = slices.Delete(c.queue, i, i+1)
	}
	if c.onWire == nil { // the writer is about to take the next one
		return nil, fmt.Errorf("%w: %w", errNotSent, ctx.Err())
	}
	return nil, fmt.Errorf("%w: xenstored has not answered %v for %v: %w", errNotSent, c.onWire, c.onWire.age(), ctx.Err())
}
