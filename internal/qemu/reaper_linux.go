package qemu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// environment of a started program. Messages are in English, for the log.
var environment = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "LC_ALL=C"}

// Reaper waits for every child of this process: those it has started, and the orphans that PID 1 (or a subreaper) inherits. There can be one in a
// process, and os/exec cannot be used beside it: its Wait would find the child gone.
type Reaper struct {
	orphan  func(pid int, exit Exit)
	signals chan os.Signal
	stop    chan struct{}
	stopped chan struct{}
	close   sync.Once

	// mu is held over fork and its entry in children, over wait4 and its removal, and over kill. So a child cannot end unregistered, and a
	// signal cannot hit another process with the same number.
	mu       sync.Mutex
	children map[int]*Process
}

// NewReaper starts to reap. orphan, if not nil, is called for each reaped process that was not started here, from the Reaper's goroutine.
func NewReaper(orphan func(pid int, exit Exit)) *Reaper {
	r := &Reaper{
		orphan:   orphan,
		signals:  make(chan os.Signal, 1), // one is enough: a pass reaps all there are
		stop:     make(chan struct{}),
		stopped:  make(chan struct{}),
		children: make(map[int]*Process),
	}
	signal.Notify(r.signals, syscall.SIGCHLD)
	go r.loop()
	return r
}

// Close ends reaping and waits for the Reaper's goroutine. Children still alive stay so, and their Process never ends.
func (r *Reaper) Close() error {
	r.close.Do(func() {
		signal.Stop(r.signals)
		close(r.stop)
	})
	<-r.stopped
	return nil
}

func (r *Reaper) loop() {
	defer close(r.stopped)
	for {
		for r.reapOne() {
		}
		select {
		case <-r.signals:
		case <-r.stop:
			return
		}
	}
}

// reapOne takes one dead child and tells its owner. It returns false when there is none.
func (r *Reaper) reapOne() bool {
	var status syscall.WaitStatus
	var usage syscall.Rusage
	r.mu.Lock()
	pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, &usage)
	for errors.Is(err, syscall.EINTR) {
		pid, err = syscall.Wait4(-1, &status, syscall.WNOHANG, &usage)
	}
	if err != nil || pid <= 0 { // ECHILD: no children at all
		r.mu.Unlock()
		return false
	}
	p := r.children[pid]
	delete(r.children, pid)
	exit := newExit(status, usage)
	if p != nil {
		p.exit = exit
		close(p.done)
	}
	r.mu.Unlock()
	if p == nil && r.orphan != nil {
		r.orphan(pid, exit)
	}
	return true
}

// Stdio are the standard descriptors of a program; nil is /dev/null.
type Stdio struct {
	In, Out, Err *os.File
}

// Start starts c in a session of its own, with a minimal environment, and with stdio. Resource limits are the caller's. The files stay the caller's, who
// closes the copies here: QEMU's death then ends what is on their other side. The standard descriptors become blocking, because programs expect that and
// last words must not get lost in a full pipe; so a console that the agent itself writes to must be opened anew for stdio.
func (r *Reaper) Start(c *Command, stdio Stdio) (*Process, error) {
	p, err := r.start(c, stdio)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	return p, nil
}

func (r *Reaper) start(c *Command, stdio Stdio) (*Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	files := append([]*os.File{stdio.In, stdio.Out, stdio.Err}, c.Files...)
	for i := range 3 {
		if files[i] == nil {
			files[i] = null
		}
	}
	numbers := make([]uintptr, len(files))
	for i, f := range files {
		if numbers[i], err = number(f); err != nil {
			return nil, fmt.Errorf("descriptor %d: %w", i, err)
		}
	}
	for _, fd := range numbers[:3] {
		if err := unix.SetNonblock(int(fd), false); err != nil {
			return nil, fmt.Errorf("make standard descriptors blocking: %w", err)
		}
	}

	p := &Process{reaper: r, done: make(chan struct{})}
	fork := func() {
		p.pid, err = syscall.ForkExec(c.Path, c.Argv, &syscall.ProcAttr{
			Env:   environment,
			Files: numbers,
			Sys:   &syscall.SysProcAttr{Setsid: true},
		})
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.Confine {
		inOwnThread(func() {
			p.unconfined = confine()
			fork()
		})
	} else {
		fork()
	}
	runtime.KeepAlive(files)
	if err != nil {
		return nil, err
	}
	r.children[p.pid] = p
	return p, nil
}

// number is the descriptor of f. Fd would do too, but makes the file blocking for its owner. It is valid as long as the owner does not close f.
func number(f *os.File) (uintptr, error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n uintptr
	err = raw.Control(func(fd uintptr) { n = fd })
	return n, err
}

// Process is a child that a Reaper has started.
type Process struct {
	reaper     *Reaper
	pid        int
	unconfined error
	done       chan struct{}
	exit       Exit // set before done is closed
}

// PID is the process's number; it may be another process's once Done is closed.
func (p *Process) PID() int { return p.pid }

// Unconfined is what the kernel has refused of Command.Confine; nil if the process is confined, or was not to be.
func (p *Process) Unconfined() error { return p.unconfined }

// Done is closed when the process has ended and was reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit says how the process ended; it is valid once Done is closed, and zero before.
func (p *Process) Exit() Exit {
	select {
	case <-p.done:
		return p.exit
	default:
		return Exit{}
	}
}

// Wait waits for the end of the process.
func (p *Process) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-p.done:
		return p.exit, nil
	case <-ctx.Done():
		return Exit{}, fmt.Errorf("wait for process %d: %w", p.pid, ctx.Err())
	}
}

// Kill sends a signal. After the process has ended the error is os.ErrProcessDone.
func (p *Process) Kill(sig syscall.Signal) error {
	return p.whileAlive("send "+unix.SignalName(sig)+" to", func() error { return syscall.Kill(p.pid, sig) })
}

// SetOOMScoreAdj makes the kernel's OOM killer prefer the process (1000) or spare it (-1000): proc(5), oom_score_adj.
func (p *Process) SetOOMScoreAdj(adj int) error {
	return p.whileAlive("set OOM score of", func() error {
		err := os.WriteFile("/proc/"+strconv.Itoa(p.pid)+"/oom_score_adj", []byte(strconv.Itoa(adj)), 0)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	})
}

// whileAlive calls f at a time when the pid is certainly p's.
func (p *Process) whileAlive(what string, f func() error) error {
	p.reaper.mu.Lock()
	defer p.reaper.mu.Unlock()
	err := os.ErrProcessDone
	if p.reaper.children[p.pid] == p {
		err = f()
	}
	if err != nil {
		return fmt.Errorf("%s process %d: %w", what, p.pid, err)
	}
	return nil
}

// Exit is how a process ended.
type Exit struct {
	Code   int            // exit status, if Signal is 0
	Signal syscall.Signal // that killed it, or 0
	Core   bool           // a core was dumped
	MaxRSS int64          // most memory it had resident, KiB (getrusage(2)); with SIGKILL it helps to tell the OOM killer's work
}

func newExit(status syscall.WaitStatus, usage syscall.Rusage) Exit {
	e := Exit{MaxRSS: usage.Maxrss}
	if status.Signaled() {
		e.Signal, e.Core = status.Signal(), status.CoreDump()
	} else {
		e.Code = status.ExitStatus()
	}
	return e
}

// Success tells whether the process ended by itself with status 0.
func (e Exit) Success() bool { return e.Signal == 0 && e.Code == 0 }

// String is for the log: "exit status 1", "killed by SIGSEGV, core dumped".
func (e Exit) String() string {
	if e.Signal == 0 {
		return "exit status " + strconv.Itoa(e.Code)
	}
	name := unix.SignalName(e.Signal)
	if name == "" {
		name = "signal " + strconv.Itoa(int(e.Signal))
	}
	if e.Core {
		name += ", core dumped"
	}
	return "killed by " + name
}
