// Command dom0agent runs in the lab's dom0 and starts processes there for the host: see package wire.
//
// Usage: dom0agent PORT, where PORT is the virtio-serial port's device, /dev/vportNpM.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/test/lab/wire"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: dom0agent PORT")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "dom0agent:", err)
		os.Exit(1)
	}
}

func run(path string) error {
	port, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer port.Close()
	a := &agent{port: port, jobs: map[uint32]*job{}}
	if err := a.send(wire.Frame{Kind: wire.Hello}); err != nil {
		return err
	}
	r := bufio.NewReaderSize(port, 2*wire.MaxData)
	for {
		f, err := wire.Read(r)
		if errors.Is(err, io.EOF) {
			return errors.New(path + ": the host closed its end")
		}
		if err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		a.handle(f)
	}
}

type agent struct {
	sendMu sync.Mutex
	port   *os.File

	mu   sync.Mutex
	jobs map[uint32]*job
}

// job is a running process. stdin holds what it has not read yet; the host keeps to wire.Window, so that the channel
// never blocks the port's reader.
type job struct {
	id     uint32
	stdin  chan []byte
	closed bool           // stdin's end was sent
	pid    int            // 0 before the start and after the end; also the process group
	signal syscall.Signal // came before the start
}

func (a *agent) send(f wire.Frame) error {
	a.sendMu.Lock()
	defer a.sendMu.Unlock()
	return wire.Write(a.port, f)
}

func (a *agent) handle(f wire.Frame) {
	a.mu.Lock()
	defer a.mu.Unlock()
	j := a.jobs[f.ID]
	switch f.Kind {
	case wire.Start:
		j = &job{id: f.ID, stdin: make(chan []byte, wire.Window+1)}
		a.jobs[f.ID] = j
		go a.runJob(j, f.Data)
	case wire.Stdin:
		if j != nil && !j.closed {
			j.stdin <- f.Data
		}
	case wire.StdinClose:
		if j != nil && !j.closed {
			j.closed = true
			close(j.stdin)
		}
	case wire.Signal:
		if j == nil || len(f.Data) != 1 {
			return
		}
		j.signal = syscall.Signal(f.Data[0])
		if j.pid != 0 {
			syscall.Kill(-j.pid, j.signal)
		}
	}
}

func (a *agent) runJob(j *job, start []byte) {
	status := a.execute(j, start)
	a.mu.Lock()
	delete(a.jobs, j.id)
	if !j.closed {
		j.closed = true
		close(j.stdin)
	}
	a.mu.Unlock()
	a.send(wire.JSON(wire.Exit, j.id, status))
}

func (a *agent) execute(j *job, start []byte) wire.Status {
	var p wire.Process
	if err := json.Unmarshal(start, &p); err != nil || len(p.Argv) == 0 {
		return wire.Status{Code: 127, Error: fmt.Sprintf("start frame %q: %v", start, err)}
	}
	cmd := exec.Command(p.Argv[0], p.Argv[1:]...)
	cmd.Env = append(os.Environ(), p.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Stdout = output{a, wire.Stdout, j.id}
	cmd.Stderr = output{a, wire.Stderr, j.id}
	// A daemon that a script leaves behind may hold the pipes open: the script's end counts.
	cmd.WaitDelay = time.Second
	stdin, err := cmd.StdinPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return wire.Status{Code: 127, Error: err.Error()}
	}
	a.mu.Lock()
	j.pid = cmd.Process.Pid
	if j.signal != 0 {
		syscall.Kill(-j.pid, j.signal)
	}
	a.mu.Unlock()
	go a.feed(j, stdin)
	err = cmd.Wait()
	a.mu.Lock()
	j.pid = 0
	a.mu.Unlock()
	ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus)
	switch {
	case ok && ws.Signaled():
		return wire.Status{Code: 128 + int(ws.Signal())}
	case cmd.ProcessState != nil:
		return wire.Status{Code: cmd.ProcessState.ExitCode()}
	}
	return wire.Status{Code: 127, Error: err.Error()}
}

// feed passes standard input on until its end, and acknowledges each piece also when the process does not want it any
// more, so that the host does not wait for ever.
func (a *agent) feed(j *job, stdin io.WriteCloser) {
	for data := range j.stdin {
		stdin.Write(data)
		a.send(wire.Frame{Kind: wire.Ack, ID: j.id})
	}
	stdin.Close()
}

// output sends what a process writes.
type output struct {
	a    *agent
	kind wire.Kind
	id   uint32
}

func (o output) Write(b []byte) (int, error) {
	n := 0
	for n < len(b) {
		m := min(len(b)-n, wire.MaxData)
		if err := o.a.send(wire.Frame{Kind: o.kind, ID: o.id, Data: b[n : n+m]}); err != nil {
			return n, err
		}
		n += m
	}
	return n, nil
}
