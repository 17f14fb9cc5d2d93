package xenstore

import (
	"context"
	"fmt"
	"io/fs"
	"strconv"
	"sync"

	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
)

// maxPending bounds the distinct paths that a watch keeps for its reader.
const maxPending = 256

// Watch reports changes of a node and of all below it. Its queue never blocks
// the connection: a path that already waits is not queued twice, and when more
// than 256 distinct paths wait they become one event of the watched path itself.
type Watch struct {
	c     *Client
	path  string
	token string

	closeOnce sync.Once
	closeErr  error
	closed    chan struct{}
	ready     chan struct{} // holds one token while paths may wait

	mu        sync.Mutex
	pending   []string // oldest first
	queued    map[string]struct{}
	collapsed bool // pending is the watched path alone and stands for everything
}

// Watch begins to watch path. The first event, of path itself, comes at once,
// whether the node exists or not.
func (c *Client) Watch(ctx context.Context, path string) (*Watch, error) {
	fail := func(err error) (*Watch, error) {
		return nil, &Error{Op: wire.Watch.String(), Path: path, Err: err}
	}
	if err := checkPath(path); err != nil {
		return fail(err)
	}
	w := &Watch{
		c:      c,
		path:   path,
		closed: make(chan struct{}),
		ready:  make(chan struct{}, 1),
		queued: make(map[string]struct{}),
	}
	// The first event may come before the answer.
	c.mu.Lock()
	c.token++
	w.token = strconv.FormatUint(c.token, 10)
	c.watches[w.token] = w
	c.mu.Unlock()

	answer, err := c.roundTrip(ctx, w.message(wire.Watch), func([]byte) (wire.Message, bool) {
		return w.message(wire.Unwatch), true
	})
	if err == nil {
		err = checkOK(answer)
	}
	if err != nil {
		w.forget()
		return fail(err)
	}
	return w, nil
}

// Path is the path as given to Client.Watch.
func (w *Watch) Path() string { return w.path }

// Next waits for the next event and returns the path that changed, in the form
// (absolute or relative) of the watched path. Events come in order of their first
// occurrence. The watched path itself means: look at all of it.
func (w *Watch) Next(ctx context.Context) (string, error) {
	for {
		select {
		case <-w.closed:
			return "", w.fail(fs.ErrClosed)
		default:
		}
		if path, ok := w.pop(); ok {
			return path, nil
		}
		select {
		case <-w.ready:
		case <-w.closed:
		case <-w.c.done:
			// What was received before the end is still handed out.
			if path, ok := w.pop(); ok {
				return path, nil
			}
			return "", w.fail(w.c.Err())
		case <-ctx.Done():
			return "", w.fail(fmt.Errorf("no event: %w", ctx.Err()))
		}
	}
}

func (w *Watch) fail(err error) error {
	return &Error{Op: "wait for a change of", Path: w.path, Err: err}
}

// Close ends the watch and wakes Next with an error that is fs.ErrClosed.
// It waits for xenstored's answer, 5 seconds at most. If those run out it returns
// an error, and the end of the watch is still sent when its turn comes.
func (w *Watch) Close() error {
	w.closeOnce.Do(func() {
		close(w.closed)
		w.forget()
		select {
		case <-w.c.done: // the watch has ended with the connection
			return
		default:
		}
		answer, err := w.c.giveBack(w.message(wire.Unwatch))
		if err == nil {
			err = checkOK(answer)
		}
		if err != nil {
			w.closeErr = &Error{Op: wire.Unwatch.String(), Path: w.path, Err: err}
		}
	})
	return w.closeErr
}

// message is the request that begins or ends the watch.
func (w *Watch) message(typ wire.Type) wire.Message {
	return wire.Message{Type: typ, Payload: wire.Join(w.path, w.token)}
}

// forget makes later events of the watch be dropped.
func (w *Watch) forget() {
	w.c.mu.Lock()
	delete(w.c.watches, w.token)
	w.c.mu.Unlock()
}

func (w *Watch) push(path string) {
	w.mu.Lock()
	if _, ok := w.queued[path]; !ok && !w.collapsed {
		if len(w.pending) == maxPending {
			w.collapsed = true
			w.pending = w.pending[:0]
			clear(w.queued)
			path = w.path
		}
		w.pending = append(w.pending, path)
		w.queued[path] = struct{}{}
	}
	w.mu.Unlock()
	w.wake()
}

func (w *Watch) pop() (string, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.pending) == 0 {
		return "", false
	}
	path := w.pending[0]
	w.pending = w.pending[1:]
	delete(w.queued, path)
	w.collapsed = false
	if len(w.pending) > 0 {
		w.wake() // another goroutine may be in Next too
	}
	return path, true
}

func (w *Watch) wake() {
	select {
	case w.ready <- struct{}{}:
	default:
	}
}
