package vchan_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/stubinit/stubinit/internal/xen/vchan"
	"github.com/stubinit/stubinit/internal/xen/vchan/vchantest"
)

// FuzzHostilePeer lets a client write anything anywhere in the shared page
// between the server's steps. The server must not panic, must give out no byte
// and change no byte that is not in its rings, and must serve the next client.
//
// The input is a list of steps of four bytes: what to do, then its argument.
func FuzzHostilePeer(f *testing.F) {
	step := func(op byte, off uint16, v byte) []byte {
		return append(binary.LittleEndian.AppendUint16([]byte{op}, off), v)
	}
	f.Add(bytes.Join([][]byte{step(0, 4, 3), step(2, 9, 0), step(3, 9, 0)}, nil))                                        // keeps to the rules
	f.Add(bytes.Join([][]byte{step(0, 7, 0x80), step(2, 9, 0), step(3, 9, 0)}, nil))                                     // left.prod out of range
	f.Add(bytes.Join([][]byte{step(0, 11, 0xff), step(3, 999, 0), step(2, 9, 0)}, nil))                                  // right.cons out of range
	f.Add(bytes.Join([][]byte{step(0, 16, 20), step(0, 18, 9), step(3, 4000, 0), step(2, 4000, 0)}, nil))                // orders
	f.Add(bytes.Join([][]byte{step(0, 20, 1), step(1, 0, 0), step(3, 9, 0), step(0, 20, 77), step(1, 0, 0)}, nil))       // cli_live
	f.Add(bytes.Join([][]byte{step(0, 21, 0), step(0, 22, 0xff), step(0, 23, 0xff), step(2, 9, 0), step(3, 9, 0)}, nil)) // srv_live, notify
	f.Add(bytes.Join([][]byte{step(0, 4, 200), step(0, 20, 0), step(1, 0, 0), step(2, 300, 0), step(4, 0, 0)}, nil))     // leaves with input
	f.Add(bytes.Join([][]byte{step(5, 0, 0), step(6, 0, 0), step(3, 5000, 0), step(0, 20, 0), step(1, 0, 0)}, nil))      // no successor
	f.Fuzz(func(t *testing.T, steps []byte) {
		hostile(t, steps, vchan.Options{LeftOrder: 10, RightOrder: 11})
		hostile(t, steps, vchan.Options{LeftOrder: 12, RightOrder: 12, Marker: true})
	})
}

// canary is what stands outside of the rings and is never written into one.
const canary = 0xc7

func hostile(t *testing.T, steps []byte, opt vchan.Options) {
	x := vchantest.New()
	s, err := vchan.NewStepper(x, opt, nil)
	if err != nil {
		t.Fatal(err)
	}
	faulty := false
	x.Fault = func(op string) error {
		if faulty && op != "unpublish" {
			return errFault
		}
		return nil
	}
	var conns []*vchan.Conn
	pages := map[*byte][]byte{}
	attach := func() *vchantest.Client {
		c := vchantest.NewClient(x)
		if c.Attach() != nil {
			c.Detach() // as libxenvchan does: the event channel may be bound already
			return nil
		}
		// The page behind the list of grants belongs to nobody unless a
		// ring is there.
		p := c.Page()
		if _, ok := pages[&p[0]]; !ok {
			pages[&p[0]] = p
			if opt.LeftOrder < 12 {
				fill(p[64:1024])
			} else {
				fill(p[64:])
			}
		}
		return c
	}
	client := attach()
	page := client.Page()
	s.Scan()
	for ; len(steps) >= 4; steps = steps[4:] {
		off, v := int(binary.LittleEndian.Uint16(steps[1:])), steps[3]
		if c := s.Pending(); c != nil {
			conns = append(conns, c)
		}
		switch steps[0] % 8 {
		case 0: // scribble
			if v == canary {
				v++
			}
			if off %= 4096; off < 64 || opt.LeftOrder < 12 && off >= 1024 {
				page[off] = v
			}
		case 1: // an event
			x.Raise()
			s.Scan()
		case 2:
			p := bytes.Repeat([]byte{1}, off%5000)
			for _, c := range conns {
				n, _ := c.StepRead(p)
				if i := bytes.IndexByte(p[:n], canary); i >= 0 {
					t.Fatalf("read a byte that is not in the ring, at %d of %d", i, n)
				}
			}
		case 3:
			for _, c := range conns {
				c.StepWrite(bytes.Repeat([]byte{v &^ 0x80}, off%5000))
			}
		case 4:
			for _, c := range conns {
				c.Close()
			}
			conns = nil
		case 5:
			faulty = v%2 == 0
		case 6: // leaves and comes back
			client.Detach()
			if c := attach(); c != nil {
				client, page = c, c.Page()
			}
		case 7: // comes back without leaving
			page[20] = 1
			s.Scan()
		}
	}
	for _, p := range pages {
		end := 4096
		if opt.LeftOrder < 12 {
			end = 1024
		}
		for i, b := range p[64:end] {
			if b != canary {
				t.Fatalf("byte %d of the page was changed to %#x", 64+i, b)
			}
		}
	}
	faulty = false
	client.Detach()
	s.Scan()
	if s.Err() == nil {
		nextIsServed(t, s, x)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// nextIsServed attaches a client that keeps to the rules. Should it find the
// endpoint that is being given up, the one after it must serve it.
func nextIsServed(t *testing.T, s *vchan.Stepper, x *vchantest.Xen) {
	for range 3 {
		c := vchantest.NewClient(x)
		if err := c.Attach(); err != nil {
			t.Fatalf("next client: %v", err)
		}
		s.Scan()
		if conn := s.Pending(); conn != nil {
			if _, err := conn.StepWrite([]byte("greeting")); err == nil {
				p := make([]byte, 16)
				if n, err := c.TryRead(p); err == nil && string(p[:n]) == "greeting" {
					c.Detach()
					s.Scan()
					return
				}
			}
		}
		c.Detach()
		s.Scan()
	}
	t.Fatal("the next client was not greeted")
}

func fill(p []byte) {
	for i := range p {
		p[i] = canary
	}
}
