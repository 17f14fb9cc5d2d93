package console

import (
	"context"
	"fmt"
	"sync"
	"time"
)

// A Terminal takes the log's bytes. Room is asked before every Write: the
// log never writes more than it was told, because a write that does not fit would stop the stubdomain.
type Terminal interface {
	// Room is how many bytes can be written now without blocking, 0 while nobody reads.
	Room() int
	// Write writes p, which is not longer than the last Room.
	Write(p []byte) (int, error)
}

// queueLimit bounds what is kept for a console that nobody drains. It holds
// a whole boot at debug level; beyond it the oldest lines go and are counted.
const queueLimit = 64 << 10

// retry bounds the time between two looks at a ring that was full. Console 0
// gives user space no event when its backend reads, so this is the one wait in
// the agent that looks again by time; it runs only while lines are waiting.
const (
	retryFirst = 20 * time.Millisecond
	retryMost  = 5 * time.Second
)

// A Log is a queue of lines in front of a Terminal. Adding a line never blocks.
type Log struct {
	term Terminal
	kick chan struct{}
	quit chan struct{}
	done chan struct{}

	current []byte // what is left of the line being written; the writer's own

	mu           sync.Mutex
	queue        [][]byte // each ends in '\n'
	bytes        int
	droppedLines int
	droppedBytes int
	empty        bool       // everything was written
	idle         *sync.Cond // signalled when empty or ended becomes true
	ended        bool
}

// NewLog starts the writer of a log. Close ends it.
func NewLog(term Terminal) *Log {
	l := &Log{term: term, kick: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{}), empty: true}
	l.idle = sync.NewCond(&l.mu)
	go l.run()
	return l
}

// Add queues one line, without its line end, that holds only bytes fit for a terminal (see Escape).
func (l *Log) Add(line []byte) {
	for len(line) > 2*MaxLine { // prefix and attributes may come on top of MaxLine
		l.add(line[:2*MaxLine])
		line = line[2*MaxLine:]
	}
	l.add(line)
}

func (l *Log) add(line []byte) {
	b := make([]byte, 0, len(line)+1)
	b = append(append(b, line...), '\n')
	l.mu.Lock()
	l.shed(queueLimit - len(b))
	l.queue = append(l.queue, b)
	l.bytes += len(b)
	l.empty = false
	l.mu.Unlock()
	l.Kick()
}

// Shed drops and counts the oldest lines until at most most bytes wait, so that what comes next is soon written.
func (l *Log) Shed(most int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.shed(most)
}

func (l *Log) shed(most int) {
	for l.bytes > most && len(l.queue) > 0 {
		l.droppedLines++
		l.droppedBytes += len(l.queue[0])
		l.bytes -= len(l.queue[0])
		l.queue = l.queue[1:]
	}
}

// Kick makes the writer look at the terminal again: its Room may have changed.
func (l *Log) Kick() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// Flush waits until every line was written or ctx ends.
func (l *Log) Flush(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.idle.Broadcast()
	})
	defer stop()
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.empty && !l.ended {
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("console 0: dom0 does not read it, %d bytes of log are left: %w", l.bytes, err)
		}
		l.idle.Wait()
	}
	return nil
}

// Close ends the writer. Lines that were not written are lost; Flush first.
func (l *Log) Close() error {
	close(l.quit)
	<-l.done
	return nil
}

func (l *Log) run() {
	defer close(l.done)
	defer func() {
		l.mu.Lock()
		l.ended = true
		l.idle.Broadcast()
		l.mu.Unlock()
	}()
	wait := retryFirst
	again := time.NewTimer(time.Hour)
	again.Stop()
	defer again.Stop()
	for {
		select {
		case <-l.quit:
			return
		case <-l.kick:
		case <-again.C:
		}
		progress, left := l.write()
		if progress {
			wait = retryFirst
		}
		if left {
			again.Reset(wait)
			wait = min(2*wait, retryMost)
		} else {
			again.Stop()
		}
	}
}

// write moves what fits to the terminal.
func (l *Log) write() (progress, left bool) {
	for {
		if len(l.current) == 0 && !l.next() {
			return progress, false
		}
		room := l.term.Room() - 1 // the tty writes \n as \r\n
		if room < min(len(l.current), MaxLine/2) {
			return progress, true
		}
		n, err := l.term.Write(l.current[:min(len(l.current), room)])
		if err != nil || n == 0 {
			return progress, true
		}
		l.current = l.current[n:]
		progress = true
	}
}

// next takes the next line off the queue; before it goes the count of what was dropped.
func (l *Log) next() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case l.droppedLines > 0:
		l.current = fmt.Appendf(nil, "%s: console 0 was not read: %d lines, %d bytes of log dropped\n", Prefix, l.droppedLines, l.droppedBytes)
		l.droppedLines, l.droppedBytes = 0, 0
	case len(l.queue) > 0:
		l.current = l.queue[0]
		l.bytes -= len(l.current)
		l.queue = l.queue[1:]
	default:
		l.empty = true
		l.idle.Broadcast()
		return false
	}
	return true
}
