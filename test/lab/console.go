package lab

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
)

// A Console is a stream of text out of dom0 — a guest's serial port, a log that grows, a QMP session — kept in a file
// here. Its methods may be called concurrently, except that two Expects share what they consume.
type Console struct {
	name string
	file *os.File

	mu      sync.Mutex
	text    []byte
	seen    int           // Expect is past this
	ended   error         // why no more comes
	changed chan struct{} // closed at the next change
	in      *io.PipeWriter
	proc    *Process
}

// newConsole keeps the stream in the file at path; name stands in messages.
func newConsole(name, path string) (*Console, error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	return &Console{name: name, file: f, changed: make(chan struct{})}, nil
}

// run connects the console with a script's input and output.
func (c *Console) run(l *Lab, script string, args ...string) error {
	r, w := io.Pipe()
	p, err := l.Begin(Command{Script: script, Args: args, Stdin: r, Stdout: c, Stderr: c})
	if err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	c.mu.Lock()
	c.in, c.proc = w, p
	c.mu.Unlock()
	go func() {
		<-p.Done()
		r.CloseWithError(io.ErrClosedPipe)
		if p.err != nil {
			c.end(p.err)
		} else {
			c.end(io.EOF)
		}
	}()
	return nil
}

// Write takes what the stream brings.
func (c *Console) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.text = append(c.text, b...)
	c.signal()
	return c.file.Write(b)
}

func (c *Console) signal() {
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *Console) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended == nil {
		c.ended = err
		c.signal()
		c.file.Close()
	}
}

// Text returns all that came so far.
func (c *Console) Text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.text)
}

// Tail returns the last n lines, with a heading.
func (c *Console) Tail(n int) string {
	return fmt.Sprintf("--- %s (%s, last %d lines)\n%s", c.name, c.file.Name(), n, LastLines(c.Text(), n))
}

// Expect waits until a part of the text that no Expect has taken yet matches, takes the text up to the end of the match,
// and returns the match and its groups.
func (c *Console) Expect(ctx context.Context, pattern string) ([]string, error) {
	re, err := regexp.Compile("(?m)" + pattern)
	if err != nil {
		return nil, err
	}
	for {
		c.mu.Lock()
		rest, ended, changed := c.text[c.seen:], c.ended, c.changed
		if m := re.FindSubmatchIndex(rest); m != nil {
			c.seen += m[1]
			groups := make([]string, len(m)/2)
			for i := range groups {
				if m[2*i] >= 0 {
					groups[i] = string(rest[m[2*i]:m[2*i+1]])
				}
			}
			c.mu.Unlock()
			return groups, nil
		}
		c.mu.Unlock()
		if ended != nil {
			return nil, fmt.Errorf("%s ended (%w) before %q came; it had\n%s", c.name, ended, pattern, LastLines(c.Text(), 20))
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("%s: no %q: %w; it had\n%s", c.name, pattern, context.Cause(ctx), LastLines(c.Text(), 20))
		}
	}
}

// Send writes text to the other end.
func (c *Console) Send(text string) error {
	c.mu.Lock()
	in := c.in
	c.mu.Unlock()
	if in == nil {
		return fmt.Errorf("%s: not connected yet", c.name)
	}
	if _, err := io.WriteString(in, text); err != nil {
		return fmt.Errorf("%s: %w", c.name, err)
	}
	return nil
}

// Close ends the stream by killing what feeds it.
func (c *Console) Close() {
	c.mu.Lock()
	p, in := c.proc, c.in
	c.mu.Unlock()
	if p != nil {
		p.Kill()
		in.Close()
	}
	c.end(io.EOF)
}

// lines is a Writer that calls f for each whole line.
type lines struct {
	f    func(string)
	part string
}

func (l *lines) Write(b []byte) (int, error) {
	all := strings.Split(l.part+string(b), "\n")
	l.part = all[len(all)-1]
	for _, line := range all[:len(all)-1] {
		l.f(line)
	}
	return len(b), nil
}

// Lines is a Writer for a Command that calls f for each whole line.
func Lines(f func(line string)) io.Writer { return &lines{f: f} }
