package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"time"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

// When the guest opens the console, as seen from the stream.
var moments = []string{
	"before", // and then the stream begins
	"at once",
	"late", // the ring has been full for a while
}

// lateBy is how long a stream waits for a late guest.
const lateBy = 500 * time.Millisecond

// roundLimit is the most that a round or the guest's start may take: 4 MiB through a ring of 1 KiB, in an emulator.
const roundLimit = 5 * time.Minute

// A driver sends streams.
type driver struct {
	xs     *xenstore.Client
	domain string // "/local/domain/N/"
	conn   net.Conn
	echoed atomic.Int64 // bytes that came back
}

func drive(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("state drive", flag.ContinueOnError)
	domid := flags.Int("domid", 0, "the guest")
	socket := flags.String("socket", "", "its channel's `socket`")
	rounds := flags.Int("rounds", 20, "streams to send, with consring at the other end")
	size := flags.Int("bytes", 256<<10, "length of a stream")
	naive := flags.Int("naive", 3, "streams to send first for each way that is not consring")
	if err := flags.Parse(args); err != nil {
		return err
	}
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	d := &driver{xs: xs, domain: fmt.Sprintf("/local/domain/%d/", *domid)}
	if d.conn, err = net.Dial("unix", *socket); err != nil {
		return err
	}
	go func() {
		buf := make([]byte, 4096)
		for {
			n, err := d.conn.Read(buf)
			d.echoed.Add(int64(n))
			if err != nil {
				return
			}
		}
	}()
	defer d.conn.Close()
	soon, cancel := context.WithTimeout(ctx, roundLimit)
	defer cancel()
	if _, err := d.answer(soon, "ready"); err != nil {
		return fmt.Errorf("the guest's start: %w", err)
	}
	wrong := 0
	for i := range 2**naive + *rounds {
		r := request{Round: i, Bytes: *size, Way: direct}
		switch {
		case i < *naive:
			r.Way = quick
		case i < 2**naive:
			r.Way = stty
		}
		moment := moments[i%len(moments)]
		echoed := d.echoed.Load()
		start := time.Now()
		o, err := d.round(ctx, r, moment)
		if err != nil {
			return fmt.Errorf("round %d: %w", i, err)
		}
		took := time.Since(start)
		echo := d.echoed.Load() - echoed
		if r.Way == direct && (!o.exact() || echo != 0) {
			wrong++
		}
		fmt.Fprintf(out, "way=%s moment=%q %v echoed=%d took=%s\n", r.Way, moment, o, echo, took.Round(time.Millisecond))
	}
	if err := d.xs.Write(ctx, d.domain+orderNode, "end"); err != nil {
		return err
	}
	if wrong > 0 {
		return fmt.Errorf("%d of %d streams did not arrive as they were sent", wrong, *rounds)
	}
	return nil
}

// round sends one stream.
func (d *driver) round(ctx context.Context, r request, moment string) (outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, roundLimit)
	defer cancel()
	sent := make(chan error, 1)
	send := func() {
		_, err := d.conn.Write(stream(r.Round, r.Bytes))
		sent <- err
	}
	order := func() error { return d.xs.Write(ctx, d.domain+orderNode, r.String()) }
	var err error
	switch moment {
	case "before":
		if err = order(); err == nil {
			_, err = d.answer(ctx, fmt.Sprintf("%d open", r.Round))
		}
		go send()
	case "at once":
		go send()
		err = order()
	case "late":
		go send()
		time.Sleep(lateBy)
		err = order()
	}
	if err != nil {
		return outcome{}, err
	}
	text, err := d.answer(ctx, fmt.Sprintf("%d received=", r.Round))
	if err != nil {
		return outcome{}, err
	}
	select {
	case err = <-sent:
	case <-ctx.Done():
		err = errors.New("the console does not take the stream")
	}
	if err != nil {
		return outcome{}, err
	}
	return parseOutcome(strings.TrimPrefix(text, fmt.Sprintf("%d ", r.Round)))
}

// answer waits until the guest has answered with something that begins so, or that it cannot go on.
func (d *driver) answer(ctx context.Context, prefix string) (string, error) {
	text, err := d.xs.WaitFor(ctx, d.domain+answerNode, func(value string, exists bool) bool {
		return exists && (strings.HasPrefix(value, prefix) || strings.HasPrefix(value, failed))
	})
	if cause, is := strings.CutPrefix(text, failed); err == nil && is {
		err = fmt.Errorf("the guest cannot go on: %s", cause)
	}
	return text, err
}
