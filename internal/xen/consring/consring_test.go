package consring

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/stubinit/stubinit/internal/xen/frame"
)

// newRing is a ring whose indices are about to wrap, and the events that dom0 got.
func newRing() (r *Ring, f *frame.Frame, events chan struct{}) {
	f = frame.Of(make([]byte, frame.Size))
	const nearWrap = 0xfffffe00
	for _, index := range []int{inCons, inProd, outCons, outProd} {
		f.SetUint32(index, nearWrap)
	}
	events = make(chan struct{}, 1<<20)
	return New(f, func() error { events <- struct{}{}; return nil }), f, events
}

func values(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 / 3)
	}
	return b
}

// dom0 moves between the ring and memory in chunks of any size, with the indices alone to go by.
func dom0(f *frame.Frame, in []byte, out int) (got []byte) {
	mem := f.Bytes()
	for len(in) > 0 || len(got) < out {
		n := rand.IntN(OutSize)
		if k := min(n, len(in), InSize-int(f.Uint32(inProd)-f.Uint32(inCons))); k > 0 {
			prod := f.Uint32(inProd)
			for i := range k {
				mem[inAt+int(prod+uint32(i))%InSize] = in[i]
			}
			f.SetUint32(inProd, prod+uint32(k))
			in = in[k:]
		}
		if k := min(n, int(f.Uint32(outProd)-f.Uint32(outCons))); k > 0 {
			cons := f.Uint32(outCons)
			for i := range k {
				got = append(got, mem[outAt+int(cons+uint32(i))%OutSize])
			}
			f.SetUint32(outCons, cons+uint32(k))
		}
		time.Sleep(time.Duration(rand.IntN(20)) * time.Microsecond)
	}
	return got
}

// What dom0 writes arrives, and what we write reaches it, byte for byte and past the indices' end, with an event for each chunk.
func TestStream(t *testing.T) {
	r, f, events := newRing()
	want := values(100_003)
	done := make(chan []byte)
	go func() { done <- dom0(f, want, 0) }()
	var got []byte
	buf := make([]byte, 700)
	for len(got) < len(want) {
		n, err := r.Read(t.Context(), buf, 0)
		if err != nil || n < 1 {
			t.Fatalf("after %d bytes: %d, %v", len(got), n, err)
		}
		got = append(got, buf[:n]...)
	}
	<-done
	if !bytes.Equal(got, want) {
		t.Error("the bytes read are others")
	}
	if n := len(events); n < len(want)/700 {
		t.Errorf("%d events for %d bytes", n, len(want))
	}

	r, f, events = newRing()
	go func() { done <- dom0(f, nil, len(want)) }()
	for rest := want; len(rest) > 0; {
		n := min(len(rest), 1+rand.IntN(5000))
		if m, err := r.Write(t.Context(), rest[:n]); m != n || err != nil {
			t.Fatalf("wrote %d of %d, %v", m, n, err)
		}
		rest = rest[n:]
	}
	if err := r.Drain(t.Context()); err != nil {
		t.Fatal(err)
	}
	if f.Uint32(outCons) != f.Uint32(outProd) {
		t.Error("Drain came back before dom0 had taken everything")
	}
	if !bytes.Equal(<-done, want) {
		t.Error("the bytes written are others")
	}
	if n := len(events); n < len(want)/OutSize {
		t.Errorf("%d events for %d bytes", n, len(want))
	}
}

// Nothing is written over what dom0 has not taken.
func TestFull(t *testing.T) {
	r, f, _ := newRing()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("over"))
	defer cancel()
	want := values(3000)
	n, err := r.Write(ctx, want)
	if n != OutSize || err == nil || err.Error() != "over" {
		t.Errorf("wrote %d, %v, want %d and the context's cause", n, err, OutSize)
	}
	if got := dom0(f, nil, OutSize); !bytes.Equal(got, want[:OutSize]) {
		t.Error("the ring has other bytes")
	}
	if r.Waited < 40*time.Millisecond {
		t.Errorf("waited %v", r.Waited)
	}
	if err := r.Drain(ctx); err != nil { // there is nothing to wait for
		t.Error(err)
	}
}

func TestNothingComes(t *testing.T) {
	r, _, events := newRing()
	ctx, cancel := context.WithTimeoutCause(t.Context(), 20*time.Millisecond, errors.New("over"))
	defer cancel()
	if n, err := r.Read(ctx, make([]byte, 1), 0); n != 0 || err == nil || err.Error() != "over" || len(events) != 0 {
		t.Errorf("%d, %v, %d events", n, err, len(events))
	}
}

func TestPatience(t *testing.T) {
	r, f, _ := newRing()
	start := time.Now()
	if n, err := r.Read(t.Context(), make([]byte, 1), 10*time.Millisecond); n != 0 || err != nil || time.Since(start) < 10*time.Millisecond {
		t.Errorf("%d, %v after %v", n, err, time.Since(start))
	}
	f.SetUint32(inProd, f.Uint32(inCons)+1)
	if n, err := r.Read(t.Context(), make([]byte, 1), time.Nanosecond); n != 1 || err != nil {
		t.Errorf("%d, %v with a byte there", n, err)
	}
}

// Indices that cannot be are an error, whatever dom0 says of them afterwards.
func TestBroken(t *testing.T) {
	const want = "ring is broken"
	r, f, _ := newRing()
	f.SetUint32(inProd, f.Uint32(inCons)+InSize+1)
	if _, err := r.Read(t.Context(), make([]byte, 1), 0); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Read: %v", err)
	}
	f.SetUint32(outCons, f.Uint32(outProd)+1)
	if _, err := r.Write(t.Context(), []byte{1}); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Write: %v", err)
	}
	if err := r.Drain(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("Drain: %v", err)
	}
}

func TestFree(t *testing.T) {
	r, f, _ := newRing()
	for _, tt := range []struct {
		cons, prod uint32
		want       int
	}{
		{0, 0, 2048}, {0, 2048, 0}, {0, 2049, 0}, {10, 30, 2028},
		{0xffffffff, 1, 2046}, {5, 4, 0}, // prod behind cons: not a ring
	} {
		f.SetUint32(outCons, tt.cons)
		f.SetUint32(outProd, tt.prod)
		if got := r.Free(); got != tt.want {
			t.Errorf("cons %d, prod %d: %d free, want %d", tt.cons, tt.prod, got, tt.want)
		}
	}
}

func TestNoEvents(t *testing.T) {
	failed := errors.New("EPERM")
	_, f, _ := newRing()
	r := New(f, func() error { return failed })
	if _, err := r.Write(t.Context(), []byte{1}); !errors.Is(err, failed) {
		t.Errorf("Write: %v", err)
	}
	f.SetUint32(inProd, f.Uint32(inCons)+1)
	if _, err := r.Read(t.Context(), make([]byte, 1), 0); !errors.Is(err, failed) {
		t.Errorf("Read: %v", err)
	}
}

// Offsets are the C structure's: in[1024], out[2048], in_cons, in_prod, out_cons, out_prod.
func TestLayout(t *testing.T) {
	if got, want := [6]int{inAt, outAt, inCons, inProd, outCons, outProd}, [6]int{0, 1024, 3072, 3076, 3080, 3084}; got != want {
		t.Errorf("%v, want %v", got, want)
	}
}
