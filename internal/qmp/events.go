package qmp

import (
	"context"
	"encoding/json"
	"fmt"
	"sync"
)

// subscriber is the queue of one call of Events: lines, not decoded events, so that its size in memory is known.
type subscriber struct {
	mu    sync.Mutex
	lines [][]byte
	size  int
	wake  chan struct{} // one token: something was put
}

// Events returns a channel with every event that comes from now on, in QEMU's order. It may be called before Connect and more than once; each
// subscriber gets all events. The channel is closed when ctx ends, at Disconnect, or after the last event of a connection that ended.
//
// Events wait in a queue, never in the reader: a subscriber may run commands, and one that does not read holds up nobody. A subscriber that reads
// loses nothing. One that falls MaxQueue behind loses its oldest events, counted in Stats.
func (m *Monitor) Events(ctx context.Context) (<-chan Event, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil, fmt.Errorf("qmp events: %w", m.err)
	}
	s := &subscriber{wake: make(chan struct{}, 1)}
	events := make(chan Event)
	m.subscribers[s] = struct{}{}
	m.goroutines.Go(func() {
		defer close(events)
		m.deliver(ctx, s, events)
		m.mu.Lock()
		delete(m.subscribers, s)
		m.mu.Unlock()
	})
	return events, nil
}

func (m *Monitor) deliver(ctx context.Context, s *subscriber, events chan<- Event) {
	ended := false
	for {
		line, ok := s.get()
		if !ok {
			if ended {
				return
			}
			select {
			case <-s.wake:
			case <-m.done:
				ended = true // look once more: the last events may have come before
			case <-ctx.Done():
				return
			case <-m.leave:
				return
			}
			continue
		}
		var e Event
		if json.Unmarshal(line, &e) != nil {
			continue // cannot be: route has decoded it
		}
		select {
		case events <- e:
		case <-ctx.Done():
			return
		case <-m.leave:
			return
		}
	}
}

// put queues a line, which nobody changes any more, and returns how many older ones had to go.
func (s *subscriber) put(line []byte) (dropped uint64) {
	s.mu.Lock()
	s.lines = append(s.lines, line)
	s.size += len(line) + eventOverhead
	for s.size > MaxQueue && len(s.lines) > 1 {
		s.pop()
		dropped++
	}
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return dropped
}

func (s *subscriber) get() ([]byte, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.lines) == 0 {
		return nil, false
	}
	return s.pop(), true
}

// pop takes the oldest line. s.mu is held and there is one.
func (s *subscriber) pop() []byte {
	line := s.lines[0]
	s.lines[0] = nil
	s.lines = s.lines[1:]
	s.size -= len(line) + eventOverhead
	return line
}
