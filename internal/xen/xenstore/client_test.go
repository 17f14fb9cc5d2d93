package xenstore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
)

const dom = 5

func dial(t *testing.T) (*xenstoretest.Server, *xenstore.Client) {
	t.Helper()
	s := xenstoretest.New(t)
	return s, s.Dial(dom)
}

// within ends the test's waits; nothing here takes that long.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantErr(t *testing.T, err, is error, text string) {
	t.Helper()
	var e *xenstore.Error
	if !errors.As(err, &e) || is != nil && !errors.Is(err, is) || !strings.Contains(err.Error(), text) {
		t.Errorf("error is %v; want one that is %v and says %q", err, is, text)
	}
}

func TestNodes(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)

	check(t, c.Write(ctx, "device/vif/0/mac", "00:16:3e:00:00:01"))
	if v, ok := s.Get("/local/domain/5/device/vif/0/mac"); !ok || v != "00:16:3e:00:00:01" {
		t.Errorf("the server has %q, %v: relative paths are the domain's", v, ok)
	}
	v, err := c.Read(ctx, "/local/domain/5/device/vif/0/mac")
	if err != nil || v != "00:16:3e:00:00:01" {
		t.Errorf("Read = %q, %v", v, err)
	}
	check(t, c.Mkdir(ctx, "device/vif/1"))
	check(t, c.Mkdir(ctx, "device/vif/0")) // exists: stays
	names, err := c.List(ctx, "device/vif")
	if diff := cmp.Diff([]string{"0", "1"}, names); err != nil || diff != "" {
		t.Error(err, diff)
	}
	names, err = c.List(ctx, "device/vif/1")
	if err != nil || len(names) != 0 {
		t.Errorf("List of an empty node = %q, %v", names, err)
	}
	check(t, c.Remove(ctx, "device/vif/0"))
	check(t, c.Remove(ctx, "device/vif/0")) // xenstored: gone is gone
	_, err = c.Read(ctx, "device/vif/0/mac")
	wantErr(t, err, fs.ErrNotExist, "xenstore: read device/vif/0/mac: no such file or directory")
	_, err = c.List(ctx, "nowhere")
	wantErr(t, err, fs.ErrNotExist, "xenstore: directory nowhere:")

	s.Set("/vm/u/image/dm-argv/001", "-name")
	wantErr(t, c.Write(ctx, "/vm/u/image/dm-argv/001", "x"), fs.ErrPermission, "write /vm/u/image/dm-argv/001: permission denied")
	s.SetPerms("/secret", xenstore.Perm{Dom: 0, Access: xenstore.None})
	_, err = c.Read(ctx, "/secret")
	wantErr(t, err, fs.ErrPermission, "/secret")
}

func TestPerms(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	check(t, c.Write(ctx, "ring-ref", "8"))
	want := []xenstore.Perm{{Dom: dom, Access: xenstore.None}, {Dom: 0, Access: xenstore.ReadOnly}}
	check(t, c.SetPerms(ctx, "ring-ref", want...))
	if diff := cmp.Diff([]string{"n5", "r0"}, s.Perms("/local/domain/5/ring-ref")); diff != "" {
		t.Error(diff)
	}
	got, err := c.Perms(ctx, "ring-ref")
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
	_, err = c.Perms(ctx, "nowhere")
	wantErr(t, err, fs.ErrNotExist, "get permissions nowhere")
	wantErr(t, c.SetPerms(ctx, "ring-ref"), syscall.EINVAL, "set permissions ring-ref")

	for in, ok := range map[string]bool{"b65535": true, "w1": true, "n65536": false, "x1": false, "": false, "r": false, "r-1": false} {
		p, err := xenstore.ParsePerm(in)
		if (err == nil) != ok || ok && p.String() != in {
			t.Errorf("ParsePerm(%q) = %v, %v", in, p, err)
		}
	}
}

// Values that xenstored would not take, but that a client must survive.
func TestOddValues(t *testing.T) {
	for _, tt := range []struct{ name, value, text string }{
		{"empty", "", ""},
		{"NUL", "a\x00b", "byte 0x00 at offset 1"},
		{"high bytes", "name\x80\xff", "byte 0x80 at offset 4"},
		{"newline", "a\n", "byte 0x0a at offset 1"},
		{"largest", strings.Repeat("v", 4096), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, c := dial(t)
			ctx := within(t)
			s.Set("/v", tt.value)
			if got, err := c.Read(ctx, "/v"); err != nil || got != tt.value {
				t.Errorf("Read = %q, %v", got, err)
			}
			got, err := c.ReadString(ctx, "/v")
			if tt.text != "" {
				wantErr(t, err, xenstore.ErrNotText, tt.text)
			} else if err != nil || got != tt.value {
				t.Errorf("ReadString = %q, %v", got, err)
			}
		})
	}
	_, c := dial(t)
	_, err := c.ReadString(within(t), "nowhere")
	wantErr(t, err, fs.ErrNotExist, "nowhere")
}

func TestRequestsThatCannotBeSent(t *testing.T) {
	_, c := dial(t)
	ctx := within(t)
	for _, tt := range []struct {
		path, text string
		is         error
	}{
		{"", "empty path", syscall.EINVAL},
		{"a\x00b", "NUL", syscall.EINVAL},
		{"/" + strings.Repeat("a", 3072), "3073 bytes, the limit is 3072", syscall.ENAMETOOLONG},
		{strings.Repeat("a", 2049), "2049 bytes, the limit is 2048", syscall.ENAMETOOLONG},
	} {
		_, err := c.Read(ctx, tt.path)
		wantErr(t, err, tt.is, tt.text)
		_, err = c.Watch(ctx, tt.path)
		wantErr(t, err, tt.is, tt.text)
	}
	// 4096 with the header: 16 + "v\x00" + 4078.
	check(t, c.Write(ctx, "v", strings.Repeat("x", 4078)))
	wantErr(t, c.Write(ctx, "v", strings.Repeat("x", 4079)), syscall.E2BIG, "write v: message of 4097 bytes, xenbus takes 4096")
	_, err := c.Read(ctx, "bad path")
	wantErr(t, err, syscall.EINVAL, "read bad path: invalid argument")
	ended, cancel := context.WithCancel(ctx)
	cancel()
	_, err = c.Read(ended, "v")
	wantErr(t, err, context.Canceled, "read v: not sent: context canceled")
}

func TestListInParts(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	var want []string
	for i := range 700 { // 8 bytes each: two parts
		name := fmt.Sprintf("node%03d", i)
		want = append(want, name)
		s.Set("/dir/"+name, "")
	}
	got, err := c.List(ctx, "/dir")
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Fatal(err, diff)
	}
	check(t, c.Update(ctx, func(tx *xenstore.Tx) error {
		got, err := tx.List(ctx, "/dir")
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		return err
	}))

	// A change between two parts: the second one has a new generation.
	var parts int
	conn := &hookConn{ReadWriteCloser: s.DialConn(dom)}
	conn.before = func(m wire.Message) {
		if m.Type == wire.DirectoryPart {
			if parts++; parts == 2 {
				s.Set("/dir/aaaa", "")
			}
		}
	}
	c2 := xenstore.NewClient(conn)
	defer c2.Close()
	got, err = c2.List(ctx, "/dir")
	if diff := cmp.Diff(append([]string{"aaaa"}, want...), got); err != nil || diff != "" {
		t.Fatal(err, diff)
	}
	if parts != 4 {
		t.Errorf("%d parts asked for, want 4: started over once", parts)
	}
	// One that never rests.
	conn.before = func(m wire.Message) { s.Set("/dir/again", ""); s.Remove("/dir/again") }
	_, err = c2.List(ctx, "/dir")
	wantErr(t, err, syscall.EAGAIN, "directory part /dir: changed 32 times")

	s.SetFaults(xenstoretest.Faults{Fail: func(op, path string) syscall.Errno {
		if op == "list" {
			return syscall.E2BIG
		}
		return 0
	}})
	_, err = c.List(ctx, "/dir")
	wantErr(t, err, syscall.E2BIG, "directory part /dir")
}

// hookConn runs before ahead of each request.
type hookConn struct {
	io.ReadWriteCloser
	before func(wire.Message)
}

func (h *hookConn) Write(b []byte) (int, error) {
	if m, err := wire.Receive(strings.NewReader(string(b))); err == nil {
		h.before(m)
	}
	return h.ReadWriteCloser.Write(b)
}

func TestUpdate(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	s.SetFaults(xenstoretest.Faults{Conflicts: 3})
	runs := 0
	check(t, c.Update(ctx, func(tx *xenstore.Tx) error {
		runs++
		if _, ok := s.Get("/local/domain/5/q/ring-ref"); ok {
			t.Error("a transaction that is not committed shows")
		}
		if err := errors.Join(
			tx.Mkdir(ctx, "q"),
			tx.Write(ctx, "q/old", ""),
			tx.Remove(ctx, "q/old"),
			tx.Write(ctx, "q/ring-ref", "8"),
			tx.Write(ctx, "q/event-channel", "3"),
			tx.SetPerms(ctx, "q/ring-ref", xenstore.Perm{Dom: dom, Access: xenstore.None}, xenstore.Perm{Dom: 0, Access: xenstore.ReadOnly}),
		); err != nil {
			return err
		}
		if v, err := tx.Read(ctx, "q/ring-ref"); err != nil || v != "8" {
			t.Errorf("own write reads %q, %v", v, err)
		}
		names, err := tx.List(ctx, "q")
		if diff := cmp.Diff([]string{"event-channel", "ring-ref"}, names); diff != "" {
			t.Error(diff)
		}
		return err
	}))
	if runs != 4 {
		t.Errorf("%d runs, want 4: three conflicts", runs)
	}
	if v, _ := s.Get("/local/domain/5/q/event-channel"); v != "3" {
		t.Errorf("event-channel = %q", v)
	}
	if diff := cmp.Diff([]string{"n5", "r0"}, s.Perms("/local/domain/5/q/ring-ref")); diff != "" {
		t.Error(diff)
	}
}

func TestUpdateRealConflict(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	s.Set("/local/domain/5/n", "1")
	runs := 0
	check(t, c.Update(ctx, func(tx *xenstore.Tx) error {
		v, err := tx.Read(ctx, "n")
		if runs++; runs == 1 {
			s.Set("/local/domain/5/n", "2")
		}
		return errors.Join(err, tx.Write(ctx, "n", v+"+"))
	}))
	if v, _ := s.Get("/local/domain/5/n"); v != "2+" || runs != 2 {
		t.Errorf("n = %q after %d runs", v, runs)
	}
}

func TestUpdateFails(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	none := func(*xenstore.Tx) error { return nil }

	s.SetFaults(xenstoretest.Faults{Conflicts: 100})
	wantErr(t, c.Update(ctx, none), syscall.EAGAIN, "xenstore: transaction: in conflict with other writers 32 times")

	refuse := func(what string) {
		s.SetFaults(xenstoretest.Faults{Fail: func(op, _ string) syscall.Errno {
			if op == what {
				return syscall.ENOSPC
			}
			return 0
		}})
	}
	refuse("start")
	wantErr(t, c.Update(ctx, none), syscall.ENOSPC, "start transaction")
	refuse("commit")
	wantErr(t, c.Update(ctx, none), syscall.ENOSPC, "end transaction")
	s.SetFaults(xenstoretest.Faults{})

	own := errors.New("own")
	before := s.Transactions(dom)
	if err := c.Update(ctx, func(tx *xenstore.Tx) error { tx.Write(ctx, "x", "1"); return own }); err != own {
		t.Errorf("err = %v, want fn's", err)
	}
	if _, ok := s.Get("/local/domain/5/x"); ok {
		t.Error("written though fn failed")
	}
	// A context that ends inside fn: the transaction is given up all the same.
	inside, cancel := context.WithCancel(ctx)
	wantErr(t, c.Update(inside, func(*xenstore.Tx) error { cancel(); return nil }), context.Canceled, "end transaction")
	func() {
		defer func() { recover() }()
		c.Update(ctx, func(*xenstore.Tx) error { panic("fn") })
	}()
	if n := s.Transactions(dom); n != before {
		t.Errorf("%d transactions left open, %d before", n, before)
	}
}

// requests checks what the client has under way.
func requests(t *testing.T, c *xenstore.Client, queued int, wire string) {
	t.Helper()
	if n, w := c.Requests(); n != queued || w != wire {
		t.Errorf("%d requests wait for %q, want %d for %q", n, w, queued, wire)
	}
}

// A caller goes when its context ends; its request holds the wire until the
// answer is there. Then what the answer brought is given back, before anything else.
func TestLateAnswers(t *testing.T) {
	for _, tt := range []struct {
		name                  string
		call                  func(context.Context, *xenstore.Client) error
		watches, transactions int // at the server meanwhile
		undo                  []string
	}{
		{"read /v", func(ctx context.Context, c *xenstore.Client) error {
			_, err := c.Read(ctx, "/v")
			return err
		}, 0, 0, nil},
		{"watch /v", func(ctx context.Context, c *xenstore.Client) error {
			_, err := c.Watch(ctx, "/v")
			return err
		}, 1, 0, []string{"unwatch /v 1"}},
		{"start transaction", func(ctx context.Context, c *xenstore.Client) error {
			return c.Update(ctx, func(*xenstore.Tx) error { panic("ran") })
		}, 0, 1, []string{"end transaction F"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := xenstoretest.New(t)
				s.Set("/v", "1")
				conn := &hookConn{ReadWriteCloser: s.DialConn(dom)}
				var sent []string
				conn.before = func(m wire.Message) { sent = append(sent, spell(m)) }
				c := xenstore.NewClient(conn)
				defer c.Close()
				s.SetFaults(xenstoretest.Faults{Late: true})

				soon, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				wantErr(t, tt.call(soon, c), context.DeadlineExceeded, tt.name+": no answer from xenstored for 1s")
				later, cancel := context.WithTimeout(t.Context(), 2*time.Second)
				defer cancel()
				_, err := c.Read(later, "/x")
				wantErr(t, err, context.DeadlineExceeded, "read /x: not sent: xenstored has not answered "+tt.name+" for 3s")
				requests(t, c, 0, tt.name)
				if s.Watches(dom) != tt.watches || s.Transactions(dom) != tt.transactions {
					t.Errorf("%d watches, %d transactions at the server", s.Watches(dom), s.Transactions(dom))
				}

				var wg sync.WaitGroup
				wg.Go(func() {
					if v, err := c.Read(t.Context(), "/v"); err != nil || v != "1" {
						t.Errorf("Read after it = %q, %v", v, err)
					}
				})
				synctest.Wait()
				requests(t, c, 1, tt.name)
				sent = nil
				s.SetFaults(xenstoretest.Faults{})
				wg.Wait()
				if diff := cmp.Diff(append(tt.undo, "read /v"), sent); diff != "" {
					t.Error(diff)
				}
				if s.Watches(dom) != 0 || s.Transactions(dom) != 0 {
					t.Errorf("%d watches, %d transactions left at the server", s.Watches(dom), s.Transactions(dom))
				}
				requests(t, c, 0, "")
			})
		})
	}
}

// spell is a request as type and strings.
func spell(m wire.Message) string {
	return strings.TrimSpace(m.Type.String() + " " + strings.ReplaceAll(string(m.Payload), "\x00", " "))
}

// hold makes a request whose caller has gone and whose answer is late, so that
// it holds the wire. It needs a synctest bubble.
func hold(t *testing.T, s *xenstoretest.Server, c *xenstore.Client) {
	t.Helper()
	s.SetFaults(xenstoretest.Faults{Late: true})
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if err := c.Mkdir(ctx, "held"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("mkdir: %v", err)
	}
	synctest.Wait()
}

// What xenstored keeps is given back however long the wire is in use.
func TestOwedRequests(t *testing.T) {
	for _, tt := range []struct {
		name string
		call func(*testing.T, *xenstoretest.Server, *xenstore.Client)
	}{
		{"watch", func(t *testing.T, s *xenstoretest.Server, c *xenstore.Client) {
			w, err := c.Watch(t.Context(), "/v")
			check(t, err)
			hold(t, s, c)
			wantErr(t, w.Close(), context.DeadlineExceeded, "unwatch /v: not sent: xenstored has not answered mkdir held for 5.001s")
		}},
		{"transaction given up", func(t *testing.T, s *xenstoretest.Server, c *xenstore.Client) {
			own := errors.New("own")
			if err := c.Update(t.Context(), func(*xenstore.Tx) error { hold(t, s, c); return own }); err != own {
				t.Errorf("err = %v, want fn's", err)
			}
		}},
		{"commit not sent", func(t *testing.T, s *xenstoretest.Server, c *xenstore.Client) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			err := c.Update(ctx, func(tx *xenstore.Tx) error {
				err := tx.Write(ctx, "n", "1")
				hold(t, s, c)
				return err
			})
			wantErr(t, err, context.DeadlineExceeded, "end transaction: not sent: xenstored has not answered mkdir held for 1s")
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, c := dial(t)
				tt.call(t, s, c)
				requests(t, c, 1, "mkdir held")
				if n := s.Watches(dom) + s.Transactions(dom); n != 1 {
					t.Errorf("%d watches and transactions at the server, want 1", n)
				}
				s.SetFaults(xenstoretest.Faults{})
				synctest.Wait()
				if n := s.Watches(dom) + s.Transactions(dom); n != 0 {
					t.Errorf("%d watches and transactions left at the server", n)
				}
				if _, ok := s.Get("/local/domain/5/n"); ok {
					t.Error("the transaction took place")
				}
				requests(t, c, 0, "")
			})
		})
	}
}

// The order is that of the calls; who gives up leaves the queue, so that a
// xenstored that hangs does not fill the memory.
func TestOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := xenstoretest.New(t)
		conn := &hookConn{ReadWriteCloser: s.DialConn(dom)}
		var sent, want []string
		conn.before = func(m wire.Message) { sent = append(sent, spell(m)) }
		c := xenstore.NewClient(conn)
		defer c.Close()
		hold(t, s, c)
		sent = nil
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var wg sync.WaitGroup
		for i := range 20 {
			name := fmt.Sprintf("n%d", i)
			if i%4 == 1 {
				wg.Go(func() { wantErr(t, c.Mkdir(ctx, name), context.Canceled, "mkdir "+name+": not sent: ") })
			} else {
				want = append(want, "mkdir "+name)
				wg.Go(func() {
					if err := c.Mkdir(t.Context(), name); err != nil {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
		}
		requests(t, c, 20, "mkdir held")
		cancel()
		synctest.Wait()
		requests(t, c, 15, "mkdir held")
		s.SetFaults(xenstoretest.Faults{})
		wg.Wait()
		if diff := cmp.Diff(want, sent); diff != "" {
			t.Error(diff)
		}
	})
}

// xenbusConn does with requests what the kernel does: one buffer for the file,
// from which a request goes on some time after Write has returned, while that of a
// watch goes on within Write. Anything written before the answer to the
// request before was read fails the test.
type xenbusConn struct {
	t     testing.TB
	inner io.ReadWriteCloser
	buf   [wire.MaxRequest]byte
	wg    sync.WaitGroup

	mu       sync.Mutex
	waiting  string // the request without an answer
	received []byte // from inner, less than a message
	sent     int
}

func (x *xenbusConn) Write(b []byte) (int, error) {
	m, err := wire.Receive(bytes.NewReader(b))
	if err != nil {
		x.t.Errorf("write of %q: %v", b, err)
		return 0, syscall.EINVAL
	}
	x.mu.Lock()
	if x.waiting != "" {
		x.t.Errorf("%q written, and %q has no answer", spell(m), x.waiting)
	}
	x.waiting = spell(m)
	x.sent++
	x.mu.Unlock()
	request := x.buf[:copy(x.buf[:], b)]
	if m.Type == wire.Watch || m.Type == wire.Unwatch {
		n, err := x.inner.Write(request)
		if err != nil {
			x.answered()
		}
		return n, err
	}
	x.wg.Go(func() {
		runtime.Gosched()
		if _, err := x.inner.Write(request); err != nil {
			x.t.Errorf("%s: %v", spell(m), err)
		}
	})
	return len(b), nil
}

func (x *xenbusConn) answered() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.waiting = ""
}

func (x *xenbusConn) Read(b []byte) (int, error) {
	n, err := x.inner.Read(b)
	x.received = append(x.received, b[:n]...)
	for {
		r := bytes.NewReader(x.received)
		m, err := wire.Receive(r)
		if err != nil { // the rest is to come
			break
		}
		x.received = x.received[len(x.received)-r.Len():]
		if m.Type != wire.WatchEvent {
			x.answered()
		}
	}
	return n, err
}

func (x *xenbusConn) Close() error {
	x.wg.Wait()
	return x.inner.Close()
}

func TestOneRequestOnTheWire(t *testing.T) {
	s := xenstoretest.New(t)
	s.SetFaults(xenstoretest.Faults{Chunk: 11, EventBeforeAck: true, EventAfterUnwatch: true, Fail: func(op, path string) syscall.Errno {
		if op == "watch" && path == "denied" {
			return syscall.EACCES
		}
		return 0
	}})
	conn := &xenbusConn{t: t, inner: s.DialConn(dom)}
	c := xenstore.NewClient(conn)
	defer c.Close()
	ctx := within(t)
	var wg sync.WaitGroup
	for i := range 6 {
		path, count := fmt.Sprintf("n/%d", i), fmt.Sprintf("count/%d", i/2)
		loop := func(f func(value string) error) {
			wg.Go(func() {
				for j := range 40 {
					if err := f(strings.Repeat(fmt.Sprint(j), i+1)); err != nil {
						t.Error(err)
					}
				}
			})
		}
		loop(func(value string) error {
			err := c.Write(ctx, path, value)
			if got, err := c.Read(ctx, path); err != nil || got != value {
				t.Errorf("%s = %q, %v, want %q", path, got, err, value)
			}
			return err
		})
		loop(func(string) error { // two add to each count
			for {
				err := c.Update(ctx, func(tx *xenstore.Tx) error {
					v, err := tx.Read(ctx, count)
					if err != nil && !errors.Is(err, fs.ErrNotExist) {
						return err
					}
					return tx.Write(ctx, count, v+"+")
				})
				if !errors.Is(err, syscall.EAGAIN) {
					return err
				}
			}
		})
		loop(func(string) error {
			w, err := c.Watch(ctx, path)
			if err != nil {
				return err
			}
			_, err = w.Next(ctx)
			return errors.Join(err, w.Close())
		})
		loop(func(string) error {
			_, err := c.Watch(ctx, "denied")
			if !errors.Is(err, fs.ErrPermission) {
				t.Errorf("watch denied: %v", err)
			}
			return nil
		})
		loop(func(value string) error { // callers that go
			soon, cancel := context.WithTimeout(ctx, time.Duration(len(value))*10*time.Microsecond)
			defer cancel()
			var err error
			if len(value)%2 == 0 {
				_, err = c.WaitFor(soon, "never", func(string, bool) bool { return false })
			} else {
				err = c.Update(soon, func(tx *xenstore.Tx) error { _, err := tx.List(soon, "n"); return err })
			}
			if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			return nil
		})
	}
	wg.Wait()
	check(t, c.Mkdir(ctx, "last")) // behind all that callers have left
	requests(t, c, 0, "")
	if s.Watches(dom) != 0 || s.Transactions(dom) != 0 {
		t.Errorf("%d watches, %d transactions left at the server", s.Watches(dom), s.Transactions(dom))
	}
	for i := range 3 {
		if v, _ := s.Get(fmt.Sprintf("/local/domain/5/count/%d", i)); len(v) != 80 {
			t.Errorf("count %d is %d, want 80", i, len(v))
		}
	}
	check(t, c.Close())
	t.Logf("%d requests", conn.sent)
}

func TestEnd(t *testing.T) {
	bad := func(m wire.Message) []byte { return m.Append(nil) }
	for _, tt := range []struct {
		name string
		end  func(*xenstoretest.Server, *xenstore.Client)
		is   error
		text string
	}{
		{"EOF", func(s *xenstoretest.Server, _ *xenstore.Client) { s.Hangup(dom) }, io.EOF, "xenbus closed its end"},
		{"close", func(_ *xenstoretest.Server, c *xenstore.Client) { c.Close() }, fs.ErrClosed, "closed"},
		{"EOF in a header", func(s *xenstoretest.Server, _ *xenstore.Client) { s.Inject(dom, []byte("abc")); s.Hangup(dom) }, io.ErrUnexpectedEOF, "3 of the 16 bytes"},
		{"bad length", func(s *xenstoretest.Server, _ *xenstore.Client) {
			s.Inject(dom, bad(wire.Message{Type: wire.Read, ReqID: 1, Payload: make([]byte, 4097)}))
		}, nil, "bad header: payload of 4097 bytes"},
		{"bad id", func(s *xenstoretest.Server, _ *xenstore.Client) {
			s.Inject(dom, bad(wire.Message{Type: wire.Read, ReqID: 99}))
		}, nil, `bad header: answer of type "read" to request 99, which is not waiting`},
		{"bad type", func(s *xenstoretest.Server, _ *xenstore.Client) {
			s.Inject(dom, bad(wire.Message{Type: wire.Mkdir, ReqID: 2}))
		}, nil, `bad header: answer of type "mkdir" to request 2 of type "read"`},
		{"bad event", func(s *xenstoretest.Server, _ *xenstore.Client) {
			s.Inject(dom, bad(wire.Message{Type: wire.WatchEvent, Payload: []byte("path\x00token")}))
		}, nil, "bad watch event"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, c := dial(t)
				ctx := t.Context()
				w, err := c.Watch(ctx, "/w")
				check(t, err)
				if _, err := w.Next(ctx); err != nil {
					t.Fatal(err)
				}
				s.SetFaults(xenstoretest.Faults{Late: true})
				var wg sync.WaitGroup
				wg.Go(func() { _, err := c.Read(ctx, "/v"); wantErr(t, err, tt.is, tt.text) })
				synctest.Wait()
				wg.Go(func() { _, err := w.Next(ctx); wantErr(t, err, tt.is, tt.text) })
				wg.Go(func() { _, err := c.WaitFor(ctx, "/v", nil); wantErr(t, err, tt.is, tt.text) })
				wg.Go(func() {
					wantErr(t, c.Update(ctx, func(*xenstore.Tx) error { return nil }), tt.is, tt.text)
				})
				synctest.Wait()
				if c.Err() != nil {
					t.Fatal("ended too early:", c.Err())
				}
				tt.end(s, c)
				<-c.Done()
				wg.Wait()
				wantErr(t, c.Err(), tt.is, "xenstore: connection: ")
				wantErr(t, c.Write(ctx, "/v", ""), tt.is, tt.text)
				check(t, w.Close()) // nothing is left to end
				check(t, c.Close())
			})
		})
	}
}

// An oversized value is more than a reader can believe: the connection ends and says so.
func TestOversizedValue(t *testing.T) {
	s, c := dial(t)
	s.Set("/v", strings.Repeat("v", 4097))
	_, err := c.Read(within(t), "/v")
	wantErr(t, err, nil, "read /v: xenstore: connection: bad header: payload of 4097 bytes")
}

// scripted answers each request with what answer makes of it.
type scripted struct {
	io.Reader
	w      *io.PipeWriter
	answer func(wire.Message) []byte
}

func newScripted(t *testing.T, answer func(wire.Message) []byte) *xenstore.Client {
	r, w := io.Pipe()
	c := xenstore.NewClient(&scripted{r, w, answer})
	t.Cleanup(func() { c.Close() })
	return c
}

func (s *scripted) Write(b []byte) (int, error) {
	m, err := wire.Receive(strings.NewReader(string(b)))
	if err != nil {
		return 0, err
	}
	if _, err := s.w.Write((wire.Message{Type: m.Type, ReqID: m.ReqID, Payload: s.answer(m)}).Append(nil)); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (s *scripted) Close() error { return s.w.Close() }

// Answers whose header is right and whose content is not fail one call alone.
func TestBadContent(t *testing.T) {
	var payload string
	c := newScripted(t, func(wire.Message) []byte { return []byte(payload) })
	ctx := within(t)
	for _, tt := range []struct {
		payload string
		call    func() error
		text    string
	}{
		{"ok\x00", func() error { return c.Write(ctx, "a", "") }, `write a: answer "ok\x00" instead of OK`},
		{"", func() error { return c.Mkdir(ctx, "a") }, "mkdir a: answer"},
		{"", func() error { return c.Remove(ctx, "a") }, "remove a: answer"},
		{"", func() error { return c.SetPerms(ctx, "a") }, "set permissions a: answer"},
		{"", func() error { _, err := c.Perms(ctx, "a"); return err }, "get permissions a: answer without an owner"},
		{"n0", func() error { _, err := c.Perms(ctx, "a"); return err }, "NUL"},
		{"n0\x00q1\x00", func() error { _, err := c.Perms(ctx, "a"); return err }, `bad permission "q1"`},
		{"a", func() error { _, err := c.List(ctx, "a"); return err }, "directory a: the last string"},
		{"0\x00", func() error { return c.Update(ctx, nil) }, "start transaction: bad transaction id"},
		{"1", func() error { return c.Update(ctx, nil) }, "bad transaction id"},
		{"x\x00", func() error { return c.Update(ctx, nil) }, "bad transaction id"},
		{"7\x00", func() error { return c.Update(ctx, func(*xenstore.Tx) error { return nil }) }, "end transaction: answer"},
		{"", func() error { _, err := c.Watch(ctx, "a"); return err }, "watch a: answer"},
	} {
		payload = tt.payload
		wantErr(t, tt.call(), nil, tt.text)
	}
	if c.Err() != nil {
		t.Errorf("the connection ended: %v", c.Err())
	}
}

func TestBadParts(t *testing.T) {
	for _, tt := range []struct{ payload, text string }{
		{"", "without a generation"},
		{"7\x00", "without a generation"},
		{"\x00a\x00", "without a generation"},
		{"7\x00a", "does not end in NUL"},
		{"7\x00a\x00\x00b\x00", "empty name"},
	} {
		r, w := io.Pipe()
		s := &scripted{r, w, func(m wire.Message) []byte { return []byte(tt.payload) }}
		c := xenstore.NewClient(&tooBig{s})
		_, err := c.List(within(t), "a")
		wantErr(t, err, nil, tt.text)
		c.Close()
	}
}

// tooBig refuses XS_DIRECTORY, so that it is read in parts.
type tooBig struct{ *scripted }

func (b *tooBig) Write(p []byte) (int, error) {
	if p[0] == byte(wire.Directory) {
		return 0, syscall.E2BIG
	}
	return b.scripted.Write(p)
}

func TestWriteErrors(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	s.SetFaults(xenstoretest.Faults{WriteErrno: func(op, path string) syscall.Errno {
		if path == "/refused" {
			return syscall.ENOMEM
		}
		return 0
	}, Fail: func(op, path string) syscall.Errno {
		if op == "watch" && path == "/denied" {
			return syscall.EACCES
		}
		return 0
	}})
	wantErr(t, c.Write(ctx, "/refused", ""), syscall.ENOMEM, "write /refused: cannot allocate memory")
	_, err := c.Watch(ctx, "/denied")
	wantErr(t, err, fs.ErrPermission, "watch /denied: permission denied")
	_, err = c.WaitFor(ctx, "/denied", nil)
	wantErr(t, err, fs.ErrPermission, "watch /denied")
	requests(t, c, 0, "")
	check(t, c.Write(ctx, "fine", "")) // the connection lives
}

// brokenConn fails writes without an errno, or in the middle of a message.
type brokenConn struct {
	io.ReadWriteCloser
	n   int
	err error
}

func (b *brokenConn) Write([]byte) (int, error) { return b.n, b.err }

func TestBrokenWrite(t *testing.T) {
	for _, tt := range []*brokenConn{{n: 0, err: io.ErrClosedPipe}, {n: 3, err: syscall.EIO}} {
		tt.ReadWriteCloser = xenstoretest.New(t).DialConn(dom)
		c := xenstore.NewClient(tt)
		_, err := c.Read(within(t), "a")
		wantErr(t, err, tt.err, `write a message of type "read"`)
		wantErr(t, c.Err(), tt.err, "connection")
		c.Close()
	}
}

// answeredConn fails a Write when the answer to it has been used already.
type answeredConn struct {
	io.ReadWriteCloser
	used chan struct{}
}

func (a *answeredConn) Write(b []byte) (int, error) {
	a.ReadWriteCloser.Write(b)
	<-a.used
	return 0, syscall.EIO
}

func TestErrnoAfterAnswer(t *testing.T) {
	s := xenstoretest.New(t)
	s.Set("/v", "1")
	conn := &answeredConn{s.DialConn(dom), make(chan struct{})}
	c := xenstore.NewClient(conn)
	defer c.Close()
	for range 2 {
		if v, err := c.Read(within(t), "/v"); err != nil || v != "1" {
			t.Errorf("Read = %q, %v", v, err)
		}
		conn.used <- struct{}{}
	}
}

// stuckConn is a kernel whose write waits for a xenstored that hangs.
type stuckConn struct {
	io.ReadWriteCloser
	release chan struct{}
}

func (s *stuckConn) Write(b []byte) (int, error) {
	<-s.release
	return s.ReadWriteCloser.Write(b)
}

func TestStuckWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		conn := &stuckConn{xenstoretest.New(t).DialConn(dom), make(chan struct{})}
		c := xenstore.NewClient(conn)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { _, err := c.Watch(ctx, "/a"); wantErr(t, err, context.DeadlineExceeded, "no answer") })
		synctest.Wait()
		wg.Go(func() {
			_, err := c.Read(ctx, "/b")
			wantErr(t, err, context.DeadlineExceeded, "read /b: not sent: xenstored has not answered watch /a for 1s")
		})
		wg.Wait()
		wg.Go(func() { _, err := c.Read(t.Context(), "/b"); wantErr(t, err, fs.ErrClosed, "read /b") })
		wg.Go(func() { c.Close() })
		<-c.Done()
		close(conn.release)
		wg.Wait()
	})
}

// badClose is a descriptor whose close reports an error.
type badClose struct{ io.ReadWriteCloser }

func (b badClose) Close() error {
	b.ReadWriteCloser.Close()
	return syscall.EIO
}

func TestCloseError(t *testing.T) {
	c := xenstore.NewClient(badClose{xenstoretest.New(t).DialConn(dom)})
	wantErr(t, c.Close(), syscall.EIO, "xenstore: close: ")
	check(t, c.Close())
}

func TestOpen(t *testing.T) {
	_, err := xenstore.OpenPath("/nonexistent/xenbus")
	wantErr(t, err, fs.ErrNotExist, "xenstore: open /nonexistent/xenbus: no such file or directory")

	// A pipe goes through Go's poller as xenbus does: Close ends the Read.
	fifo := filepath.Join(t.TempDir(), "xenbus")
	check(t, syscall.Mkfifo(fifo, 0o600))
	c, err := xenstore.OpenPath(fifo)
	check(t, err)
	check(t, c.Close())
	wantErr(t, c.Err(), fs.ErrClosed, "connection")
	if _, err := os.Stat(xenstore.Device); errors.Is(err, fs.ErrNotExist) {
		_, err := xenstore.Open()
		wantErr(t, err, fs.ErrNotExist, xenstore.Device)
	}
}

// Replies find their callers, whatever the order and the pieces they come in.
func TestConcurrent(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	s.SetFaults(xenstoretest.Faults{Chunk: 7})
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			path := fmt.Sprintf("n/%d", i)
			for j := range 50 {
				want := fmt.Sprintf("%d-%d", i, j)
				if err := c.Write(ctx, path, want); err != nil {
					t.Error(err)
				}
				if got, err := c.Read(ctx, path); err != nil || got != want {
					t.Errorf("%s = %q, %v, want %q", path, got, err, want)
				}
			}
		})
	}
	wg.Wait()
}

// A bubble fails when a goroutine of it is left at its end.
func TestNoGoroutineLeak(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := xenstore.NewClient(xenstoretest.New(t).DialConn(dom))
		_, err := c.Watch(t.Context(), "/a")
		check(t, err)
		check(t, c.Close())
	})
}

func TestWaitFor(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	var seen []string
	done := make(chan error, 1)
	step := make(chan struct{}, 10)
	go func() {
		v, err := c.WaitFor(ctx, "state", func(value string, exists bool) bool {
			seen = append(seen, fmt.Sprintf("%q %v", value, exists))
			step <- struct{}{}
			return value == "4"
		})
		if v != "4" && err == nil {
			err = fmt.Errorf("value %q", v)
		}
		done <- err
	}()
	<-step
	s.Set("/local/domain/5/state", "")
	<-step
	s.Set("/local/domain/5/state", "3")
	<-step
	s.Set("/local/domain/5/state", "4")
	check(t, <-done)
	if diff := cmp.Diff([]string{`"" false`, `"" true`, `"3" true`, `"4" true`}, seen); diff != "" {
		t.Error(diff)
	}
	if n := s.Watches(dom); n != 0 {
		t.Errorf("%d watches left", n)
	}
	soon, cancel := context.WithTimeout(ctx, time.Second) // enough for the reads before it, on a busy machine too
	defer cancel()
	_, err := c.WaitFor(soon, "state", func(string, bool) bool { return false })
	wantErr(t, err, context.DeadlineExceeded, "wait for a change of state: no event")
	s.SetPerms("/p", xenstore.Perm{Dom: 0, Access: xenstore.None})
	_, err = c.WaitFor(ctx, "/p", nil)
	wantErr(t, err, fs.ErrPermission, "read /p")
}
