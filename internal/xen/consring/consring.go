// Package consring moves bytes through the ring of a PV console, past its tty
// (xen/include/public/io/console.h, struct xencons_interface).
//
// A console's tty is no way for a saved state. It starts in cooked mode, in which bytes that are there before
// anybody can change that come out changed and are echoed. The driver (hvc_xen, hvc_console.c) takes 16 bytes at a time from
// the ring and gives it 256, each with an event that lets dom0 run: 0.75 MiB/s in and 3.2 MiB/s out in the lab, where this
// package has docs/state.md's figures. And a write to a full ring spins in the kernel with interrupts off.
//
// As long as nobody opens the tty the driver touches neither ring nor event channel, beyond making them.
// So both are ours, through [frame] and [privcmd.Port]. Linux brings no events of a channel that the driver has bound: the ring is looked at again
// and again while it is empty or full, which is the one thing in stubinit that polls.
package consring

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/xen/frame"
	"github.com/stubinit/stubinit/internal/xen/privcmd"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

// Sizes of the two directions, in bytes.
const (
	InSize  = 1024 // to us
	OutSize = 2048 // from us
)

// Places in struct xencons_interface.
const (
	inAt    = 0
	outAt   = InSize
	inCons  = InSize + OutSize
	inProd  = inCons + 4
	outCons = inCons + 8
	outProd = inCons + 12
)

const (
	// A ring is looked at again after about the time that dom0 has needed so far: sooner takes the processor from it, if it has no
	// other. Then after firstLook, and after twice as long each time, at most lastLook.
	firstLook = 50 * time.Microsecond
	lastLook  = 10 * time.Millisecond
	firstPace = 200 * time.Microsecond
	lastPace  = 2 * time.Millisecond

	// stallLimit is how long dom0 may leave a full ring as it is.
	stallLimit = 30 * time.Second
)

// A Ring is one console's. It is for one goroutine.
type Ring struct {
	// File says that what dom0 takes goes to a file.
	File bool
	// Waited is how long Read, Write and Drain have waited for dom0, in all.
	Waited time.Duration

	frame *frame.Frame
	send  func() error // an event for dom0
	close func() error
	pace  time.Duration // what dom0 seems to need to fill or to empty the ring
}

// New is the ring in a frame; send tells dom0 of a change. Close closes the frame.
func New(f *frame.Frame, send func() error) *Ring {
	return &Ring{frame: f, send: send, close: func() error { return nil }, pace: firstPace}
}

// Wait waits until somebody serves console n > 0.
func Wait(ctx context.Context, xs *xenstore.Client, n int) error {
	backend, err := xs.ReadString(ctx, fmt.Sprintf("device/console/%d/backend", n))
	if err != nil {
		return err
	}
	_, err = xs.WaitFor(ctx, backend+"/state", func(state string, exists bool) bool { return exists && state == "4" })
	return err
}

// Open opens the ring of console n > 0, whose backend is in domain toolstack. Nobody may have opened its tty.
func Open(ctx context.Context, xs *xenstore.Client, n int, toolstack uint16) (*Ring, error) {
	dir := fmt.Sprintf("device/console/%d/", n)
	backend, err := xs.ReadString(ctx, dir+"backend")
	if err != nil {
		return nil, err
	}
	state, err := xs.ReadString(ctx, backend+"/state")
	if err != nil {
		return nil, err
	}
	if state != "4" {
		return nil, fmt.Errorf("nobody serves console %d: %s/state is %s, not 4", n, backend, state)
	}
	output, err := xs.Read(ctx, dir+"output")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var number [2]uint32
	for i, node := range []struct{ name, what string }{{"ring-ref", "grant reference"}, {"port", "event channel's port"}} {
		text, err := xs.ReadString(ctx, dir+node.name)
		if err != nil {
			return nil, err
		}
		v, err := strconv.ParseUint(text, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("xenstore %s%s: %q is no %s", dir, node.name, text, node.what)
		}
		number[i] = uint32(v)
	}
	f, err := frame.MapGranted(number[0], toolstack)
	if err != nil {
		return nil, err
	}
	port, err := privcmd.OpenPort(number[1])
	if err != nil {
		f.Close()
		return nil, err
	}
	r := New(f, port.Send)
	r.File, r.close = strings.HasPrefix(output, "file:"), port.Close
	return r, nil
}

// Close gives the ring back.
func (r *Ring) Close() error { return errors.Join(r.close(), r.frame.Close()) }

// used says how many bytes wait in a direction of size bytes.
func (r *Ring) used(cons, prod, size int) (int, error) {
	used := r.frame.Uint32(prod) - r.frame.Uint32(cons)
	if used > uint32(size) {
		return 0, fmt.Errorf("the console's ring is broken: %d bytes in %d", used, size)
	}
	return int(used), nil
}

func (r *Ring) waiting() (int, error) { return r.used(inCons, inProd, InSize) }

// Free says how many bytes have room; 0 also in a ring that is broken.
func (r *Ring) Free() int {
	n, err := r.free()
	if err != nil {
		return 0
	}
	return n
}

func (r *Ring) free() (int, error) {
	used, err := r.used(outCons, outProd, OutSize)
	return OutSize - used, err
}

// Read waits for bytes from dom0 and takes up to len(p) of them. A patience above 0 is how long it waits: then it returns 0.
func (r *Ring) Read(ctx context.Context, p []byte, patience time.Duration) (int, error) {
	n, err := r.wait(ctx, 1, patience, r.waiting)
	if err == errStalled {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	n = min(n, len(p))
	cons := r.frame.Uint32(inCons)
	copyOut(p[:n], r.frame.Bytes()[inAt:inAt+InSize], cons)
	r.frame.SetUint32(inCons, cons+uint32(n))
	return n, r.send()
}

// Write gives p to dom0, as the ring has room, and returns when the ring has the last byte. dom0 may leave a full ring as it
// is for 30 s.
func (r *Ring) Write(ctx context.Context, p []byte) (written int, err error) {
	for len(p) > 0 {
		n, err := r.room(ctx, min(OutSize/2, len(p)))
		if err != nil {
			return written, err
		}
		n = min(n, len(p))
		prod := r.frame.Uint32(outProd)
		copyIn(r.frame.Bytes()[outAt:outAt+OutSize], prod, p[:n])
		r.frame.SetUint32(outProd, prod+uint32(n))
		if err := r.send(); err != nil {
			return written, err
		}
		written += n
		p = p[n:]
	}
	return written, nil
}

// Drain waits until dom0 has taken everything, within 30 s of the last byte that it takes.
func (r *Ring) Drain(ctx context.Context) error {
	_, err := r.room(ctx, OutSize)
	return err
}

// room waits until there is room for want bytes, and returns how much there is.
func (r *Ring) room(ctx context.Context, want int) (int, error) {
	n, err := r.wait(ctx, want, stallLimit, r.free)
	if err == errStalled {
		err = fmt.Errorf("dom0 has not read it for %v", stallLimit)
	}
	return n, err
}

// copyOut and copyIn are copies from and to a ring's index.
func copyOut(p, ring []byte, index uint32) {
	n := copy(p, ring[int(index)%len(ring):])
	copy(p[n:], ring)
}

func copyIn(ring []byte, index uint32, p []byte) {
	n := copy(ring[int(index)%len(ring):], p)
	copy(ring, p[n:])
}

var errStalled = errors.New("no change within the limit")

// wait looks until there are at least want bytes, and returns how many there are. A limit above 0 is for the time without
// any change; past it, the error is errStalled.
func (r *Ring) wait(ctx context.Context, want int, limit time.Duration, look func() (int, error)) (int, error) {
	last, since := -1, time.Now()
	defer func(start time.Time) { r.Waited += time.Since(start) }(since)
	pause := r.pace
	for looks := 0; ; looks++ {
		n, err := look()
		if err != nil {
			return n, err
		}
		if n >= want {
			switch {
			case looks == 1:
				r.pace = max(r.pace-r.pace/16, firstLook)
			case looks > 1:
				r.pace = min(r.pace+r.pace/8, lastPace)
			}
			return n, nil
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
		if n != last {
			last, since = n, time.Now()
		}
		if limit > 0 && time.Since(since) > limit {
			return 0, errStalled
		}
		if pause > lastPace {
			time.Sleep(pause)
		} else { // for which time.Sleep takes a millisecond at least: that would be the throughput
			fdio.Sleep(pause)
		}
		if pause = min(2*pause, lastLook); looks == 0 {
			pause = firstLook
		}
	}
}
