package lab

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/test/lab/wire"
)

// killLimit is how long a killed process may take to be reported as ended.
const killLimit = 30 * time.Second

// conn is the host's end of the port to dom0's agent.
type conn struct {
	c     net.Conn
	hello chan struct{} // closed when the agent's first frame came
	done  chan struct{} // closed when the reader ended; err is set then

	sendMu sync.Mutex

	mu    sync.Mutex
	err   error
	last  uint32
	procs map[uint32]*Process
}

func newConn(c net.Conn) *conn {
	k := &conn{c: c, hello: make(chan struct{}), done: make(chan struct{}), procs: map[uint32]*Process{}}
	go k.read()
	return k
}

// close ends the reader and with it every process's Wait.
func (k *conn) close() {
	k.c.Close()
	<-k.done
}

func (k *conn) send(f wire.Frame) error {
	k.sendMu.Lock()
	defer k.sendMu.Unlock()
	return wire.Write(k.c, f)
}

func (k *conn) read() {
	defer close(k.done)
	r := bufio.NewReaderSize(k.c, 2*wire.MaxData)
	var err error
	for {
		var f wire.Frame
		if f, err = wire.Read(r); err != nil {
			break
		}
		if f.Kind == wire.Hello {
			close(k.hello)
			continue
		}
		k.mu.Lock()
		p := k.procs[f.ID]
		if f.Kind == wire.Exit {
			delete(k.procs, f.ID)
		}
		k.mu.Unlock()
		if p != nil {
			p.frame(f)
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.err = fmt.Errorf("dom0's agent is gone: %w", err)
	for _, p := range k.procs {
		p.finish(k.err)
	}
}

// A Command is a bash script to run in dom0.
type Command struct {
	Script string
	Args   []string // $1, $2 …
	Stdin  io.Reader
	// Stdout and Stderr get the output as it comes. They must not block: other processes' output waits behind them.
	Stdout, Stderr io.Writer
}

// A Process runs in dom0.
type Process struct {
	k    *conn
	id   uint32
	cmd  Command
	room chan struct{} // a token for each Stdin frame that may be sent
	done chan struct{} // closed at the end; err is set then
	err  error
}

// An ExitError tells of a script that ended with another code than 0.
type ExitError struct {
	Script string
	Code   int
	Stderr string // when it was kept
}

func (e *ExitError) Error() string {
	return fmt.Sprintf("in dom0: %s: exit code %d: %s", abridge(e.Script), e.Code, bytes.TrimSpace([]byte(e.Stderr)))
}

// abridge makes one short line of a script.
func abridge(script string) string {
	line, rest, _ := bytes.Cut(bytes.TrimSpace([]byte(script)), []byte("\n"))
	if len(line) > 100 {
		line, rest = line[:100], line
	}
	if len(rest) > 0 {
		return string(line) + "…"
	}
	return string(line)
}

func (k *conn) start(c Command) (*Process, error) {
	argv := append([]string{"/bin/bash", "-c", c.Script, "bash"}, c.Args...)
	p := &Process{k: k, cmd: c, room: make(chan struct{}, wire.Window), done: make(chan struct{})}
	for range wire.Window {
		p.room <- struct{}{}
	}
	k.mu.Lock()
	if err := k.err; err != nil {
		k.mu.Unlock()
		return nil, err
	}
	k.last++
	p.id = k.last
	k.procs[p.id] = p
	k.mu.Unlock()
	f := wire.JSON(wire.Start, p.id, wire.Process{Argv: argv})
	if err := k.send(f); err != nil {
		k.mu.Lock()
		delete(k.procs, p.id)
		k.mu.Unlock()
		return nil, fmt.Errorf("to dom0's agent: %w", err)
	}
	go p.feed()
	return p, nil
}

// feed sends standard input. It ends with the process, or when a read of cmd.Stdin that was under way then returns.
func (p *Process) feed() {
	for p.cmd.Stdin != nil {
		data := make([]byte, wire.MaxData)
		n, err := p.cmd.Stdin.Read(data)
		if n > 0 {
			select {
			case <-p.room:
			case <-p.done:
				return
			}
			if p.k.send(wire.Frame{Kind: wire.Stdin, ID: p.id, Data: data[:n]}) != nil {
				return
			}
		}
		if err != nil {
			break
		}
	}
	p.k.send(wire.Frame{Kind: wire.StdinClose, ID: p.id})
}

func (p *Process) frame(f wire.Frame) {
	switch f.Kind {
	case wire.Ack:
		p.room <- struct{}{}
	case wire.Stdout:
		if p.cmd.Stdout != nil {
			p.cmd.Stdout.Write(f.Data)
		}
	case wire.Stderr:
		if p.cmd.Stderr != nil {
			p.cmd.Stderr.Write(f.Data)
		}
	case wire.Exit:
		var s wire.Status
		err := json.Unmarshal(f.Data, &s)
		switch {
		case err != nil:
			err = fmt.Errorf("exit frame %q: %w", f.Data, err)
		case s.Error != "":
			err = errors.New(s.Error)
		case s.Code != 0:
			err = &ExitError{Script: p.cmd.Script, Code: s.Code}
		}
		p.finish(err)
	}
}

func (p *Process) finish(err error) {
	p.err = err
	close(p.done)
}

// Signal sends a signal to the process's group.
func (p *Process) Signal(s syscall.Signal) error {
	return p.k.send(wire.Frame{Kind: wire.Signal, ID: p.id, Data: []byte{byte(s)}})
}

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end. When ctx ends first the process is killed. The error is an *ExitError for a code other than 0.
func (p *Process) Wait(ctx context.Context) error {
	select {
	case <-p.done:
		return p.err
	case <-ctx.Done():
	}
	p.Kill()
	return fmt.Errorf("in dom0: %s: killed: %w", abridge(p.cmd.Script), context.Cause(ctx))
}

// Kill kills the process's group and waits for the end, which is the only thing wanted of it.
func (p *Process) Kill() {
	if p.Signal(syscall.SIGKILL) != nil {
		return // the agent is gone, and the process with it
	}
	select {
	case <-p.done:
	case <-time.After(killLimit):
	}
}
