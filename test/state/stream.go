package main

import (
	"fmt"
	"math/rand/v2"
)

// stream is a round's bytes: all values in order first, from another one on in each round, so that those a cooked tty
// treats apart are among the first that arrive; then all values mixed.
func stream(round, size int) []byte {
	b := make([]byte, size)
	r := rand.New(rand.NewPCG(uint64(round), 0x73747562))
	for i := range b {
		if i < 256 {
			b[i] = byte(i + 37*round)
		} else {
			b[i] = byte(r.Uint32())
		}
	}
	return b
}

// An outcome says how what arrived differs from what was sent.
type outcome struct {
	Received, Missing, Extra int
	Different                int // bytes, place by place
	First                    int // place of the first difference, or -1
}

func compare(want, got []byte) outcome {
	o := outcome{Received: len(got), Missing: max(0, len(want)-len(got)), Extra: max(0, len(got)-len(want)), First: -1}
	for i := range min(len(want), len(got)) {
		if want[i] != got[i] {
			if o.First < 0 {
				o.First = i
			}
			o.Different++
		}
	}
	if o.First < 0 && len(want) != len(got) {
		o.First = min(len(want), len(got))
	}
	return o
}

func (o outcome) exact() bool { return o.First < 0 }

func (o outcome) String() string {
	return fmt.Sprintf("received=%d missing=%d extra=%d different=%d first=%d", o.Received, o.Missing, o.Extra, o.Different, o.First)
}

func parseOutcome(s string) (o outcome, err error) {
	_, err = fmt.Sscanf(s, "received=%d missing=%d extra=%d different=%d first=%d", &o.Received, &o.Missing, &o.Extra, &o.Different, &o.First)
	if err != nil {
		err = fmt.Errorf("the guest's outcome %q: %w", s, err)
	}
	return o, err
}

// A request is what dom0 asks the guest for, in the node data/order.
type request struct {
	Round, Bytes int
	Way          string
}

// Ways to open the console.
const (
	direct = "direct" // consring
	quick  = "quick"  // open it like any file, then make it raw at once
	stty   = "stty"   // the same with the time that a shell takes to start stty in between
)

func (r request) String() string {
	return fmt.Sprintf("round=%d bytes=%d way=%s", r.Round, r.Bytes, r.Way)
}

func parseRequest(s string) (r request, err error) {
	_, err = fmt.Sscanf(s, "round=%d bytes=%d way=%s", &r.Round, &r.Bytes, &r.Way)
	return r, err
}
