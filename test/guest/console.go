// Package guest drives the lab's test guest over its serial port. README.md says what the guest can do; src holds it.
package guest

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
)

// Console is the guest's serial port. One command runs at a time; lines that the guest prints on its own (its banner,
// ticks) may come between and are kept.
type Console struct {
	rw   io.ReadWriteCloser
	done chan struct{}

	command sync.Mutex // held while a command runs

	mu      sync.Mutex
	lines   []string
	err     error         // why no line comes any more
	changed chan struct{} // closed and replaced at each new line
}

// Reply is one answer, `ok COMMAND key=value …`.
type Reply struct {
	Line   string
	Fields map[string]string // the words that have an equals sign
}

// Refused is an answer that begins with `err`. Its Reply has the fields all the same.
type Refused struct {
	Command string
	Reply
}

func (e *Refused) Error() string { return fmt.Sprintf("guest command %q: %s", e.Command, e.Line) }

// NewConsole reads lines from rw from now on and owns it.
func NewConsole(rw io.ReadWriteCloser) *Console {
	c := &Console{rw: rw, done: make(chan struct{}), changed: make(chan struct{})}
	go c.read()
	return c
}

// Close closes the port and waits for the reader.
func (c *Console) Close() error {
	err := c.rw.Close()
	<-c.done
	return err
}

func (c *Console) read() {
	defer close(c.done)
	scan := bufio.NewScanner(c.rw)
	scan.Buffer(nil, 64<<10)
	for scan.Scan() {
		if line := strings.Trim(scan.Text(), "\r\x00"); line != "" {
			c.add(line, nil)
		}
	}
	err := scan.Err()
	if err == nil {
		err = io.EOF
	}
	c.add("", err)
}

func (c *Console) add(line string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil {
		c.lines = append(c.lines, line)
	}
	c.err = err
	close(c.changed)
	c.changed = make(chan struct{})
}

// Lines returns all lines so far, without their ends.
func (c *Console) Lines() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lines[:len(c.lines):len(c.lines)]
}

// Wait returns the first line that begins with one of the prefixes, beginning to look at line number from, and the
// number of the line after it.
func (c *Console) Wait(ctx context.Context, from int, prefixes ...string) (line string, next int, err error) {
	for at := from; ; {
		c.mu.Lock()
		lines, readErr, changed := c.lines, c.err, c.changed
		c.mu.Unlock()
		for ; at < len(lines); at++ {
			for _, p := range prefixes {
				if strings.HasPrefix(lines[at], p) {
					return lines[at], at + 1, nil
				}
			}
		}
		if readErr != nil {
			return "", at, fmt.Errorf("guest console: wait for %q: %w", prefixes, readErr)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", at, fmt.Errorf("guest console: wait for %q: %w", prefixes, context.Cause(ctx))
		}
	}
}

// Command sends one line and returns its answer, a *Refused if the guest says `err`.
func (c *Console) Command(ctx context.Context, line string) (Reply, error) {
	c.command.Lock()
	defer c.command.Unlock()
	from := len(c.Lines())
	if _, err := io.WriteString(c.rw, line+"\n"); err != nil {
		return Reply{}, fmt.Errorf("guest command %q: %w", line, err)
	}
	name, _, _ := strings.Cut(line, " ")
	answer, _, err := c.Wait(ctx, from, "ok "+name, "err "+name)
	if err != nil {
		return Reply{}, fmt.Errorf("guest command %q: %w", line, err)
	}
	reply := Reply{answer, fields(answer)}
	if strings.HasPrefix(answer, "err ") {
		return reply, &Refused{line, reply}
	}
	return reply, nil
}

func fields(line string) map[string]string {
	m := map[string]string{}
	for word := range strings.FieldsSeq(line) {
		if key, value, ok := strings.Cut(word, "="); ok {
			m[key] = value
		}
	}
	return m
}
