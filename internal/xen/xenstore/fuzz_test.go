package xenstore_test

import (
	"bytes"
	"io"
	"testing"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
)

// recorded gives what a xenstored has said, then EOF, and takes any request.
type recorded struct {
	io.Reader
	asked chan struct{} // closed by the first request
	once  bool
}

func (r *recorded) Read(b []byte) (int, error) {
	<-r.asked
	return r.Reader.Read(b)
}

func (r *recorded) Write(b []byte) (int, error) {
	if !r.once {
		r.once = true
		close(r.asked)
	}
	return len(b), nil
}

func (r *recorded) Close() error { return nil }

// FuzzClient: whatever xenstored says, a waiting call ends with its answer or
// an error, and the client with an error.
func FuzzClient(f *testing.F) {
	f.Add((wire.Message{Type: wire.GetPerms, ReqID: 1, Payload: wire.Join("n5", "r0")}).Append(nil))
	f.Add((wire.Message{Type: wire.Error, ReqID: 1, Payload: wire.Join("ENOENT")}).Append(nil))
	f.Add((wire.Message{Type: wire.WatchEvent, ReqID: 7, Payload: wire.Join("a", "1")}).Append(nil))
	f.Fuzz(func(t *testing.T, in []byte) {
		c := xenstore.NewClient(&recorded{Reader: bytes.NewReader(in), asked: make(chan struct{})})
		perms, err := c.Perms(t.Context(), "a")
		if (err == nil) != (len(perms) > 0) {
			t.Errorf("permissions %v, error %v", perms, err)
		}
		<-c.Done()
		if c.Err() == nil {
			t.Error("ended without an error")
		}
		c.Close()
	})
}
