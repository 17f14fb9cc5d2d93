// Package qmpbridge connects the toolstack's QMP sessions to QEMU's monitor.
//
// libxl opens a session for each operation and closes it. Each one gets a
// connection of its own to QEMU, so it starts with QEMU's greeting and has
// nothing from the session before; sessions follow one another, and one is over,
// its save and QEMU's answers to it included, before the next begins. Values go both ways unchanged, one
// a line, with these rules:
//
//   - Toward QEMU a request may have up to [MaxRequest] bytes. Line ends do not
//     matter. Input that is not JSON is answered with a GenericError, after the
//     answers to the requests before it; then the session ends.
//   - Toward the toolstack only complete JSON objects leave, each ended by CRLF.
//     An answer over [MaxAnswer] becomes a GenericError with the request's id.
//     Anything from QEMU that is not QMP ends the session.
//   - Events are dropped: libxl ignores them, and unread they would fill the ring
//     of a toolstack that is about to close. The agent's own monitor has them all.
//   - QEMU is read and the toolstack is read, whatever the other does. What one
//     does not take is queued up to a limit, past which the session ends.
//   - device_add of xen-pci-passthrough waits for the device ([Options.PCIReady]).
//   - xen-save-devices-state to /dev/fdset/1 is a save ([Saver]).
//   - Of two saves or migrations at once the later is refused at its first command, and
//     the cont that follows with it; QEMU's dirty log is not switched off twice.
//
// When QEMU's monitor closes, the requests that it has not answered get an error
// and the session ends.
package qmpbridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"
)

const (
	// MaxRequest is the most bytes of a request, and of requests that wait for QEMU.
	MaxRequest = 16 << 20

	// MaxAnswer is the most bytes of an answer, with its CRLF. libxl doubles its
	// buffer from 4096 bytes on, refuses to go past 1 MiB, and so gives up on an
	// answer that is not complete after this many bytes (qmp_ev_callback_readable
	// in libxl_qmp.c: 255 × 4096 bytes at most, of which 4096 must be free).
	MaxAnswer = 254 * 4096

	// maxQueued is the most bytes of answers that wait for the toolstack, beyond
	// the one being written.
	maxQueued = 2 * MaxAnswer

	// maxUnanswered is the most bytes that are kept of requests which QEMU has
	// taken and not answered. QEMU takes eight and then stops reading.
	maxUnanswered = 4 << 20

	// pciLimit is how long device_add is held. libxl gives it 10 s in all: one of
	// them is left for QEMU's own error to arrive.
	pciLimit = 9 * time.Second

	// abortLimit is the limit of Saver.Abort.
	abortLimit = 10 * time.Second

	// answerLimit is how long a monitor's connection stays for answers that are
	// on the way when its session ends.
	answerLimit = 5 * time.Second

	// drainLimit is how long a session may take to deliver what is left when
	// QEMU's monitor has closed.
	drainLimit = time.Second
)

// A Saver keeps the state that QEMU saves to fdset 1. A save is a Prepare, then
// either a Commit whose answer reached the toolstack or, whatever else happens,
// one Abort. Calls are never concurrent.
type Saver interface {
	// Prepare makes an empty fdset 1 before QEMU opens it.
	Prepare(ctx context.Context) error
	// Commit hands the saved state to the toolstack; QEMU's answer is let
	// through when it returns. It returns soon after ctx ends.
	Commit(ctx context.Context) error
	// Explain says why QEMU could not save, if the Saver knows more than QEMU's
	// own error; nil lets that through. Abort follows.
	Explain(refused error) error
	// Abort drops the state, whole or in part, and lets the guest go on (QMP
	// cont; the toolstack's own, if it follows, does no harm). cause is why.
	// It is called after a failed Prepare or Commit, QEMU's error, and when the
	// session ended first; ctx outlives the session.
	Abort(ctx context.Context, cause error) error
}

// A Stream is a connection whose calls never wait. The vchan's are, and those of package fdio.
type Stream interface {
	// TryRead reads what there is: 0 bytes and no error if that is nothing yet,
	// io.EOF at the end.
	TryRead(b []byte) (int, error)
	// TryWrite writes what there is room for, perhaps nothing.
	TryWrite(b []byte) (int, error)
	// Notify has f called whenever a TryRead or TryWrite that came short would do
	// more. f may be called by any goroutine, and without need.
	Notify(f func()) error
	Close() error
}

// A Monitor is a Stream that can be told what is likely to come soon, so that it waits in the quickest way.
type Monitor interface {
	Stream
	// Expect says that QEMU has been asked: the next TryRead may wait for some
	// milliseconds for the answer.
	Expect()
	// Linger says that the toolstack has been answered, and may ask again at once.
	Linger()
}

// Options say what a bridge works with. Dial is required.
type Options struct {
	// Dial connects to QEMU's monitor. It must not wait for QEMU: a connection to
	// a listening unix socket is there at once, and the greeting comes when QEMU is up.
	Dial func(ctx context.Context) (Monitor, error)
	// PCIReady waits until the stubdomain has the PCI device with this address
	// (the hostaddr of device_add). After 9 s, or when it fails, the request goes
	// to QEMU anyway, whose error tells the toolstack. Nil: never wait.
	PCIReady func(ctx context.Context, hostaddr string) error
	// Save keeps saved states. Nil: xen-save-devices-state is a request like any other.
	Save Saver
	// Log is told at debug level of sessions and commands, at info of saves and
	// held devices, at warn of sessions that ended otherwise than by the toolstack.
	Log *slog.Logger
}

// Serve serves one session after the other until ctx ends, and then returns
// ctx's error, or until ln fails. It closes ln, whose connections are Streams.
func Serve(ctx context.Context, ln net.Listener, o Options) error {
	if o.Dial == nil {
		return errors.New("qmp bridge: no Dial in Options")
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	defer ln.Close()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	saves := new(interlock)
	for n := 1; ; n++ {
		conn, err := ln.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return fmt.Errorf("qmp bridge: %w", context.Cause(ctx))
		}
		if err != nil {
			return fmt.Errorf("qmp bridge: accept a toolstack session on %v: %w", ln.Addr(), err)
		}
		stream, ok := conn.(Stream)
		if !ok {
			conn.Close()
			return fmt.Errorf("qmp bridge: a connection of %v is a %T, which can only be waited for", ln.Addr(), conn)
		}
		serveSession(ctx, stream, &o, saves, o.Log.With("session", n))
	}
}
