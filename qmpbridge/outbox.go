package qmpbridge

// itemOverhead is what a value costs beside its bytes, so that many small ones
// are bounded too.
const itemOverhead = 128

// An outbox holds what waits for one peer, in order.
type outbox[T any] struct {
	limit   int
	waiting []entry[T]
	size    int
	first   [4]entry[T] // waiting's place while it is short
}

type entry[T any] struct {
	item T
	cost int
}

// put adds an item; false when the limit would be passed. One item alone may
// cost any amount, and one that costs nothing is always taken.
func (o *outbox[T]) put(item T, cost int) bool {
	if cost > 0 && o.size > 0 && o.size+cost > o.limit {
		return false
	}
	if len(o.waiting) == 0 {
		o.waiting = o.first[:0]
	}
	o.waiting = append(o.waiting, entry[T]{item, cost})
	o.size += cost
	return true
}

// take removes the oldest item; false if there is none.
func (o *outbox[T]) take() (item T, ok bool) {
	if len(o.waiting) == 0 {
		return item, false
	}
	next := o.waiting[0]
	o.waiting[0] = entry[T]{}
	o.waiting = o.waiting[1:]
	o.size -= next.cost
	return next.item, true
}
