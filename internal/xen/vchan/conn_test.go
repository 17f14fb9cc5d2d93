package vchan_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/nettest"

	"github.com/stubinit/stubinit/internal/xen/vchan"
	"github.com/stubinit/stubinit/internal/xen/vchan/vchantest"
)

// orders are the ring orders that the tests run with.
var orders = []vchan.Options{
	{LeftOrder: 10, RightOrder: 11},
	{LeftOrder: 11, RightOrder: 10},
	{LeftOrder: 10, RightOrder: 12},
	{LeftOrder: 13, RightOrder: 11},
	{},
}

func name(o vchan.Options) string { return fmt.Sprintf("left%d,right%d", o.LeftOrder, o.RightOrder) }

func TestMain(m *testing.M) {
	code := m.Run()
	buf := make([]byte, 1<<20)
	buf = buf[:runtime.Stack(buf, true)]
	if n := bytes.Count(buf, []byte("vchan.(*Listener).run")); n > 0 && code == 0 {
		fmt.Printf("%d goroutines of listeners are left:\n%s", n, buf)
		code = 1
	}
	os.Exit(code)
}

// listen serves a fresh Xen until the test ends, which fails if anything is
// not given back.
func listen(t testing.TB, opt vchan.Options) (*vchan.Listener, *vchantest.Xen) {
	t.Helper()
	x := vchantest.New()
	l, err := vchan.NewListener(t.Context(), x, "device-model/7/qmp-vchan", opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, x
}

func dial(t testing.TB, x *vchantest.Xen) *vchantest.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := vchantest.Dial(ctx, x)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func accept(t testing.TB, l *vchan.Listener) net.Conn {
	t.Helper()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return c
}

func pair(t testing.TB, opt vchan.Options) (net.Conn, *vchantest.Client, *vchan.Listener, *vchantest.Xen) {
	t.Helper()
	l, x := listen(t, opt)
	c := dial(t, x)
	s := accept(t, l)
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return s, c, l, x
}

func TestNetConn(t *testing.T) {
	for _, o := range orders {
		for _, serverFirst := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s,serverFirst=%t", name(o), serverFirst), func(t *testing.T) {
				t.Parallel()
				nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
					x := vchantest.New()
					l, err := vchan.NewListener(context.Background(), x, "test", o)
					if err != nil {
						return nil, nil, nil, err
					}
					c, err := vchantest.Dial(context.Background(), x)
					if err != nil {
						return nil, nil, nil, err
					}
					s, err := l.Accept()
					if err != nil {
						return nil, nil, nil, err
					}
					stop := func() {
						s.Close()
						c.Close()
						if err := l.Close(); err != nil {
							t.Error(err)
						}
					}
					if serverFirst {
						return s, c, stop, nil
					}
					return c, s, stop, nil
				})
			})
		}
	}
}

// wantEcho writes 1 MiB in pieces of random sizes, and reads it back meanwhile.
func wantEcho(t *testing.T, c *vchantest.Client) {
	t.Helper()
	rnd := rand.New(rand.NewSource(1))
	want := make([]byte, 1<<20)
	rnd.Read(want)
	go func() {
		for rest := want; len(rest) > 0; {
			n := min(1+rnd.Intn(5000), len(rest))
			if _, err := c.Write(rest[:n]); err != nil {
				t.Error(err)
				return
			}
			rest = rest[n:]
		}
	}()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("echo differs")
	}
}

// TestEcho sends every size once around the ring in both directions at once,
// so that every offset sees a wrap-around.
func TestEcho(t *testing.T) {
	for _, o := range orders {
		t.Run(name(o), func(t *testing.T) {
			t.Parallel()
			s, c, _, _ := pair(t, o)
			done := make(chan error, 1)
			go func() {
				_, err := io.Copy(struct{ io.Writer }{s}, struct{ io.Reader }{s})
				done <- err
			}()
			wantEcho(t, c)
			c.Close()
			if err := <-done; err != nil {
				t.Errorf("server's copy ended with %v, want end of file", err)
			}
		})
	}
}

func TestClientLeaves(t *testing.T) {
	s, c, _, _ := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
	s.Write([]byte("x")) // the session stands: a client that leaves before is not heard
	if _, err := c.Write([]byte("last words")); err != nil {
		t.Fatal(err)
	}
	c.Close()
	got, err := io.ReadAll(s)
	if string(got) != "last words" || err != nil {
		t.Errorf("Read gave %q, %v; want what was written and end of file", got, err)
	}
	_, err = s.Write([]byte("x"))
	if !errors.Is(err, vchan.ErrSessionEnded) {
		t.Errorf("Write: %v, want %v", err, vchan.ErrSessionEnded)
	}
	if want := "write vchan device-model/7/qmp-vchan: the client has left"; err == nil || err.Error() != want {
		t.Errorf("Write: %q, want %q", err, want)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	for _, f := range []func(time.Time) error{s.SetDeadline, s.SetReadDeadline, s.SetWriteDeadline} {
		if err := f(time.Time{}); !errors.Is(err, net.ErrClosed) {
			t.Errorf("deadline after Close: %v, want %v", err, net.ErrClosed)
		}
	}
}

// TestHangUp closes from our side: blocked calls end, the client reads what is
// there and then the end, and its next connection finds a fresh endpoint.
func TestHangUp(t *testing.T) {
	s, c, l, x := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
	readErr := make(chan error, 1)
	go func() {
		_, err := s.Read(make([]byte, 1))
		readErr <- err
	}()
	if _, err := s.Write([]byte("bye")); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-readErr; !errors.Is(err, net.ErrClosed) {
		t.Errorf("blocked Read: %v, want %v", err, net.ErrClosed)
	}
	got, err := io.ReadAll(c)
	if string(got) != "bye" || err != nil {
		t.Errorf("client read %q, %v; want what was written and end of file", got, err)
	}
	if _, err := c.Write([]byte("x")); err == nil {
		t.Error("client could write after the hang-up")
	}
	c.Close()
	exchange(t, l, x, "next")
}

// exchange attaches a client and passes a greeting and a request.
func exchange(t testing.TB, l *vchan.Listener, x *vchantest.Xen, greeting string) {
	t.Helper()
	c := dial(t, x)
	c.SetDeadline(time.Now().Add(10 * time.Second))
	s := accept(t, l)
	defer s.Close()
	defer c.Close()
	if _, err := s.Write([]byte(greeting)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != greeting {
		t.Fatalf("client read %q, %v; want %q", got, err, greeting)
	}
	if _, err := c.Write([]byte("request")); err != nil {
		t.Fatal(err)
	}
	got = make([]byte, len("request"))
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "request" {
		t.Fatalf("server read %q, %v", got, err)
	}
}

// TestReconnectStorm connects with no pause, while the server keeps sending.
// Each client must get its greeting first, and nobody may be hung up on.
func TestReconnectStorm(t *testing.T) {
	l, x := listen(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
	go func() {
		for i := 0; ; i++ {
			s, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer s.Close()
				fmt.Fprintf(s, "greeting\n")
				for {
					if _, err := fmt.Fprintf(s, "event of a session\n"); err != nil {
						return
					}
				}
			}()
		}
	}()
	rnd := rand.New(rand.NewSource(2))
	n := 2000
	if testing.Short() {
		n = 200
	}
	for i := range n {
		c := dial(t, x)
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if rnd.Intn(3) == 0 {
			c.Close() // gone before anything was said
			continue
		}
		got := make([]byte, 9+rnd.Intn(4000))
		if _, err := io.ReadFull(c, got); err != nil {
			t.Fatalf("client %d: %v", i, err)
		}
		if want := "greeting\n" + strings.Repeat("event of a session\n", 250); string(got) != want[:len(got)] {
			t.Fatalf("client %d read %.60q", i, got)
		}
		c.Close()
	}
}

func TestMarker(t *testing.T) {
	l, x := listen(t, vchan.Options{LeftOrder: 10, RightOrder: 11, Marker: true})
	c := dial(t, x)
	s := accept(t, l)
	if _, err := s.Write([]byte("hello")); err != nil { // the session stands
		t.Fatal(err)
	}
	c.Write([]byte("\x01one"))
	got := make([]byte, 3)
	if _, err := io.ReadFull(s, got); err != nil || string(got) != "one" {
		t.Fatalf("read %q, %v; want the bytes behind the marker", got, err)
	}
	c.Write([]byte("end\x01two"))
	all, err := io.ReadAll(s)
	if string(all) != "end" || err != nil {
		t.Errorf("read %q, %v; want the bytes before the marker and end of file", all, err)
	}
	if _, err := s.Write([]byte("x")); !errors.Is(err, vchan.ErrSessionEnded) {
		t.Errorf("Write to the old session: %v", err)
	}
	s2 := accept(t, l)
	s.Close() // must not touch the new session
	if _, err := io.ReadFull(s2, got); err != nil || string(got) != "two" {
		t.Fatalf("new session read %q, %v", got, err)
	}
	if _, err := s2.Write([]byte("hello")); err != nil {
		t.Error(err)
	}
	c.Write([]byte("rest\x01more"))
	c.Close()
	all, err = io.ReadAll(s2)
	if string(all) != "rest" || err != nil {
		t.Errorf("read %q, %v; want the bytes before the marker", all, err)
	}
}

// TestRaw: without Marker every byte is data.
func TestRaw(t *testing.T) {
	s, c, _, _ := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
	var want []byte
	for i := range 256 {
		want = append(want, byte(i), 1)
	}
	c.Write(want)
	got := make([]byte, len(want))
	if _, err := io.ReadFull(s, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("read %q, %v", got, err)
	}
}

// TestIdle: a session without traffic wakes nobody, and a side that does not
// wait is sent no events.
func TestIdle(t *testing.T) {
	s, c, _, x := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
	read := make(chan struct{})
	go func() {
		defer close(read)
		s.Read(make([]byte, 1))
	}()
	time.Sleep(20 * time.Millisecond) // let it wait
	before := x.Wakeups()
	time.Sleep(200 * time.Millisecond)
	if n := x.Wakeups() - before; n != 0 {
		t.Errorf("%d wake-ups of an idle session", n)
	}
	c.Write([]byte("x"))
	<-read
	events := x.Events()
	for range 10 {
		c.Write([]byte("x")) // the server does not wait for these
	}
	if n := x.Events() - events; n != 0 {
		t.Errorf("%d events for a server that does not wait", n)
	}
}

// TestLateRequest: a client is held up between moving its index and looking
// whether the server wants to know. By then the server waits for its next move,
// and the client takes that request for the move already made.
func TestLateRequest(t *testing.T) {
	waitFor := func(t *testing.T, ok func() bool) {
		for end := time.Now().Add(5 * time.Second); !ok(); runtime.Gosched() {
			if time.Now().After(end) {
				t.Fatal("the server does not ask")
			}
		}
	}
	t.Run("write", func(t *testing.T) {
		s, c, _, x := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
		if _, err := s.Write(make([]byte, 2048)); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		once := false
		c.Trace = func(op string, _ uint32) {
			if op != "right.cons=" || once {
				return
			}
			once = true
			go func() {
				_, err := s.Write(make([]byte, 1000)) // 500 at once
				done <- err
			}()
			waitFor(t, func() bool { return c.Wanted(2) })
		}
		c.TryRead(make([]byte, 500))
		waitFor(t, func() bool { return !x.Pending() && c.Wanted(2) })
		c.TryRead(make([]byte, 500))
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Run("read", func(t *testing.T) {
		s, c, _, x := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
		s.Write([]byte("x")) // the session stands
		done := make(chan error, 1)
		once := false
		c.Trace = func(op string, _ uint32) {
			if op != "left.prod=" || once {
				return
			}
			once = true
			go func() {
				_, err := io.ReadFull(s, make([]byte, 8)) // 4 at once
				done <- err
			}()
			waitFor(t, func() bool { return c.Wanted(1) })
		}
		c.TryWrite([]byte("1234"))
		waitFor(t, func() bool { return !x.Pending() && c.Wanted(1) })
		c.TryWrite([]byte("5678"))
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestDeadlines(t *testing.T) {
	s, _, _, _ := pair(t, vchan.Options{LeftOrder: 10, RightOrder: 11})
	s.SetReadDeadline(time.Now().Add(-time.Second))
	_, err := s.Read(make([]byte, 1))
	var ne net.Error
	if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
		t.Errorf("Read: %v, want a timeout", err)
	}
	if n, err := s.Write(nil); n != 0 || err != nil {
		t.Errorf("empty Write: %d, %v", n, err)
	}
	s.SetReadDeadline(time.Time{})
	if n, err := s.Read(nil); n != 0 || err != nil {
		t.Errorf("empty Read: %d, %v", n, err)
	}
}

func TestAddr(t *testing.T) {
	s, _, l, _ := pair(t, vchan.Options{})
	for _, a := range []net.Addr{l.Addr(), s.LocalAddr(), s.RemoteAddr()} {
		if a.Network() != "vchan" || a.String() != "device-model/7/qmp-vchan" {
			t.Errorf("address %s %s", a.Network(), a)
		}
	}
}

func BenchmarkRoundTrip(b *testing.B) {
	s, c, _, _ := pair(b, vchan.Options{})
	s.SetDeadline(time.Time{})
	c.SetDeadline(time.Time{})
	request := []byte("{\"execute\":\"query-status\",\"id\":1}\r\n")
	go func() {
		p := make([]byte, 4096)
		for {
			n, err := s.Read(p)
			if err != nil {
				return
			}
			if _, err := s.Write(p[:n]); err != nil {
				return
			}
		}
	}()
	p := make([]byte, len(request))
	for b.Loop() {
		if _, err := c.Write(request); err != nil {
			b.Fatal(err)
		}
		if _, err := io.ReadFull(c, p); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkBulk(b *testing.B) {
	for _, o := range []vchan.Options{{LeftOrder: 10, RightOrder: 11}, {}} {
		b.Run(name(o), func(b *testing.B) {
			s, c, _, _ := pair(b, o)
			s.SetDeadline(time.Time{})
			c.SetDeadline(time.Time{})
			answer := make([]byte, 900<<10)
			b.SetBytes(int64(len(answer)))
			go func() {
				for {
					if _, err := s.Write(answer); err != nil {
						return
					}
				}
			}()
			p := make([]byte, 8192) // vchan-socket-proxy's buffer
			for b.Loop() {
				for n := 0; n < len(answer); n += len(p) {
					if _, err := io.ReadFull(c, p[:min(len(p), len(answer)-n)]); err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

func BenchmarkSession(b *testing.B) {
	l, x := listen(b, vchan.Options{})
	for b.Loop() {
		exchange(b, l, x, "greeting\r\n")
	}
}
