// Package uevent waits for devices: it listens to the kernel's uevents, so that
// nothing has to look for a device by time.
package uevent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// An Event is one uevent of the kernel (lib/kobject_uevent.c): "ACTION@DEVPATH",
// then KEY=VALUE pairs.
type Event struct {
	Action string            // "add", "remove", "change", "bind", …
	Path   string            // DEVPATH: below /sys
	Vars   map[string]string // SUBSYSTEM, DEVNAME, DRIVER, …
}

// A Listener receives every uevent from its creation on.
type Listener struct {
	file *os.File
}

// receiveBuffer holds the events of a boot's coldplug; more than it holds is
// reported by Next as ErrLost.
const receiveBuffer = 1 << 20

// ErrLost says that events were lost: the receiver must look at the state itself.
var ErrLost = errors.New("uevents lost: receive buffer overflow")

// Listen opens a listener. Events need no root, but CONFIG_NET.
func Listen() (*Listener, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, fmt.Errorf("uevents: socket: %w", err)
	}
	// Beyond the limit for this process only root may go: the default size does as well then.
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer)
	const kernelGroup = 1 // group 2 is udevd's
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: kernelGroup}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("uevents: bind: %w", err)
	}
	return &Listener{file: os.NewFile(uintptr(fd), "uevents")}, nil
}

// Close ends the listener and a Next that waits.
func (l *Listener) Close() error { return l.file.Close() }

// Next gives the next event. It fails when ctx ends, with ErrLost when events
// were lost (the listener goes on), and when the listener is closed.
func (l *Listener) Next(ctx context.Context) (Event, error) {
	if l.file.SetReadDeadline(time.Time{}) != nil { // its error is not os.ErrClosed
		return Event{}, fmt.Errorf("uevents: %w", os.ErrClosed)
	}
	stop := context.AfterFunc(ctx, func() { _ = l.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 8<<10) // the kernel's UEVENT_BUFFER_SIZE is 2048
	for {
		if err := ctx.Err(); err != nil {
			return Event{}, err
		}
		n, err := l.file.Read(buf)
		switch {
		case ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded):
			return Event{}, ctx.Err()
		case errors.Is(err, unix.ENOBUFS):
			return Event{}, ErrLost
		case err != nil:
			return Event{}, fmt.Errorf("uevents: %w", err)
		}
		if e, ok := Parse(buf[:n]); ok {
			return e, nil
		}
	}
}

// Until looks at ok now and after each event, until it is true or ctx ends.
func (l *Listener) Until(ctx context.Context, ok func() bool) error {
	for !ok() {
		if _, err := l.Next(ctx); err != nil && !errors.Is(err, ErrLost) {
			return err
		}
	}
	return nil
}

// Parse decodes a message; ok is false for what the kernel does not send.
func Parse(b []byte) (e Event, ok bool) {
	head, rest, _ := strings.Cut(string(b), "\x00")
	if e.Action, e.Path, ok = strings.Cut(head, "@"); !ok || e.Action == "" {
		return Event{}, false
	}
	e.Vars = make(map[string]string)
	for _, kv := range strings.Split(rest, "\x00") {
		if k, v, found := strings.Cut(kv, "="); found {
			e.Vars[k] = v
		}
	}
	return e, true
}
