package qmpbridge

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/fdio/fdiotest"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 0, "minor": 0, "major": 10}, "package": ""}, "capabilities": ["oob"]}}`

// A bench is a bridge between a fake toolstack and a fake QEMU. Within synctest
// a goroutine that the bridge leaves behind fails the test.
type bench struct {
	t      testing.TB
	ln     *pipeListener
	qemus  chan net.Conn // what Dial has made, QEMU's ends
	log    *bytes.Buffer // read it after stop
	cancel context.CancelFunc
	done   chan error
}

type pipeListener struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}
func (l *pipeListener) Close() error   { l.once.Do(func() { close(l.closed) }); return nil }
func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "fake", Net: "unix"} }

// A wire connects the bridge with a peer, without a buffer: what the bridge writes counts as written when
// the peer has read it, and the bridge has seen that, and whatever else the peer does, when the peer's call returns.
type wire struct {
	mu       sync.Mutex
	cond     *sync.Cond
	notify   func()
	in, out  []byte // on their way to the bridge, to the peer
	taken    int    // of out, and the bridge does not know yet
	hung, up bool   // closed by the peer, by the bridge
	expired  map[*bool]*time.Timer
	rd, wr   bool // deadlines of the peer that have passed
}

// newWire gives the bridge's end, a Stream, and the peer's.
func newWire() (ours wireEnd, theirs net.Conn) {
	w := &wire{expired: make(map[*bool]*time.Timer)}
	w.cond = sync.NewCond(&w.mu)
	return wireEnd{w: w}, wirePeer{w: w}
}

func (w *wire) tell() {
	w.mu.Lock()
	notify := w.notify
	w.cond.Broadcast()
	w.mu.Unlock()
	if notify != nil {
		notify()
	}
}

type wireEnd struct {
	net.Conn // nil: only so that a net.Listener can give it
	w        *wire
}

func (e wireEnd) Notify(f func()) error {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.w.notify = f
	return nil
}

func (e wireEnd) TryRead(b []byte) (int, error) {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	n := copy(b, e.w.in)
	e.w.in = e.w.in[n:]
	e.w.cond.Broadcast()
	if n == 0 && e.w.hung {
		return 0, io.EOF
	}
	return n, nil
}

func (e wireEnd) TryWrite(b []byte) (int, error) {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	n := e.w.taken
	e.w.taken = 0
	switch {
	case n == 0 && e.w.hung:
		return 0, io.ErrClosedPipe
	case n == 0 && len(e.w.out) == 0:
		e.w.out = b
		e.w.cond.Broadcast()
	}
	return n, nil
}

func (e wireEnd) Expect() {}
func (e wireEnd) Linger() {}

func (e wireEnd) Close() error {
	e.w.mu.Lock()
	defer e.w.mu.Unlock()
	e.w.up = true
	e.w.cond.Broadcast()
	return nil
}

type wirePeer struct {
	net.Conn // nil
	w        *wire
}

func (p wirePeer) Read(b []byte) (int, error) {
	p.w.mu.Lock()
	for {
		switch {
		case p.w.hung:
			p.w.mu.Unlock()
			return 0, io.ErrClosedPipe
		case p.w.up:
			p.w.mu.Unlock()
			return 0, io.EOF
		case p.w.rd:
			p.w.mu.Unlock()
			return 0, os.ErrDeadlineExceeded
		case len(p.w.out) > 0:
			n := copy(b, p.w.out)
			p.w.out = p.w.out[n:]
			p.w.taken += n
			p.w.mu.Unlock()
			p.w.tell()
			return n, nil
		}
		p.w.cond.Wait()
	}
}

func (p wirePeer) Write(b []byte) (int, error) {
	p.w.mu.Lock()
	p.w.in = b
	p.w.mu.Unlock()
	p.w.tell()
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	for {
		switch {
		case p.w.hung || p.w.up && len(p.w.in) > 0:
			return len(b) - len(p.w.in), io.ErrClosedPipe
		case len(p.w.in) == 0:
			return len(b), nil
		case p.w.wr:
			return len(b) - len(p.w.in), os.ErrDeadlineExceeded
		}
		p.w.cond.Wait()
	}
}

func (p wirePeer) Close() error {
	p.w.mu.Lock()
	p.w.hung = true
	for _, timer := range p.w.expired {
		timer.Stop()
	}
	p.w.mu.Unlock()
	p.w.tell()
	return nil
}

func (p wirePeer) SetDeadline(t time.Time) error {
	p.set(&p.w.wr, t)
	return p.SetReadDeadline(t)
}

func (p wirePeer) SetReadDeadline(t time.Time) error {
	p.set(&p.w.rd, t)
	return nil
}

func (p wirePeer) set(passed *bool, t time.Time) {
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	if timer := p.w.expired[passed]; timer != nil {
		timer.Stop()
	}
	*passed = false
	p.w.expired[passed] = time.AfterFunc(time.Until(t), func() {
		p.w.mu.Lock()
		*passed = true
		p.w.cond.Broadcast()
		p.w.mu.Unlock()
	})
}

func newBench(t testing.TB, o Options) *bench {
	ctx, cancel := context.WithCancel(context.Background())
	b := &bench{
		t:  t,
		ln: &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})},
		// Like a listening socket's backlog: Dial does not wait for QEMU.
		qemus:  make(chan net.Conn, 16),
		log:    new(bytes.Buffer),
		cancel: cancel,
		done:   make(chan error, 1),
	}
	if o.Dial == nil {
		o.Dial = func(context.Context) (Monitor, error) {
			ours, qemus := newWire()
			b.qemus <- qemus
			return ours, nil
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	go func() { b.done <- Serve(ctx, b.ln, o) }()
	t.Cleanup(b.stop)
	return b
}

// stop ends the bridge and waits for it.
func (b *bench) stop() {
	b.cancel()
	if err := <-b.done; !errors.Is(err, context.Canceled) {
		b.t.Errorf("Serve: %v, want context.Canceled", err)
	}
	b.done <- context.Canceled
}

// A peer is one end of a connection. Its reads and writes have 60 s.
type peer struct {
	net.Conn
	t testing.TB
	r *bufio.Reader
}

func newPeer(t testing.TB, c net.Conn) *peer {
	c.SetDeadline(time.Now().Add(60 * time.Second))
	t.Cleanup(func() { c.Close() })
	return &peer{c, t, bufio.NewReader(c)}
}

func (b *bench) toolstack() *peer {
	ours, theirs := newWire()
	b.ln.conns <- ours
	return newPeer(b.t, theirs)
}

func (b *bench) qemu() *peer { return newPeer(b.t, <-b.qemus) }

// session gives a new session that has got its greeting.
func (b *bench) session() (toolstack, qemu *peer) {
	b.t.Helper()
	toolstack, qemu = b.toolstack(), b.qemu()
	qemu.send(greeting + "\r\n")
	toolstack.expect(greeting + "\r\n")
	return toolstack, qemu
}

func (p *peer) send(s string) {
	p.t.Helper()
	if _, err := io.WriteString(p, s); err != nil {
		p.t.Fatalf("send %.100q: %v", s, err)
	}
}

func (p *peer) expect(lines ...string) {
	p.t.Helper()
	for _, want := range lines {
		got, err := p.r.ReadString('\n')
		if err != nil {
			p.t.Fatalf("waiting for %.100q: got %.100q, %v", want, got, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			p.t.Fatalf("line (-want +got):\n%.2000s", d)
		}
	}
}

func (p *peer) expectClose() {
	p.t.Helper()
	if got, err := io.ReadAll(p.r); err != nil || len(got) > 0 {
		p.t.Fatalf("got %.100q, %v, want the connection closed", got, err)
	}
}

// silent checks that nothing comes while every other goroutine waits.
func (p *peer) silent() {
	p.t.Helper()
	p.SetReadDeadline(time.Now().Add(time.Millisecond))
	if got, err := p.r.Peek(1); !errors.Is(err, os.ErrDeadlineExceeded) {
		p.t.Fatalf("got %q, %v, want nothing yet", got, err)
	}
	p.SetReadDeadline(time.Now().Add(60 * time.Second))
}

// in runs f with a bench in a bubble.
func in(t *testing.T, o Options, f func(*testing.T, *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newBench(t, o)) })
}

func TestConversation(t *testing.T) {
	type step struct {
		from string // "toolstack" or "qemu" sends, "to qemu" and "to toolstack" are expected
		text string
	}
	const send, qemuGets, qemuSends, gets = "toolstack", "to qemu", "qemu", "to toolstack"
	huge := `{"return": "` + strings.Repeat("x", MaxAnswer) + `", "id": "big"}`
	fits := func(n int) string { return `{"return": "` + strings.Repeat("x", n-len(`{"return": ""}`)) + `"}` }
	for _, tt := range []struct {
		name  string
		steps []step
		close bool // the bridge ends the session then
		log   string
	}{
		{"libxl", []step{
			{send, "{\"execute\":\"qmp_capabilities\",\"id\":1}\r\n"}, {qemuGets, "{\"execute\":\"qmp_capabilities\",\"id\":1}\n"},
			{qemuSends, "{\"return\": {}, \"id\": 1}\r\n"}, {gets, "{\"return\": {}, \"id\": 1}\r\n"},
		}, false, `cause="the toolstack closed the session" answers=1 "events dropped"=0`},
		{"no line end", []step{{send, `{"execute":"stop"}`}, {qemuGets, "{\"execute\":\"stop\"}\n"}, {qemuSends, "{\"return\": {}}\n"}, {gets, "{\"return\": {}}\r\n"}}, false, ""},
		{"pretty requests", []step{{send, "{ \"execute\":\n\t\"stop\" }\n{\r\n}"}, {qemuGets, "{ \"execute\":\n"}, {qemuGets, "\t\"stop\" }\n"}, {qemuGets, "{\r\n"}, {qemuGets, "}\n"}}, false, ""},
		{"in pieces", []step{{send, `{"exec`}, {send, `ute":"stop`}, {send, `"`}, {send, `}`}, {qemuGets, "{\"execute\":\"stop\"}\n"}}, false, ""},
		{"pretty answers", []step{{send, `{"execute":"stop"}`}, {qemuGets, "{\"execute\":\"stop\"}\n"},
			{qemuSends, "{\n    \"return\": {\n    }\n}\r\n"}, {gets, "{     \"return\": {     } }\r\n"}}, false, ""},
		{"events are dropped", []step{
			{qemuSends, "{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n{\"event\": \"RESUME\", \"data\": {\"return\": 1}}\r\n"},
			{send, `{"execute":"stop"}`}, {qemuGets, "{\"execute\":\"stop\"}\n"},
			{qemuSends, "{\"return\": {\"event\": 1}}\r\n"}, {gets, "{\"return\": {\"event\": 1}}\r\n"},
		}, false, `"events dropped"=2`},
		{"answer of the largest size", []step{{send, `{}`}, {qemuGets, "{}\n"},
			{qemuSends, fits(MaxAnswer-2) + "\r\n"}, {gets, fits(MaxAnswer-2) + "\r\n"}}, false, ""},
		{"answer over it by one", []step{{send, `{"id":[1, 2.50]}`}, {qemuGets, "{\"id\":[1, 2.50]}\n"},
			{qemuSends, strings.Replace(fits(MaxAnswer-1-len(`, "id": [1, 2.5]`)), "}", `, "id": [1, 2.5]}`, 1) + "\r\n"},
			{gets, "{\"id\": [1, 2.50], \"error\": {\"class\":\"GenericError\",\"desc\":\": QEMU's answer has 1040383 bytes, the toolstack takes 1040382\"}}\r\n"}}, false, ""},
		{"answer far over it", []step{{send, `{"execute":"query-qmp-schema","id":"big"}`}, {qemuGets, "{\"execute\":\"query-qmp-schema\",\"id\":\"big\"}\n"},
			{qemuSends, huge + "\r\n"},
			{gets, fmt.Sprintf("{\"id\": \"big\", \"error\": {\"class\":\"GenericError\",\"desc\":\"query-qmp-schema: QEMU's answer has %d bytes, the toolstack takes 1040382\"}}\r\n", len(huge))},
			{send, `{}`}, {qemuGets, "{}\n"}, {qemuSends, "{\"return\": {}}\n"}, {gets, "{\"return\": {}}\r\n"}}, false, ""},
		{"large event", []step{{qemuSends, `{"event": "X", "data": "` + strings.Repeat("x", MaxAnswer) + `"}`},
			{send, `{}`}, {qemuGets, "{}\n"}, {qemuSends, "{\"return\": {}}\n"}, {gets, "{\"return\": {}}\r\n"}}, false, `"events dropped"=1`},
		{"ids as QEMU writes them", []step{{send, `{"id":"\u00e9"}{"id":{"b":1,"a":2.0}}`}, {qemuGets, "{\"id\":\"\\u00e9\"}\n"}, {qemuGets, "{\"id\":{\"b\":1,\"a\":2.0}}\n"},
			{qemuSends, `{"return": {}, "id": "é"}{"error": {"class": "GenericError", "desc": "x"}, "id": {"a": 2, "b": 1}}`},
			{gets, "{\"return\": {}, \"id\": \"é\"}\r\n"}, {gets, "{\"error\": {\"class\": \"GenericError\", \"desc\": \"x\"}, \"id\": {\"a\": 2, \"b\": 1}}\r\n"}}, false, ""},
		{"error of QEMU's parser", []step{{send, `{"id":"\u0000"}`}, {qemuGets, "{\"id\":\"\\u0000\"}\n"}, {qemuSends, `{"error": {}}`}, {gets, "{\"error\": {}}\r\n"}}, false, ""},
		{"out of band", []step{{send, `{"execute":"a","id":1}{"exec-oob":"b","id":2}`},
			{qemuGets, "{\"execute\":\"a\",\"id\":1}\n"}, {qemuGets, "{\"exec-oob\":\"b\",\"id\":2}\n"},
			{qemuSends, `{"return": 2, "id": 2}{"return": 1, "id": 1}`}, {gets, "{\"return\": 2, \"id\": 2}\r\n"}, {gets, "{\"return\": 1, \"id\": 1}\r\n"}}, false, ""},
		{"garbage from the toolstack", []step{{send, "{\"execute\":\"a\"}\r\n{\"id\":3,\"execute\":stop}\r\n{}\r\n"}, {qemuGets, "{\"execute\":\"a\"}\n"},
			{qemuSends, `{"return": {}}`}, {gets, "{\"return\": {}}\r\n"},
			{gets, "{\"id\": 3, \"error\": {\"class\":\"GenericError\",\"desc\":\"JSON parse error, unexpected byte \\\"s\\\" at offset 18\"}}\r\n"}},
			true, "the toolstack sent what is not QMP: JSON parse error"},
		{"not JSON from QEMU", []step{{qemuSends, "qemu: warning\n"}}, true, "QEMU sent what is not QMP: JSON parse error"},
		{"no QMP from QEMU", []step{{qemuSends, `{"a":1}`}}, true, "QEMU sent what is not QMP"},
		{"answer and error at once", []step{{qemuSends, `{"return":1,"error":{}}`}}, true, "QEMU sent what is not QMP"},
		{"answer to nothing", []step{{qemuSends, `{"return":1}`}}, true, "QEMU answered a request that it did not get"},
		{"answer to another id", []step{{send, `{"id":1}`}, {qemuGets, "{\"id\":1}\n"}, {qemuSends, `{"return":1,"id":2}`}}, true, "QEMU answered request"},
		{"answer without the id", []step{{send, `{"id":1}`}, {qemuGets, "{\"id\":1}\n"}, {qemuSends, `{"return":1}`}}, true, "QEMU answered request"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in(t, Options{}, func(t *testing.T, b *bench) {
				toolstack, qemu := b.session()
				for _, s := range tt.steps {
					switch s.from {
					case send:
						toolstack.send(s.text)
					case qemuGets:
						qemu.expect(s.text)
					case qemuSends:
						qemu.send(s.text)
					case gets:
						toolstack.expect(s.text)
					}
				}
				if tt.close {
					toolstack.expectClose()
					qemu.expectClose()
				}
				toolstack.Close()
				synctest.Wait()
				b.stop()
				if !strings.Contains(b.log.String(), tt.log) {
					t.Errorf("log has no %q:\n%s", tt.log, b.log)
				}
			})
		})
	}
}

func TestErrorLine(t *testing.T) {
	for _, tt := range []struct{ id, desc, want string }{
		{"", "x", "{\"error\": {\"class\":\"GenericError\",\"desc\":\"x\"}}\r\n"},
		{"null", "a \"quote\"\n\xff", "{\"id\": null, \"error\": {\"class\":\"GenericError\",\"desc\":\"a \\\"quote\\\"\\n\\ufffd\"}}\r\n"},
		{`"` + strings.Repeat("i", MaxAnswer) + `"`, "x", "{\"error\": {\"class\":\"GenericError\",\"desc\":\"x\"}}\r\n"},
	} {
		var id []byte
		if tt.id != "" {
			id = []byte(tt.id)
		}
		if d := cmp.Diff(tt.want, string(errorLine(id, tt.desc))); d != "" {
			t.Errorf("(-want +got):\n%s", d)
		}
	}
}

func TestQEMUComesLate(t *testing.T) {
	in(t, Options{}, func(t *testing.T, b *bench) {
		toolstack, qemu := b.toolstack(), b.qemu()
		time.Sleep(25 * time.Second) // of the bubble
		toolstack.silent()
		toolstack.send(`{"execute":"qmp_capabilities"}`)
		qemu.send(greeting)
		toolstack.expect(greeting + "\r\n")
		qemu.expect("{\"execute\":\"qmp_capabilities\"}\n")
	})
}

func TestQEMUGone(t *testing.T) {
	const gone = `"error": {"class":"GenericError","desc":"%s: QEMU closed its monitor"}}` + "\r\n"
	in(t, Options{}, func(t *testing.T, b *bench) {
		toolstack, qemu := b.session()
		toolstack.send(`{"execute":"stop","id":"a"}{"execute":"cont"}`)
		qemu.expect("{\"execute\":\"stop\",\"id\":\"a\"}\n", "{\"execute\":\"cont\"}\n")
		start := time.Now()
		qemu.Close()
		toolstack.expect(fmt.Sprintf(`{"id": "a", `+gone, "stop"), fmt.Sprintf("{"+gone, "cont"))
		if took := time.Since(start); took > 0 {
			t.Errorf("took %v", took)
		}
		// The toolstack has time to read them before the connection ends: libxl looks for that first.
		toolstack.silent()
		toolstack.expectClose()
		if took := time.Since(start); took != drainLimit {
			t.Errorf("closed after %v, want %v", took, drainLimit)
		}

		// Without anything to tell it ends at once, and when the toolstack closes.
		_, qemu = b.session()
		qemu.Close()
		toolstack, qemu = b.session()
		toolstack.send(`{"execute":"stop"}`)
		qemu.expect("{\"execute\":\"stop\"}\n")
		qemu.Close()
		toolstack.expect(fmt.Sprintf("{"+gone, "stop"))
		start = time.Now()
		toolstack.Close()
		b.toolstack().Close()
		(<-b.qemus).Close()
		if took := time.Since(start); took > 0 {
			t.Errorf("the next session came after %v", took)
		}

		// A toolstack that does not read gets its time, and no more.
		toolstack, qemu = b.session()
		toolstack.send(`{"execute":"stop"}`)
		qemu.expect("{\"execute\":\"stop\"}\n")
		start = time.Now()
		qemu.Close()
		next := b.toolstack() // accepted when the last one is over
		if took := time.Since(start); took != drainLimit {
			t.Errorf("took %v, want %v", took, drainLimit)
		}
		next.Close()
	})
}

func TestNoQEMU(t *testing.T) {
	in(t, Options{Dial: func(context.Context) (Monitor, error) { return nil, errors.New("connection refused") }}, func(t *testing.T, b *bench) {
		b.toolstack().expectClose()
		b.toolstack().expectClose()
		b.stop()
		if want := `level=WARN msg="QMP session refused: QEMU's monitor cannot be reached" session=2 err="connection refused"`; !strings.Contains(b.log.String(), want) {
			t.Errorf("log has no %q:\n%s", want, b.log)
		}
	})
}

func TestReconnect(t *testing.T) {
	in(t, Options{}, func(t *testing.T, b *bench) {
		for range 50 {
			toolstack, qemu := b.session()
			toolstack.send(`{"execute":"a"}`)
			qemu.expect("{\"execute\":\"a\"}\n")
			toolstack.Close()
			qemu.send(`{"return": "nobody reads this"}`)
			qemu.expectClose()
		}
	})
}

// QEMU would give a late answer, or a late greeting, to the next session.
func TestCloseWaitsForQEMU(t *testing.T) {
	in(t, Options{}, func(t *testing.T, b *bench) {
		toolstack, qemu := b.session()
		toolstack.send(`{"execute":"a"}{"execute":"b"}`)
		qemu.expect("{\"execute\":\"a\"}\n", "{\"execute\":\"b\"}\n")
		toolstack.Close()
		qemu.send(`{"return": 1}`)
		qemu.silent()
		if b.over() {
			t.Error("the session is over with an answer on the way")
		}
		qemu.send(`{"event": "STOP"}{"return": 2}`)
		qemu.expectClose()

		toolstack, qemu = b.session()
		toolstack.send(`{"execute":"a"}`)
		qemu.expect("{\"execute\":\"a\"}\n")
		toolstack.Close()
		start := time.Now()
		qemu.expectClose()
		if took := time.Since(start); took != answerLimit {
			t.Errorf("waited %v for an answer, want %v", took, answerLimit)
		}

		toolstack, qemu = b.toolstack(), b.qemu()
		toolstack.Close()
		time.Sleep(10 * answerLimit)
		qemu.silent()
		if b.over() {
			t.Error("the session is over without QEMU's greeting")
		}
		qemu.send(greeting)
		qemu.expectClose()

		toolstack, qemu = b.toolstack(), b.qemu()
		toolstack.Close()
		synctest.Wait()
		b.stop() // ends that too
		qemu.expectClose()
		if want := "QEMU has not answered; the next session may get an answer that is not its own, and end"; strings.Count(b.log.String(), want) != 1 {
			t.Errorf("log has not once %q:\n%s", want, b.log)
		}
	})
}

func TestServeErrors(t *testing.T) {
	if err := Serve(t.Context(), &pipeListener{}, Options{}); err == nil {
		t.Error("no Dial: no error")
	}
	ln := &pipeListener{closed: make(chan struct{})}
	ln.Close()
	err := Serve(t.Context(), ln, Options{Dial: func(context.Context) (Monitor, error) { return nil, nil }})
	if !errors.Is(err, net.ErrClosed) {
		t.Errorf("listener closed: %v", err)
	}
}

func TestServeEndsASession(t *testing.T) {
	in(t, Options{}, func(t *testing.T, b *bench) {
		toolstack, qemu := b.session()
		b.cancel()
		toolstack.expectClose()
		qemu.expectClose()
	})
}

// QEMU is read even if the toolstack never reads, and the session ends when too
// much waits.
func TestStalledToolstack(t *testing.T) {
	in(t, Options{}, func(t *testing.T, b *bench) {
		toolstack, qemu := b.session()
		answer := `{"return": "` + strings.Repeat("x", 100<<10) + `"}` + "\r\n"
		sent := 0
		for sent < maxQueued+3*len(answer) {
			toolstack.send(`{}`)
			qemu.expect("{}\n")
			if _, err := io.WriteString(qemu, answer); err != nil {
				break
			}
			sent += len(answer)
			synctest.Wait()
			if b.over() {
				break
			}
		}
		if sent < maxQueued-len(answer) || sent > maxQueued+2*len(answer) {
			t.Errorf("ended after %d bytes, want about %d", sent, maxQueued)
		}
		qemu.expectClose()
		b.stop()
		if want := "the toolstack has not read 2080768 bytes of answers"; !strings.Contains(b.log.String(), want) {
			t.Errorf("log has no %q:\n%s", want, b.log)
		}
	})
}

// over says that the bridge's session has ended: it accepts the next.
func (b *bench) over() bool {
	ours, theirs := newWire()
	select {
	case b.ln.conns <- ours:
		theirs.Close()
		return true
	default:
		ours.Close()
		return false
	}
}

// Large answers that wait for the toolstack each keep the buffer they were read into.
func TestLargeAnswersWait(t *testing.T) {
	const answers, size = 8, 200 << 10
	in(t, Options{}, func(t *testing.T, b *bench) {
		toolstack, qemu := b.session()
		var want []string
		for i := range answers {
			want = append(want, fmt.Sprintf("{\"return\": %q, \"id\": %d}\r\n", strings.Repeat(string(rune('a'+i)), size), i))
		}
		for round := range 3 { // buffers are used again
			for i := range answers {
				toolstack.send(fmt.Sprintf("{\"execute\": \"x\", \"id\": %d}\n", i))
				qemu.expect(fmt.Sprintf("{\"execute\": \"x\", \"id\": %d}\n", i))
			}
			for i := range answers {
				qemu.send(want[i])
			}
			for i := range answers {
				toolstack.expect(want[i])
			}
			if t.Failed() {
				t.Fatalf("in round %d", round)
			}
		}
	})
}

// The toolstack is read even if QEMU never reads.
func TestStalledQEMU(t *testing.T) {
	in(t, Options{}, func(t *testing.T, b *bench) {
		toolstack, _ := b.session()
		request := `{"execute":"` + strings.Repeat("x", 1<<20) + `"}`
		sent := 0
		for ; sent < 40; sent++ {
			if _, err := io.WriteString(toolstack, request); err != nil {
				break
			}
		}
		if sent < 15 || sent > 18 {
			t.Errorf("%d MiB were taken, want about 16", sent)
		}
		b.stop()
		if want := "more than 16777216 bytes of requests wait for QEMU"; !strings.Contains(b.log.String(), want) {
			t.Errorf("log has no %q:\n%s", want, b.log)
		}
	})
}

func TestNoAnswers(t *testing.T) {
	in(t, Options{}, func(t *testing.T, b *bench) {
		toolstack, qemu := b.session()
		request := `{"id":"` + strings.Repeat("x", 100<<10) + `"}`
		sent := 0
		for ; sent < 100; sent++ {
			toolstack.send(request)
			if _, err := qemu.r.ReadString('\n'); err != nil {
				break
			}
		}
		if want := maxUnanswered / (100 << 10); sent != want {
			t.Errorf("%d requests were taken, want %d", sent, want)
		}
		toolstack.expectClose()
	})
}

// Requests of the largest size, 100 MiB and more in all, need no more than a few of them at a time.
func TestMemory(t *testing.T) {
	checkGoroutines(t)
	b := newBench(t, Options{})
	toolstack, qemu := b.session()
	go func() {
		buf := make([]byte, 64<<10)
		for range 7 {
			for rest := MaxRequest + 1; rest > 0; {
				n, err := qemu.r.Read(buf[:min(rest, len(buf))])
				if err != nil {
					return
				}
				rest -= n
			}
			io.WriteString(qemu, "{\"event\": \"STOP\"}\r\n{\"return\": {}}\r\n")
		}
	}()
	head, tail := `{"execute":"`, `"}`
	request := []byte(head + strings.Repeat("x", MaxRequest-len(head)-len(tail)) + tail)
	var peak uint64
	for range 7 {
		toolstack.send(string(request[:1000]))
		if _, err := toolstack.Write(request[1000:]); err != nil {
			t.Fatal(err)
		}
		toolstack.expect("{\"return\": {}}\r\n")
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		peak = max(peak, m.HeapAlloc)
	}
	if peak > 4*MaxRequest {
		t.Errorf("%d bytes in use", peak)
	}
}

// checkGoroutines fails the test if goroutines of this package are left after it.
func checkGoroutines(t testing.TB) {
	t.Cleanup(func() {
		var stacks string
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); runtime.Gosched() {
			buf := make([]byte, 1<<20)
			stacks = string(buf[:runtime.Stack(buf, true)])
			if !strings.Contains(stacks, "qmpbridge.(*session)") && !strings.Contains(stacks, "qmpbridge.Serve") {
				return
			}
		}
		t.Errorf("goroutines left:\n%s", stacks)
	})
}

// unixPair gives two connected sockets, the bridge's end watched by p.
func unixPair(t testing.TB, p *fdio.Poller) (ours *streamConn, theirs net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fds[1]), "pair")
	defer f.Close()
	if theirs, err = net.FileConn(f); err != nil {
		t.Fatal(err)
	}
	c, err := fdio.NewConn(p, fds[0], "pair")
	if err != nil {
		t.Fatal(err)
	}
	return &streamConn{fd: c}, theirs
}

// A streamConn is a Stream that a net.Listener can give.
type streamConn struct {
	net.Conn // nil
	fd       *fdio.Conn
}

func (c *streamConn) TryRead(b []byte) (int, error)  { return c.fd.TryRead(b) }
func (c *streamConn) TryWrite(b []byte) (int, error) { return c.fd.TryWrite(b) }
func (c *streamConn) Notify(f func()) error          { return c.fd.Notify(f) }
func (c *streamConn) Expect()                        { c.fd.Expect() }
func (c *streamConn) Linger()                        { c.fd.Linger() }
func (c *streamConn) Close() error                   { return c.fd.Close() }

func BenchmarkRoundTrip(b *testing.B) {
	for _, size := range []int{2, 900 << 10} {
		b.Run(fmt.Sprintf("answer=%d", size), func(b *testing.B) {
			checkGoroutines(b)
			poller := fdiotest.NewPoller(b)
			ours, q := unixPair(b, poller)
			bn := newBench(b, Options{
				Dial: func(context.Context) (Monitor, error) { return ours, nil },
				Log:  slog.New(slog.DiscardHandler),
			})
			conn, c := unixPair(b, poller)
			bn.ln.conns <- conn
			toolstack, qemu := newPeer(b, c), newPeer(b, q)
			answer := []byte(`{"return": "` + strings.Repeat("x", size) + `", "id": 1}` + "\r\n")
			go func() {
				for {
					if _, err := qemu.r.ReadSlice('\n'); err != nil {
						return
					}
					if _, err := qemu.Write(answer); err != nil {
						return
					}
				}
			}()
			b.SetBytes(int64(len(answer)))
			b.ReportAllocs()
			got := make([]byte, len(answer))
			for b.Loop() {
				toolstack.send("{\"execute\":\"query-status\",\"id\":1}\r\n")
				if _, err := io.ReadFull(toolstack.r, got); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
