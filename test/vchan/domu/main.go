// Command domu is PID 1 of the test domain that serves vchans for test/e2e. It starts a process for each service, and one
// for the servers behind them.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/modules"
	xenvchan "github.com/stubinit/stubinit/internal/xen/vchan"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/qmpbridge"
	"github.com/stubinit/stubinit/test/vchan"
)

func main() {
	ctx := context.Background()
	var err error
	if os.Getpid() == 1 {
		err = initDomain(ctx)
		fmt.Fprintln(os.Stderr, "domu: FATAL:", err)
		_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	}
	switch {
	case len(os.Args) == 2 && os.Args[1] == "servers":
		err = servers()
	case len(os.Args) == 2:
		err = serve(ctx, os.Args[1])
	default:
		err = fmt.Errorf("arguments %q: want a service's name, or servers", os.Args[1:])
	}
	fmt.Fprintf(os.Stderr, "domu: %s: %v\n", strings.Join(os.Args[1:], " "), err)
	os.Exit(1)
}

// initDomain is PID 1. It returns only with an error.
func initDomain(ctx context.Context) error {
	for _, m := range []struct{ fstype, target string }{
		{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/run"},
	} {
		if err := unix.Mount(m.fstype, m.target, m.fstype, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	if err := modules.Load(slog.Default()); err != nil {
		return err
	}
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	// The servers listen before anybody connects to them, and say so by closing their standard output.
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	backends := exec.Command("/proc/self/exe", "servers")
	backends.Stdout, backends.Stderr = w, os.Stderr
	if err := start(backends, ended); err != nil {
		return err
	}
	w.Close()
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	r.Close()

	running := make([]atomic.Int32, len(vchan.Services)) // pids
	for i, s := range vchan.Services {
		if s.Kind == vchan.Reference {
			go keep(ctx, xs, s, &running[i], ended)
			continue
		}
		cmd := exec.Command("/proc/self/exe", s.Name)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := start(cmd, ended); err != nil {
			return err
		}
		running[i].Store(int32(cmd.Process.Pid))
	}
	go func() { ended <- answer(ctx, xs, running) }()
	return <-ended
}

// start starts a process that must not end.
func start(cmd *exec.Cmd, ended chan<- error) error {
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { ended <- fmt.Errorf("%q ended: %w", cmd.Args, cmd.Wait()) }()
	return nil
}

// keep runs a reference server, again each time that it ends, and counts that.
func keep(ctx context.Context, xs *xenstore.Client, s vchan.Service, pid *atomic.Int32, ended chan<- error) {
	programs, err := filepath.Glob("/usr/lib/xen-4.*/bin/vchan-socket-proxy")
	if err != nil || len(programs) != 1 {
		ended <- fmt.Errorf("want one vchan-socket-proxy in the image, have %q", programs)
		return
	}
	for exits := 1; ; exits++ {
		cmd := exec.Command(programs[0], "--mode=server", "0", "data/"+s.Name, s.Socket)
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		began := time.Now()
		if err := cmd.Start(); err != nil {
			ended <- err
			return
		}
		pid.Store(int32(cmd.Process.Pid))
		err := cmd.Wait()
		fmt.Fprintf(os.Stderr, "domu: %s ended after %v: %v\n", s.Name, time.Since(began), err)
		if status, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && status.Signal() == unix.SIGKILL {
			exits-- // it was our doing
		} else if err := xs.Write(ctx, vchan.ExitsNode, strconv.Itoa(exits)); err != nil {
			ended <- err
			return
		}
		if time.Since(began) < 100*time.Millisecond {
			ended <- fmt.Errorf("%s ends as soon as it starts: %w", s.Name, err)
			return
		}
	}
}

// answer says when all is served, and then counts for dom0.
func answer(ctx context.Context, xs *xenstore.Client, pids []atomic.Int32) error {
	if err := awaitServices(ctx, xs); err != nil {
		return err
	}
	if err := xs.Write(ctx, vchan.RequestNode, ""); err != nil {
		return err
	}
	requests, err := xs.Watch(ctx, vchan.RequestNode)
	if err != nil {
		return err
	}
	if err := xs.Write(ctx, vchan.ReadyNode, "1"); err != nil {
		return err
	}
	for {
		if _, err := requests.Next(ctx); err != nil {
			return err
		}
		text, err := xs.Read(ctx, vchan.RequestNode)
		if err != nil {
			return err
		}
		request, argument, _ := strings.Cut(text, " ")
		var result string
		switch request {
		case vchan.RequestSwitches:
			result, err = countSwitches(pids, argument)
		case vchan.RequestRestart:
			result, err = "done", restart(ctx, xs, pids)
		default:
			continue // the watch's first event
		}
		if err != nil {
			return fmt.Errorf("request %q: %w", text, err)
		}
		if err := xs.Write(ctx, vchan.AnswerNode, result); err != nil {
			return err
		}
	}
}

func awaitServices(ctx context.Context, xs *xenstore.Client) error {
	for _, s := range vchan.Services {
		there := func(_ string, exists bool) bool { return exists }
		if _, err := xs.WaitFor(ctx, "data/"+s.Name+"/event-channel", there); err != nil {
			return err
		}
	}
	return nil
}

// restart kills every reference; keep starts it again.
func restart(ctx context.Context, xs *xenstore.Client, pids []atomic.Int32) error {
	for i, s := range vchan.Services {
		if s.Kind != vchan.Reference {
			continue
		}
		if err := xs.Remove(ctx, "data/"+s.Name); err != nil {
			return err
		}
		if err := unix.Kill(int(pids[i].Load()), unix.SIGKILL); err != nil {
			return err
		}
	}
	return awaitServices(ctx, xs)
}

func countSwitches(pids []atomic.Int32, text string) (string, error) {
	seconds, err := strconv.Atoi(text)
	if err != nil {
		return "", err
	}
	before, err := allSwitches(pids)
	if err != nil {
		return "", err
	}
	time.Sleep(time.Duration(seconds) * time.Second)
	count, err := allSwitches(pids)
	if err != nil {
		return "", err
	}
	for name := range count {
		count[name] -= before[name]
	}
	result, err := json.Marshal(count)
	return string(result), err
}

func allSwitches(pids []atomic.Int32) (map[string]int, error) {
	count := map[string]int{}
	for i, s := range vchan.Services {
		n, err := switches(int(pids[i].Load()))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", s.Name, err)
		}
		count[s.Name] = n
	}
	return count, nil
}

// switches adds up how often a process's threads have left a processor: a thread that does not run cannot.
func switches(pid int) (int, error) {
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(files) == 0 {
		return 0, fmt.Errorf("process %d has no threads in /proc", pid)
	}
	sum := 0
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			return 0, err
		}
		for line := range strings.Lines(string(data)) {
			name, value, _ := strings.Cut(line, ":")
			if !strings.HasSuffix(name, "_ctxt_switches") {
				continue
			}
			n, err := strconv.Atoi(strings.TrimSpace(value))
			if err != nil {
				return 0, fmt.Errorf("%s: %w", file, err)
			}
			sum += n
		}
	}
	return sum, nil
}

// serve is a process of its own: one of our services.
func serve(ctx context.Context, name string) error {
	i := slices.IndexFunc(vchan.Services, func(s vchan.Service) bool { return s.Name == name })
	if i < 0 {
		return fmt.Errorf("there is no service %s", name)
	}
	s := vchan.Services[i]
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})).With("service", name)
	poller, err := fdio.NewPoller()
	if err != nil {
		return err
	}
	ln, err := xenvchan.Listen(ctx, xenvchan.Config{
		Client: 0,
		Path:   "data/" + name,
		Store:  xs,
		Poller: poller,
		Options: xenvchan.Options{
			LeftOrder: s.Left, RightOrder: s.Right, Marker: s.Kind == vchan.Bridge, Log: log,
		},
	})
	if err != nil {
		return err
	}
	switch s.Kind {
	case vchan.Bridge:
		return qmpbridge.Serve(ctx, ln, qmpbridge.Options{
			Dial: func(context.Context) (qmpbridge.Monitor, error) { return fdio.DialUnix(poller, s.Socket) },
			Log:  log,
		})
	case vchan.Echo:
		return each(ln, func(c net.Conn) { _, _ = io.Copy(c, c) })
	case vchan.Pipe:
		return each(ln, func(c net.Conn) { pipe(c, s.Socket) })
	}
	return fmt.Errorf("%s is not one of ours", name)
}

// each serves one session after the other.
func each(ln net.Listener, session func(net.Conn)) error {
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		session(c)
		c.Close()
	}
}

// pipe connects a session with the server behind.
func pipe(c net.Conn, socket string) {
	back, err := net.Dial("unix", socket)
	if err != nil {
		fmt.Fprintln(os.Stderr, "domu: pipe:", err)
		return
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = io.Copy(c, back)
		c.Close()
	}()
	_, _ = io.Copy(back, c)
	back.Close()
	<-done
}

// servers is a process of its own: what is behind the services.
func servers() error {
	listen := func(path string) (net.Listener, error) { return net.Listen("unix", path) }
	ended := make(chan error)
	for _, path := range []string{vchan.SocketQMP, vchan.SocketQMPReference} {
		ln, err := listen(path)
		if err != nil {
			return err
		}
		go func() { ended <- new(qmpServer).serve(ln) }()
	}
	for _, path := range []string{vchan.SocketEcho, vchan.SocketEchoReference} {
		ln, err := listen(path)
		if err != nil {
			return err
		}
		go func() { ended <- each(ln, func(c net.Conn) { _, _ = io.Copy(c, c) }) }()
	}
	os.Stdout.Close() // all listen
	return <-ended
}
