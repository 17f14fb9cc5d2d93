package qmpbridge

import "sync"

// itemOverhead is what a value costs beside its bytes, so that many small ones
// are bounded too.
const itemOverhead = 128

// An outbox holds what waits for one peer, in order. Whoever has put something in
// writes it out; if another goroutine is at it already, that one takes it along.
// So a value that finds the peer ready is written by the goroutine that read it.
type outbox[T any] struct {
	limit int

	mu      sync.Mutex
	waiting []entry[T]
	size    int
	busy    bool
	first   [4]entry[T] // waiting's place while it is short
}

type entry[T any] struct {
	item T
	cost int
}

// put adds an item; false when the limit would be passed. One item alone may
// cost any amount, and one that costs nothing is always taken.
func (o *outbox[T]) put(item T, cost int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if cost > 0 && o.size > 0 && o.size+cost > o.limit {
		return false
	}
	o.waiting = append(o.waiting, entry[T]{item, cost})
	o.size += cost
	return true
}

// flush writes until nothing waits. After an error nothing is written any more.
func (o *outbox[T]) flush(write func(T) error) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.busy {
		return nil
	}
	o.busy = true
	for len(o.waiting) > 0 {
		next := o.waiting[0]
		o.waiting[0] = entry[T]{}
		o.waiting = o.waiting[1:]
		o.size -= next.cost
		o.mu.Unlock()
		err := write(next.item)
		o.mu.Lock()
		if err != nil {
			return err
		}
	}
	o.waiting, o.busy = o.first[:0], false
	return nil
}
