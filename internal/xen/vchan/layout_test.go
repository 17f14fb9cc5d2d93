package vchan_test

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/xen/vchan"
	"github.com/stubinit/stubinit/internal/xen/vchan/vchantest"
)

// TestOffsets compares with struct vchan_interface of io/libxenvchan.h.
func TestOffsets(t *testing.T) {
	want := map[string]int{
		"left.cons": 0, "left.prod": 4, "right.cons": 8, "right.prod": 12,
		"left_order": 16, "right_order": 18,
		"cli_live": 20, "srv_live": 21, "cli_notify": 22, "srv_notify": 23,
		"grants": 24,
	}
	if diff := cmp.Diff(want, vchan.Offsets); diff != "" {
		t.Errorf("offsets (-want +got):\n%s", diff)
	}
}

// TestFreshPage compares a published page byte by byte.
func TestFreshPage(t *testing.T) {
	for _, tt := range []struct {
		opt  vchan.Options
		want string // up to the last grant
	}{
		{vchan.Options{LeftOrder: 10, RightOrder: 11}, "0000000000000000 0000000000000000 0a00 0b00 02 01 00 00"},
		{vchan.Options{LeftOrder: 13, RightOrder: 11}, "0000000000000000 0000000000000000 0d00 0b00 02 01 00 00 66000000 67000000"},
		{vchan.Options{LeftOrder: 12, RightOrder: 13}, "0000000000000000 0000000000000000 0c00 0d00 02 01 00 00 66000000 67000000 68000000"},
	} {
		t.Run(name(tt.opt), func(t *testing.T) {
			_, x := listen(t, tt.opt)
			ref, _, _ := x.Published()
			page := x.Page(ref)
			want, err := hex.DecodeString(strings.ReplaceAll(tt.want, " ", ""))
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, make([]byte, len(page)-len(want))...)
			if diff := cmp.Diff(want, page); diff != "" {
				t.Errorf("page (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCheckOrders(t *testing.T) {
	for _, tt := range []struct {
		left, right uint
		ok          bool
	}{
		{10, 11, true}, {11, 10, true}, {10, 12, true}, {12, 12, true}, {20, 20, true}, {11, 12, true},
		{10, 10, false}, {11, 11, false}, {9, 12, false}, {12, 21, false},
		// Grants must end before the ring in the page begins: 250 and 506 fit.
		{10, 19, true}, {10, 20, false}, {20, 11, true}, {19, 10, true}, {20, 10, false},
	} {
		if err := vchan.CheckOrders(tt.left, tt.right); (err == nil) != tt.ok {
			t.Errorf("orders %d and %d: %v, want ok=%t", tt.left, tt.right, err, tt.ok)
		}
	}
	x := vchantest.New()
	_, err := vchan.NewListener(t.Context(), x, "path", vchan.Options{LeftOrder: 11, RightOrder: 11})
	if want := "listen vchan path: bad ring order: left and right are both 11 and would share their place in the page"; err == nil || err.Error() != want {
		t.Errorf("Listen: %v, want %s", err, want)
	}
}

// TestOrdersInPage: what a client does to orders and grants harms only itself.
func TestOrdersInPage(t *testing.T) {
	s, c, _, _ := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 12})
	for i := 16; i < 20; i++ {
		c.Page()[i] = 0xff
	}
	for i := 24; i < 1024; i++ {
		c.Page()[i] = 0xff
	}
	for i := range 3000 {
		b := []byte{byte(i), byte(i >> 8)}
		if _, err := c.Write(b); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, 2)
		if n, err := s.Read(got[:1]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if n, err := s.Read(got[1:]); n != 1 || err != nil {
			t.Fatal(n, err)
		}
		if got[0] != b[0] || got[1] != b[1] {
			t.Fatalf("byte %d: read %v, want %v", i, got, b)
		}
	}
}

// TestBadIndex: an impossible index ends the session with an error that names
// it, the client is hung up on, and the next one is served.
func TestBadIndex(t *testing.T) {
	for _, tt := range []struct {
		name string
		off  int
		call func(net.Conn) error
	}{
		{"left.prod", 4, func(c net.Conn) error { _, err := c.Read(make([]byte, 1)); return err }},
		{"right.cons", 8, func(c net.Conn) error { _, err := c.Write(make([]byte, 1)); return err }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, c, l, x := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
			copy(c.Page()[tt.off:], []byte{0, 0, 0, 0x80})
			if err := tt.call(s); !errors.Is(err, vchan.ErrPeerIndex) {
				t.Errorf("%v, want %v", err, vchan.ErrPeerIndex)
			}
			if _, err := s.Read(make([]byte, 1)); !errors.Is(err, vchan.ErrPeerIndex) {
				t.Errorf("later Read: %v, want %v", err, vchan.ErrPeerIndex)
			}
			if _, err := s.Write(make([]byte, 1)); !errors.Is(err, vchan.ErrPeerIndex) {
				t.Errorf("later Write: %v, want %v", err, vchan.ErrPeerIndex)
			}
			if _, err := c.Write([]byte("x")); err == nil {
				t.Error("the client was not hung up on")
			}
			c.Close()
			exchange(t, l, x, "next")
		})
	}
}

// TestBadIndexAtTheEnd: so does one that a client leaves behind.
func TestBadIndexAtTheEnd(t *testing.T) {
	s, c, l, x := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
	s.Write([]byte("x")) // the session stands
	copy(c.Page()[4:], []byte{0, 0, 0, 0x80})
	c.Close()
	if _, err := s.Read(make([]byte, 1)); !errors.Is(err, vchan.ErrPeerIndex) {
		t.Errorf("%v, want %v", err, vchan.ErrPeerIndex)
	}
	exchange(t, l, x, "next")
}

var errFault = errors.New("out of luck")

// TestListenFails: whatever fails, the error says so and nothing is left.
func TestListenFails(t *testing.T) {
	for _, op := range []string{"bind", "share", "publish"} {
		x := vchantest.New()
		x.Fault = failing(op)
		_, err := vchan.NewListener(t.Context(), x, "path", vchan.Options{})
		if want := "listen vchan path: out of luck"; !errors.Is(err, errFault) || err.Error() != want {
			t.Errorf("%s: %v, want %s", op, err, want)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := vchan.NewListener(ctx, vchantest.New(), "path", vchan.Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}

func failing(ops ...string) func(string) error {
	return func(op string) error {
		for _, o := range ops {
			if o == op {
				return errFault
			}
		}
		return nil
	}
}

// TestWithoutSuccessor: a session is served although the next endpoint cannot
// be published, and so are those after it once that works again or as long as
// everything is read.
func TestWithoutSuccessor(t *testing.T) {
	for _, op := range []string{"bind", "share", "publish"} {
		t.Run(op, func(t *testing.T) {
			x := vchantest.New()
			fail := make(chan bool, 1)
			fail <- false
			x.Fault = func(o string) error {
				f := <-fail
				fail <- f
				if f && o == op {
					return errFault
				}
				return nil
			}
			set := func(f bool) { <-fail; fail <- f }
			l, err := vchan.NewListener(t.Context(), x, "path", vchan.Options{LeftOrder: 10, RightOrder: 11})
			if err != nil {
				t.Fatal(err)
			}
			set(true)
			published := x.Publications()
			exchange(t, l, x, "first")
			if x.Publications() != published {
				t.Error("published in spite of the fault")
			}
			set(false)
			exchangeAfter(t, l, x)
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// exchangeAfter is for an endpoint that may just be going away: the client
// tries again when it is hung up on.
func exchangeAfter(t *testing.T, l *vchan.Listener, x *vchantest.Xen) {
	t.Helper()
	go func() {
		for {
			s, err := l.Accept()
			if err != nil {
				return
			}
			s.Write([]byte("hello"))
		}
	}()
	for range 10 {
		c := dial(t, x)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		got := make([]byte, 5)
		n, err := c.Read(got)
		c.Close()
		if err == nil && string(got[:n]) == "hello" {
			return
		}
	}
	t.Error("no client was greeted")
}

// TestNoEndpointLeft: when an endpoint must be given up and there is no other,
// Accept says why.
func TestNoEndpointLeft(t *testing.T) {
	x := vchantest.New()
	l, err := vchan.NewListener(t.Context(), x, "path", vchan.Options{LeftOrder: 10, RightOrder: 11})
	if err != nil {
		t.Fatal(err)
	}
	x.Fault = failing("share")
	dial(t, x)
	accept(t, l).Close() // hangs up
	_, err = l.Accept()
	if want := "accept vchan path: no endpoint left: out of luck"; !errors.Is(err, errFault) || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// TestListenerClose ends a session and everything that waits.
func TestListenerClose(t *testing.T) {
	x := vchantest.New()
	l, err := vchan.NewListener(t.Context(), x, "path", vchan.Options{})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, x)
	s := accept(t, l)
	errs := make(chan error, 3)
	go func() { _, err := l.Accept(); errs <- err }()
	go func() { _, err := s.Read(make([]byte, 1)); errs <- err }()
	go func() { _, err := s.Write(make([]byte, 1<<20)); errs <- err }()
	time.Sleep(10 * time.Millisecond) // let them wait; they must end anyhow
	x.Fault = failing("unpublish")
	if err := l.Close(); !errors.Is(err, errFault) {
		t.Errorf("Close: %v, want %v", err, errFault)
	}
	for range 3 {
		if err := <-errs; !errors.Is(err, net.ErrClosed) {
			t.Errorf("%v, want %v", err, net.ErrClosed)
		}
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("the client was not hung up on")
	}
	if err := fmt.Sprint(l.Close()); !strings.Contains(err, "out of luck") {
		t.Errorf("second Close: %s", err)
	}
}

// TestCloseWhileOpening: both sides may close before the session stands.
func TestCloseWhileOpening(t *testing.T) {
	x := vchantest.New()
	l, err := vchan.NewListener(t.Context(), x, "path", vchan.Options{LeftOrder: 10, RightOrder: 11})
	if err != nil {
		t.Fatal(err)
	}
	publishing, goOn := make(chan struct{}), make(chan struct{})
	x.Fault = func(op string) error {
		if op == "publish" {
			publishing <- struct{}{}
			<-goOn
		}
		return nil
	}
	dial(t, x)
	<-publishing
	s := accept(t, l)
	wrote := make(chan error, 1)
	go func() {
		_, err := s.Write([]byte("too early"))
		wrote <- err
	}()
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	if err := <-wrote; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Write: %v, want %v", err, net.ErrClosed)
	}
	close(goOn)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	x.Fault = nil
	exchangeNext := make(chan struct{})
	go func() { defer close(exchangeNext); exchange(t, l, x, "next") }()
	<-exchangeNext
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
