package qmpbridge

import (
	"log/slog"
	"testing"
)

// A ready is a Stream whose other end is always ready, and costs nothing.
type ready struct {
	in     []byte
	answer []byte // to each write; nil: none
	wrote  int
}

func (r *ready) TryRead(b []byte) (int, error) {
	n := copy(b, r.in)
	r.in = r.in[n:]
	return n, nil
}

func (r *ready) TryWrite(b []byte) (int, error) {
	r.in = r.answer
	r.wrote += len(b)
	return len(b), nil
}

func (r *ready) Notify(func()) error { return nil }
func (r *ready) Close() error        { return nil }
func (r *ready) Expect()             {}
func (r *ready) Linger()             {}

// What the bridge itself costs of a round trip.
func BenchmarkStep(b *testing.B) {
	request := []byte("{\"execute\": \"query-status\", \"id\": 12}\r\n")
	answer := []byte("{\"return\": {\"status\": \"running\", \"singlestep\": false, \"running\": true}, \"id\": 12}\r\n")
	toolstack, qemu := &ready{}, &ready{answer: answer}
	s := newSession(b.Context(), toolstack, qemu, &Options{}, new(interlock), slog.New(slog.DiscardHandler))
	b.ReportAllocs()
	for b.Loop() {
		toolstack.in, toolstack.wrote = request, 0
		s.kick()
		if toolstack.wrote != len(answer) {
			b.Fatalf("the toolstack got %d bytes", toolstack.wrote)
		}
	}
}
