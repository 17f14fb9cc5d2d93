package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/modules"
	"github.com/stubinit/stubinit/internal/xen/consring"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

const (
	streamName = "stream" // of the channel in xl.cfg
	orderNode  = "data/order"
	answerNode = "data/answer"
	failed     = "failed: " // begins the last answer of a guest that cannot go on

	// silence ends a stream that lacks bytes.
	silence = 2 * time.Second
)

// guest is PID 1 of the PV guest: it obeys orders until the one that ends it.
func guest() {
	if err := obey(context.Background()); err != nil {
		fmt.Println("state:", err)
	}
	unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

func obey(ctx context.Context) error {
	for _, fs := range [][2]string{{"devtmpfs", "/dev"}, {"proc", "/proc"}} {
		if err := os.MkdirAll(fs[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(fs[0], fs[1], fs[0], 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", fs[1], err)
		}
	}
	if err := modules.Load(slog.Default()); err != nil {
		return err
	}
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	err = serve(ctx, xs)
	if err != nil { // dom0 need not wait for the answer that does not come
		err = errors.Join(err, xs.Write(ctx, answerNode, failed+err.Error()))
	}
	return err
}

// serve answers orders.
func serve(ctx context.Context, xs *xenstore.Client) error {
	console, err := findConsole(ctx, xs, streamName)
	if err != nil {
		return err
	}
	if err := xs.Write(ctx, answerNode, "waits for the console"); err != nil {
		return err
	}
	if err := consring.Wait(ctx, xs, console); err != nil {
		return err
	}
	if err := xs.Write(ctx, answerNode, "ready"); err != nil {
		return err
	}
	for old := ""; ; {
		order, err := xs.WaitFor(ctx, orderNode, func(value string, exists bool) bool { return exists && value != old })
		if err != nil || order == "end" {
			return err
		}
		old = order
		r, err := parseRequest(order)
		if err != nil {
			return fmt.Errorf("order %q: %w", order, err)
		}
		answer := func(text string) error { return xs.Write(ctx, answerNode, fmt.Sprintf("%d %s", r.Round, text)) }
		open := func() (input, error) { return openNaive(console, r) }
		if r.Way == direct {
			open = func() (input, error) { return openRing(ctx, xs, console) }
		}
		got, err := receive(open, r, func() error { return answer("open") })
		if err != nil {
			return err
		}
		if err := answer(compare(stream(r.Round, r.Bytes), got).String()); err != nil {
			return err
		}
	}
}

// findConsole returns the number of the channel of that name.
func findConsole(ctx context.Context, xs *xenstore.Client, name string) (int, error) {
	consoles, err := xs.List(ctx, "device/console")
	if err != nil {
		return 0, err
	}
	for _, console := range consoles {
		got, err := xs.ReadString(ctx, "device/console/"+console+"/name")
		if err == nil && got == name {
			return strconv.Atoi(console)
		}
	}
	return 0, fmt.Errorf("none of the consoles %q is the channel %s", consoles, name)
}

// An input gives bytes of a stream, and 0 when none come within a while.
type input interface {
	read(p []byte, within time.Duration) (int, error)
	Close() error
}

// receive opens the console and reads a stream from it.
func receive(open func() (input, error), r request, opened func() error) ([]byte, error) {
	in, err := open()
	if err != nil {
		return nil, err
	}
	defer in.Close()
	if err := opened(); err != nil {
		return nil, err
	}
	got := make([]byte, 0, r.Bytes+4096)
	for {
		within := silence
		if len(got) >= r.Bytes { // nothing more should come
			within = silence / 10
		}
		n, err := in.read(got[len(got):cap(got)], within)
		if err != nil || n == 0 {
			return got, err
		}
		got = got[:len(got)+n]
	}
}

// A ringInput reads the ring, as stubinit does.
type ringInput struct {
	*consring.Ring
	ctx context.Context
}

func openRing(ctx context.Context, xs *xenstore.Client, console int) (input, error) {
	ring, err := consring.Open(ctx, xs, console, 0)
	return ringInput{ring, ctx}, err
}

func (r ringInput) read(p []byte, within time.Duration) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	return r.Read(r.ctx, p, within)
}

// sttyStart is what a shell takes to fork and execute stty.
const sttyStart = 5 * time.Millisecond

// A ttyInput reads the console's tty.
type ttyInput struct{ *os.File }

// openNaive opens the console like any file, and makes it raw after a while. That may be soon enough, as khvcd and the
// kworker must run in between for a byte to be lost.
func openNaive(console int, r request) (input, error) {
	path := fmt.Sprintf("/dev/hvc%d", console)
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	if r.Way == stty {
		time.Sleep(sttyStart)
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err == nil {
		t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		err = unix.IoctlSetTermios(fd, unix.TCSETS, t)
	}
	if err != nil {
		unix.Close(fd)
		return nil, &os.PathError{Op: "set raw mode of", Path: path, Err: err}
	}
	return ttyInput{os.NewFile(uintptr(fd), path)}, nil
}

func (t ttyInput) read(p []byte, within time.Duration) (int, error) {
	fd := int(t.Fd())
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(within.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return 0, fmt.Errorf("poll %s: %w", t.Name(), err)
		case n == 0 || len(p) == 0:
			return 0, nil
		}
		n, err = unix.Read(fd, p)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", t.Name(), err)
		}
		return n, nil
	}
}
