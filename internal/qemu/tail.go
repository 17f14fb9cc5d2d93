package qemu

import (
	"bytes"
	"sync"
)

const (
	tailLines = 20
	tailWidth = 1024
)

// Tail is an io.Writer that keeps the last 20 lines written to it, for the log of QEMU's death. Lines are cut at 1 KiB: the rest is a line of its own.
// The zero value is ready. It may be used from several goroutines.
type Tail struct {
	mu    sync.Mutex
	lines []string // oldest first
	part  []byte   // of a line without its end yet, shorter than tailWidth
}

// Write never fails.
func (t *Tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := len(b)
	for len(b) > 0 {
		end := bytes.IndexByte(b, '\n')
		room := tailWidth - len(t.part)
		switch {
		case end >= 0 && end <= room:
			t.part = append(t.part, b[:end]...)
			b = b[end+1:]
			t.add()
		case len(b) > room:
			t.part = append(t.part, b[:room]...)
			b = b[room:]
			t.add()
		default:
			t.part = append(t.part, b...)
			b = nil
		}
	}
	return n, nil
}

// add ends the line in t.part.
func (t *Tail) add() {
	if len(t.lines) == tailLines {
		t.lines = append(t.lines[:0], t.lines[1:]...)
	}
	t.lines = append(t.lines, string(bytes.TrimSuffix(t.part, []byte{'\r'})))
	t.part = t.part[:0]
}

// Lines returns the last lines, oldest first, without their ends. One that has not ended yet is the last.
func (t *Tail) Lines() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	lines := append([]string(nil), t.lines...)
	if len(t.part) > 0 {
		lines = append(lines, string(t.part))
	}
	return lines[max(0, len(lines)-tailLines):]
}
