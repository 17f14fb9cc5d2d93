package xenstoretest_test

import (
	"errors"
	"io"
	"io/fs"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
)

// ask sends one request as it is and returns what comes back.
func ask(t *testing.T, c *xenstoretest.Conn, m wire.Message) (wire.Message, error) {
	t.Helper()
	if _, err := c.Write(m.Append(nil)); err != nil {
		return wire.Message{}, err
	}
	return wire.Receive(c)
}

// Requests that the client never makes get xenstored's answers.
func TestBadRequests(t *testing.T) {
	s := xenstoretest.New(t)
	s.Set("/n", "")
	s.SetPerms("/n", xenstore.Perm{Dom: 5, Access: xenstore.None})
	c := s.DialConn(5)
	for _, tt := range []struct {
		m    wire.Message
		want string
	}{
		{wire.Message{Type: wire.Read, Payload: []byte("/n")}, "EINVAL"}, // no NUL
		{wire.Message{Type: wire.Read, Payload: wire.Join("/n/")}, "EINVAL"},
		{wire.Message{Type: wire.Read, Payload: wire.Join("//n")}, "EINVAL"},
		{wire.Message{Type: wire.Read, Payload: wire.Join("/n n")}, "EINVAL"},
		{wire.Message{Type: wire.Read, TxID: 77, Payload: wire.Join("/n")}, "ENOENT"},
		{wire.Message{Type: wire.TransactionEnd, TxID: 77, Payload: wire.Join("T")}, "ENOENT"},
		{wire.Message{Type: wire.DirectoryPart, Payload: wire.Join("/n", "x")}, "EINVAL"},
		{wire.Message{Type: wire.SetPerms, Payload: wire.Join("/n")}, "EINVAL"},
		{wire.Message{Type: wire.SetPerms, Payload: wire.Join("/n", "q5")}, "EINVAL"},
		{wire.Message{Type: wire.SetPerms, Payload: wire.Join("/n", "n6")}, "EINVAL"}, // gives it away
		{wire.Message{Type: 20, Payload: wire.Join("/n")}, "ENOSYS"},
		{wire.Message{Type: wire.Write, Payload: wire.Join("/other")}, "EACCES"},
	} {
		tt.m.ReqID = 9
		got, err := ask(t, c, tt.m)
		want := wire.Message{Type: wire.Error, ReqID: 9, TxID: tt.m.TxID, Payload: wire.Join(tt.want)}
		if diff := cmp.Diff(want, got); err != nil || diff != "" {
			t.Errorf("%v %q: %v %s", tt.m.Type, tt.m.Payload, err, diff)
		}
	}
	// A watch's refusal is the write's errno.
	if _, err := ask(t, c, wire.Message{Type: wire.Watch, Payload: wire.Join("/n")}); err != syscall.EINVAL {
		t.Errorf("watch without a token: %v", err)
	}
	if _, err := c.Write((wire.Message{Type: wire.Watch, Payload: wire.Join("/n", "1")}).Append(nil)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write((wire.Message{Type: wire.Watch, Payload: wire.Join("/n", "1")}).Append(nil)); err != syscall.EEXIST {
		t.Errorf("the same watch again: %v", err)
	}

	c2 := s.DialConn(5)
	start, err := ask(t, c2, wire.Message{Type: wire.TransactionStart, Payload: wire.Join("")})
	if err != nil || string(start.Payload) != "1\x00" {
		t.Fatalf("start transaction: %q, %v", start.Payload, err)
	}
	if end, err := ask(t, c2, wire.Message{Type: wire.TransactionEnd, TxID: 1, Payload: wire.Join("X")}); err != nil || string(end.Payload) != "EINVAL\x00" {
		t.Errorf("end transaction X: %q, %v", end.Payload, err)
	}
	if err := c2.Close(); err != nil {
		t.Error(err)
	}
	if err := c2.Close(); err != fs.ErrClosed {
		t.Errorf("second Close: %v", err)
	}
	if _, err := c2.Write(nil); err != fs.ErrClosed {
		t.Errorf("Write after Close: %v", err)
	}
	if _, err := c2.Read(make([]byte, 1)); err != fs.ErrClosed {
		t.Errorf("Read after Close: %v", err)
	}
}

func TestPermissions(t *testing.T) {
	s := xenstoretest.New(t)
	c, guest, dom0 := s.Dial(5), s.Dial(7), s.Dial(0)
	ctx := t.Context()
	s.Set("/local/domain/7/state", "1")
	write := func(c *xenstore.Client, path string) error { return c.Write(ctx, path, "x") }
	if err := write(c, "/local/domain/7/state"); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("another domain's node: %v", err)
	}
	s.SetTarget(5, 7)
	for _, err := range []error{write(c, "/local/domain/7/state"), write(guest, "state"), write(dom0, "/local/domain/7/state")} {
		if err != nil {
			t.Error(err)
		}
	}
	s.SetPerms("/shared", xenstore.Perm{Dom: 0, Access: xenstore.None}, xenstore.Perm{Dom: 7, Access: xenstore.WriteOnly})
	if err := write(guest, "/shared/made"); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"n7", "w7"}, s.Perms("/shared/made")); diff != "" {
		t.Error(diff)
	}
	if _, err := guest.Read(ctx, "/shared"); !errors.Is(err, fs.ErrPermission) {
		t.Errorf("write-only node read: %v", err)
	}
	if err := dom0.Remove(ctx, "/"); !errors.Is(err, syscall.EINVAL) {
		t.Errorf("remove /: %v", err)
	}
	s.Remove("/not/there")
	if err := dom0.Remove(ctx, "/not/there"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("remove without a parent: %v", err)
	}
}

// A write that is not one whole request fails the test that made it.
func TestWholeWrites(t *testing.T) {
	for _, b := range [][]byte{
		nil,
		(wire.Message{Type: wire.Read, Payload: wire.Join("/n")}).Append(nil)[:17],
		append((wire.Message{Type: wire.Read, Payload: wire.Join("/n")}).Append(nil), 0),
		(wire.Message{Type: wire.Write, Payload: make([]byte, 4081)}).Append(nil),
	} {
		rec := &recorder{TB: t}
		if _, err := xenstoretest.New(rec).DialConn(1).Write(b); err != syscall.EINVAL || rec.errors != 1 {
			t.Errorf("%d bytes: %v, %d failures", len(b), err, rec.errors)
		}
	}
}

type recorder struct {
	testing.TB
	errors int
}

func (r *recorder) Errorf(string, ...any) { r.errors++ }

func TestHangup(t *testing.T) {
	s := xenstoretest.New(t)
	c, other := s.DialConn(5), s.Dial(6)
	s.Inject(5, []byte("rest"))
	s.Hangup(5)
	if b, err := io.ReadAll(c); err != nil || string(b) != "rest" {
		t.Errorf("read %q, %v", b, err)
	}
	if err := other.Write(t.Context(), "n", "1"); err != nil {
		t.Error("another domain's connection:", err)
	}
}
