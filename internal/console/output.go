package console

import (
	"fmt"
	"sync"
	"time"
)

// A Limit is a token bucket for output that a guest can cause: Burst bytes
// at once, then Rate bytes a second. dom0 keeps console 0 in a file without a limit.
type Limit struct {
	Burst int // bytes
	Rate  int // bytes a second
}

// DefaultLimit is what QEMU's output may write unless the kernel command line says otherwise.
var DefaultLimit = Limit{Burst: 64 << 10, Rate: 4 << 10}

// An Output writes the lines of another process (QEMU's stderr and trace)
// to the log: one line each with source and time, split at MaxLine, escaped
// and limited. What the limit holds back is dropped and counted, and the count
// is written once the limit allows. It is an io.Writer that never blocks and never fails.
type Output struct {
	log    *Log
	source string
	now    func() time.Duration
	limit  Limit

	mu           sync.Mutex
	split        splitter
	tokens       float64
	last         time.Duration
	droppedLines int
	droppedBytes int
	summary      *time.Timer
	closed       bool
}

// NewOutput makes an Output for the lines of source.
func NewOutput(log *Log, source string, now func() time.Duration, limit Limit) *Output {
	return &Output{log: log, source: source, now: now, limit: limit, tokens: float64(limit.Burst), last: now()}
}

// Write takes a piece of the stream.
func (o *Output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.split.feed(p, o.line)
	return len(p), nil
}

// Held tells whether the limit holds back what came last.
func (o *Output) Held() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.droppedLines > 0
}

// Close writes an unfinished last line and the count of what was dropped.
func (o *Output) Close() error {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.split.flush(o.line)
	o.closed = true
	if o.summary != nil {
		o.summary.Stop()
	}
	o.summarise()
	return nil
}

func (o *Output) line(text []byte) {
	b := stamp(nil, o.source, o.now())
	b = Escape(b, text)
	cost := len(b) + 1
	o.refill()
	// While something is held back its count goes first, so that the order in the log is true. It goes on with a second's worth at once: a flood
	// would make a count of every other line.
	if o.droppedLines > 0 && o.tokens >= float64(max(cost+summaryCost, min(o.limit.Rate, o.limit.Burst))) {
		o.summarise()
	}
	if o.droppedLines > 0 || o.tokens < float64(cost) {
		o.droppedLines++
		o.droppedBytes += len(text) + 1
		o.schedule()
		return
	}
	o.tokens -= float64(cost)
	o.log.Add(b)
}

// summaryCost is what the line with the count is charged.
const summaryCost = 128

func (o *Output) refill() {
	now := o.now()
	o.tokens = min(float64(o.limit.Burst), o.tokens+(now-o.last).Seconds()*float64(o.limit.Rate))
	o.last = now
}

// schedule makes sure that the count is written even if no further line comes.
func (o *Output) schedule() {
	if o.summary != nil || o.closed {
		return
	}
	after := time.Second
	if missing := summaryCost - o.tokens; missing > 0 && o.limit.Rate > 0 {
		after += time.Duration(missing / float64(o.limit.Rate) * float64(time.Second))
	}
	o.summary = time.AfterFunc(after, func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.summary = nil
		if o.closed {
			return
		}
		o.refill()
		if o.tokens >= summaryCost {
			o.summarise()
		} else if o.droppedLines > 0 {
			o.schedule()
		}
	})
}

func (o *Output) summarise() {
	if o.droppedLines == 0 {
		return
	}
	b := stamp(nil, o.source, o.now())
	b = fmt.Appendf(b, "... %d lines, %d bytes dropped (limit: %d bytes, then %d a second)", o.droppedLines, o.droppedBytes, o.limit.Burst, o.limit.Rate)
	o.tokens = max(0, o.tokens-summaryCost)
	o.droppedLines, o.droppedBytes = 0, 0
	o.log.Add(b)
}
