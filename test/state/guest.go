package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/console"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

const (
	streamConsole = "/dev/hvc1" // an xl.cfg's first channel
	orderNode     = "data/order"
	answerNode    = "data/answer"

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
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	last := "ready"
	if err := xs.Write(ctx, answerNode, last); err != nil {
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
		got, err := receive(r, func() error { return answer("open") })
		if err != nil {
			return err
		}
		if err := answer(compare(stream(r.Round, r.Bytes), got).String()); err != nil {
			return err
		}
	}
}

// receive opens the console and reads a stream from it.
func receive(r request, opened func() error) ([]byte, error) {
	open := console.OpenRaw
	switch r.Way {
	case quick:
		open = func(path string, flag int) (*os.File, error) { return openNaive(path, flag, 0) }
	case stty:
		open = func(path string, flag int) (*os.File, error) { return openNaive(path, flag, sttyStart) }
	}
	f, err := open(streamConsole, os.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := opened(); err != nil {
		return nil, err
	}
	fd := int(f.Fd())
	got := make([]byte, 0, r.Bytes+4096)
	for {
		left := silence
		if len(got) >= r.Bytes { // nothing more should come
			left = silence / 10
		}
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, fmt.Errorf("poll %s: %w", streamConsole, err)
		case n == 0 || len(got) == cap(got):
			return got, nil
		}
		n, err = unix.Read(fd, got[len(got):cap(got)])
		if err != nil && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("read %s: %w", streamConsole, err)
		}
		got = got[:len(got)+max(n, 0)]
	}
}

// sttyStart is what a shell takes to fork and execute stty.
const sttyStart = 5 * time.Millisecond

// openNaive opens the console like any file, and makes it raw after a while. That may be soon enough, as khvcd and the
// kworker must run in between for a byte to be lost.
func openNaive(path string, flag int, pause time.Duration) (*os.File, error) {
	fd, err := unix.Open(path, flag|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	time.Sleep(pause)
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
	return os.NewFile(uintptr(fd), path), nil
}
