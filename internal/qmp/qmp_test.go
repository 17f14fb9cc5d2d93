package qmp_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/qmp"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}`

// fake is the QEMU end of a connection. Its tests run in a synctest bubble, where a goroutine that is left over, or a wait that nothing ends, is a failure.
type fake struct {
	t    *testing.T
	conn net.Conn
	in   *bufio.Reader
}

type request struct {
	Execute   string
	Arguments json.RawMessage
	ID        string
}

func pipe(t *testing.T) (*qmp.Monitor, *fake) {
	ours, theirs := net.Pipe()
	f := &fake{t: t, conn: theirs, in: bufio.NewReader(theirs)}
	m := qmp.New(ours)
	t.Cleanup(func() {
		theirs.Close()
		if err := m.Disconnect(); err != nil {
			t.Errorf("Disconnect: %v", err)
		}
	})
	return m, f
}

// connected returns a Monitor after its Connect.
func connected(t *testing.T) (*qmp.Monitor, *fake) {
	m, f := pipe(t)
	go func() {
		f.send(greeting)
		if r := f.read(); r.Execute != "qmp_capabilities" {
			t.Errorf("first command is %q", r.Execute)
		} else {
			f.answer(r, `{}`)
		}
	}()
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	return m, f
}

func (f *fake) send(line string) {
	if _, err := f.conn.Write([]byte(line + "\r\n")); err != nil {
		f.t.Errorf("fake QEMU writes: %v", err)
	}
}

func (f *fake) answer(r request, value string) {
	f.send(fmt.Sprintf(`{"return": %s, "id": %q}`, value, r.ID))
}

func (f *fake) read() request {
	var r request
	line, err := f.in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil {
		f.t.Errorf("fake QEMU reads %q: %v", line, err)
	}
	return r
}

func event(n int) string {
	return fmt.Sprintf(`{"timestamp": {"seconds": 7, "microseconds": 8}, "event": "E", "data": {"n": %d}}`, n)
}

func contains(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not say %q", err, p)
		}
	}
}

func TestConnect(t *testing.T) {
	refuse := func(f *fake) {
		f.send(greeting)
		f.send(fmt.Sprintf(`{"error": {"class": "CommandNotFound", "desc": "no"}, "id": %q}`, f.read().ID))
	}
	tests := []struct {
		name string
		fake func(*fake)
		want string
		is   error
	}{
		{"answer before greeting", func(f *fake) { f.send(`{"return": {}}`) }, `no greeting: QEMU's first line is "{\"return\": {}}"`, qmp.ErrClosed},
		{"garbage", func(f *fake) { f.send("\x01QEMU") }, `line from QEMU is not QMP: "\x01QEMU"`, qmp.ErrClosed},
		{"half a line", func(f *fake) { io.WriteString(f.conn, greeting[:40]); f.conn.Close() }, "in the middle of a line", io.ErrUnexpectedEOF},
		{"close", func(f *fake) { f.conn.Close() }, "connection closed: EOF", io.EOF},
		{"silence", func(f *fake) {}, "no greeting from QEMU", context.DeadlineExceeded},
		{"no answer", func(f *fake) { f.send(greeting); f.read() }, "qmp_capabilities: no answer", context.DeadlineExceeded},
		{"refusal", refuse, "CommandNotFound: no", nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, f := pipe(t)
				go tt.fake(f)
				err := m.Connect()
				contains(t, err, "qmp ", tt.want)
				if tt.is != nil && !errors.Is(err, tt.is) {
					t.Errorf("error %q is not %v", err, tt.is)
				}
				if _, err := m.Execute(t.Context(), "stop", nil); !errors.Is(err, qmp.ErrClosed) {
					t.Errorf("Execute after a failed Connect: %v", err)
				}
			})
		})
	}
}

func TestConnectOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := pipe(t)
		_, err := m.Execute(t.Context(), "stop", nil)
		contains(t, err, "call Connect first")
		m, _ = connected(t)
		if got := m.Version(); got.String() != "10.0.2" || got.Package != "Debian" {
			t.Errorf("version is %+v", got)
		}
		contains(t, m.Connect(), "already connected")
	})
}

func TestExecute(t *testing.T) {
	type result struct {
		Value string
		Error *qmp.Error
	}
	tests := []struct {
		name    string
		args    any
		answers []string // $ID is the command's
		sent    string   // arguments
		want    result
		stray   uint64
	}{
		{name: "return", answers: []string{`{"return": {"a": [1, "<"]}, "id": "$ID"}`}, want: result{Value: `{"a": [1, "<"]}`}},
		{name: "null", answers: []string{`{"return": null, "id": "$ID"}`}, want: result{Value: `null`}},
		{name: "arguments", args: map[string]any{"id": "a,\"<\n"}, sent: `{"id":"a,\"\u003c\n"}`, answers: []string{`{"return": {}, "id": "$ID"}`}, want: result{Value: `{}`}},
		{name: "error", answers: []string{`{"error": {"class": "DeviceNotFound", "desc": "no x"}, "id": "$ID"}`}, want: result{Error: &qmp.Error{Class: "DeviceNotFound", Desc: "no x"}}},
		{name: "no id", answers: []string{`{"error": {"class": "GenericError", "desc": "JSON parse error"}}`}, want: result{Error: &qmp.Error{Class: "GenericError", Desc: "JSON parse error"}}},
		{name: "unknown ids", answers: []string{`{"return": 1, "id": "stubinit-0"}`, `{"return": 2, "id": 7}`, `{"return": 3, "id": "$ID"}`}, want: result{Value: `3`}, stray: 2},
		{name: "events and blank lines between", answers: []string{event(1), "", " ", event(2), `{"return": 4, "id": "$ID"}`}, want: result{Value: `4`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, f := connected(t)
				go func() {
					r := f.read()
					if r.Execute != "cmd" || string(r.Arguments) != tt.sent {
						t.Errorf("QEMU got %+v, arguments %s", r, r.Arguments)
					}
					for _, a := range tt.answers {
						f.send(strings.ReplaceAll(a, "$ID", r.ID))
					}
				}()
				value, err := m.Execute(t.Context(), "cmd", tt.args)
				got := result{Value: string(value)}
				if err != nil && !errors.As(err, &got.Error) {
					t.Fatal(err)
				}
				if diff := cmp.Diff(tt.want, got); diff != "" {
					t.Error(diff)
				}
				if err != nil {
					contains(t, err, "qmp cmd: ", tt.want.Error.Desc)
				}
				if got := m.Stats(); got != (qmp.Stats{StrayReplies: tt.stray}) {
					t.Errorf("stats are %+v", got)
				}
			})
		})
	}
}

// TestConnectionEnds has two commands wait while QEMU misbehaves: both must learn why.
func TestConnectionEnds(t *testing.T) {
	tests := []struct {
		name string
		fake func(*fake)
		want string
	}{
		{"garbage", func(f *fake) { f.send(`{"return": `) }, `line from QEMU is not QMP: "{\"return\":"`},
		{"not an object", func(f *fake) { f.send(`[]`) }, "line from QEMU is not QMP"},
		{"neither answer nor event", func(f *fake) { f.send(`{}`) }, "neither answer nor event"},
		{"event of a wrong shape", func(f *fake) { f.send(`{"event": "E", "data": 1}`) }, "is not QMP"},
		{"no id", func(f *fake) { f.send(`{"return": {}}`) }, "answer without id while 2 commands wait"},
		{"half a line", func(f *fake) { io.WriteString(f.conn, `{"ret`); f.conn.Close() }, "unexpected EOF in the middle of a line"},
		{"close", func(f *fake) { f.conn.Close() }, "connection closed: EOF"},
		{"endless line", func(f *fake) {
			for f.conn.SetDeadline(time.Now().Add(time.Second)) == nil {
				if _, err := f.conn.Write(make([]byte, 1<<20)); err != nil {
					return
				}
			}
		}, "longer than 16777216 bytes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, f := connected(t)
				events, err := m.Events(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				var waiting sync.WaitGroup
				for range 2 {
					waiting.Go(func() {
						_, err := m.Execute(t.Context(), "cmd", nil)
						contains(t, err, "qmp cmd: connection closed: ", tt.want)
						if !errors.Is(err, qmp.ErrClosed) {
							t.Errorf("error %q is not ErrClosed", err)
						}
					})
				}
				f.read()
				f.read()
				tt.fake(f)
				waiting.Wait()
				for e := range events {
					t.Errorf("event %+v", e)
				}
				contains(t, m.Err(), tt.want)
				_, err = m.Events(t.Context())
				contains(t, err, tt.want)
			})
		})
	}
}

func TestLongestLine(t *testing.T) {
	for _, extra := range []int{0, 1} {
		synctest.Test(t, func(t *testing.T) {
			m, f := connected(t)
			go func() {
				r := f.read()
				head, tail := `{"return": "`, fmt.Sprintf(`", "id": %q}`+"\r\n", r.ID)
				io.WriteString(f.conn, head+strings.Repeat("x", qmp.MaxLine-len(head)-len(tail)+extra)+tail)
			}()
			value, err := m.Execute(t.Context(), "cmd", nil)
			switch {
			case extra == 0 && (err != nil || len(value) < qmp.MaxLine-100):
				t.Errorf("line of %d bytes: %d bytes, %v", qmp.MaxLine, len(value), err)
			case extra > 0 && !errors.Is(err, qmp.ErrClosed):
				t.Errorf("line of %d bytes: %v", qmp.MaxLine+extra, err)
			}
		})
	}
}

func TestLateReplyIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f := connected(t)
		go func() {
			late, next := f.read(), f.read()
			f.answer(late, `"late"`)
			time.Sleep(time.Hour) // of the bubble: a slow QEMU
			f.answer(next, `"mine"`)
		}()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := m.Execute(ctx, "slow", nil)
		contains(t, err, "qmp slow: no answer")
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v", err)
		}
		value, err := m.Execute(t.Context(), "next", nil)
		if err != nil || string(value) != `"mine"` {
			t.Errorf("next command got %s, %v", value, err)
		}
	})
}

// TestQEMUDoesNotRead: a command that did not go out harms nothing, half a command ends the connection.
func TestQEMUDoesNotRead(t *testing.T) {
	for _, taken := range []int{0, 5} {
		synctest.Test(t, func(t *testing.T) {
			m, f := connected(t)
			go io.ReadFull(f.conn, make([]byte, taken))
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			_, err := m.Execute(ctx, "cmd", nil)
			contains(t, err, "qmp cmd: not sent")
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("error is %v", err)
			}
			if taken > 0 {
				contains(t, m.Err(), "after 5 of ", " bytes of a command")
				return
			}
			go func() { f.answer(f.read(), `1`) }()
			if _, err := m.Execute(t.Context(), "cmd", nil); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestUnansweredCommandsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f := connected(t)
		go io.Copy(io.Discard, f.conn)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var waiting sync.WaitGroup
		for range qmp.MaxUnanswered {
			waiting.Go(func() {
				if _, err := m.Execute(ctx, "cmd", nil); !errors.Is(err, context.DeadlineExceeded) {
					t.Error(err)
				}
			})
		}
		waiting.Wait()
		_, err := m.Execute(t.Context(), "one more", nil)
		contains(t, err, "QEMU has not answered 1024 commands")
	})
}

func TestRun(t *testing.T) {
	tests := []struct{ name, command, sent, answer, want, err string }{
		{"plain", `{"execute": "stop"}`, `{"execute":"stop","id":"$ID"}`, `{"return": {}, "id": "$ID"}`, `{"return": {}}`, ""},
		{"own id", "{\"execute\": \"stop\",\n \"id\": [1]}", `{"execute":"stop","id":"$ID"}`, `{"id": "$ID", "return": 5}`, `{"return": 5, "id": [1]}`, ""},
		{"arguments", `{"arguments": {"x": 1.50}, "execute": "a"}`, `{"arguments":{"x":1.50},"execute":"a","id":"$ID"}`, `{"return": "<", "id": "$ID"}`, `{"return": "<"}`, ""},
		{"error", `{"execute": "a"}`, `{"execute":"a","id":"$ID"}`, `{"error": {"class": "GenericError", "desc": "bad"}, "id": "$ID"}`, "", "qmp a: bad"},
		{"no object", `[]`, "", "", "", "command is not a JSON object"},
		{"no name", `{"exec": 1}`, "", "", "", `command has no "execute"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, f := connected(t)
				if tt.sent != "" {
					go func() {
						line, _ := f.in.ReadString('\n')
						var r request
						if err := json.Unmarshal([]byte(line), &r); err != nil {
							t.Errorf("QEMU got %q: %v", line, err)
						}
						if want := strings.ReplaceAll(tt.sent, "$ID", r.ID) + "\n"; line != want {
							t.Errorf("QEMU got %q, want %q", line, want)
						}
						f.send(strings.ReplaceAll(tt.answer, "$ID", r.ID))
					}()
				}
				got, err := m.Run([]byte(tt.command))
				if string(got) != tt.want {
					t.Errorf("answer is %s, want %s", got, tt.want)
				}
				if tt.err != "" {
					contains(t, err, tt.err)
				} else if err != nil {
					t.Error(err)
				}
			})
		})
	}
}

func TestExecuteArguments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := connected(t)
		for _, args := range []any{1, []int{}, map[string]any(nil), func() {}} {
			_, err := m.Execute(t.Context(), "cmd", args)
			contains(t, err, "qmp cmd: arguments: ")
		}
	})
}

// TestManyCommands has answers come in any order.
func TestManyCommands(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f := connected(t)
		const n = 200
		go func() {
			requests := make([]request, n)
			for i := range requests {
				requests[i] = f.read()
			}
			for _, i := range rand.Perm(n) {
				f.send(event(i))
				f.answer(requests[i], string(requests[i].Arguments))
			}
		}()
		var waiting sync.WaitGroup
		for i := range n {
			waiting.Go(func() {
				want := fmt.Sprintf(`{"n":%d}`, i)
				if value, err := m.Execute(t.Context(), "echo", map[string]int{"n": i}); err != nil || string(value) != want {
					t.Errorf("got %s, %v, want %s", value, err, want)
				}
			})
		}
		waiting.Wait()
	})
}

// TestRunInEventLoop is where go-qemu's monitor deadlocks: a burst of events comes before the answer to a command that the reader of events runs.
func TestRunInEventLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f := connected(t)
		events, err := m.Events(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		const bursts, size = 20, 50
		go func() {
			n := 0
			for burst := range bursts {
				if burst > 0 {
					f.answer(f.read(), `{}`)
				}
				for range size {
					f.send(event(n))
					n++
				}
			}
			f.conn.Close()
		}()
		n := 0
		for e := range events {
			if got := e.Data["n"]; e.Event != "E" || got != float64(n) || e.Timestamp.Seconds != 7 {
				t.Fatalf("event %d is %+v", n, e)
			}
			if n++; n%size == 0 && n < bursts*size {
				if _, err := m.Run([]byte(`{"execute": "cmd"}`)); err != nil {
					t.Fatal(err)
				}
			}
		}
		if n != bursts*size {
			t.Errorf("%d events, want %d", n, bursts*size)
		}
		if got := m.Stats(); got != (qmp.Stats{}) {
			t.Errorf("stats are %+v", got)
		}
	})
}

// TestEventsNobodyReads: a subscriber that does not read holds up neither commands nor another one, and what it loses is the oldest and counted.
func TestEventsNobodyReads(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f := connected(t)
		lazy, err := m.Events(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		busy, err := m.Events(ctx)
		if err != nil {
			t.Fatal(err)
		}
		const n = 10
		pad := strings.Repeat("x", qmp.MaxQueue/8)
		for i := range n {
			f.send(fmt.Sprintf(`{"event": "E", "data": {"n": %d, "pad": %q}}`, i, pad))
			if e := <-busy; e.Data["n"] != float64(i) {
				t.Fatalf("event %d is %v", i, e.Data["n"])
			}
		}
		cancel()
		if _, ok := <-busy; ok {
			t.Error("an event after cancel")
		}
		go func() { f.answer(f.read(), `{}`) }()
		if _, err := m.Execute(t.Context(), "cmd", nil); err != nil {
			t.Fatal(err)
		}
		// 7 fit, and one more has left the queue and waits in the channel.
		if got := m.Stats(); got != (qmp.Stats{DroppedEvents: n - 8}) {
			t.Errorf("stats are %+v", got)
		}
		f.conn.Close()
		var got []float64
		for e := range lazy {
			got = append(got, e.Data["n"].(float64))
		}
		want := []float64{0}
		for i := n - 7; i < n; i++ {
			want = append(want, float64(i))
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	})
}

func TestDisconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, f := connected(t)
		events, err := m.Events(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		f.send(event(1)) // nobody reads it
		waiting := make(chan error, 1)
		go func() {
			_, err := m.Execute(t.Context(), "cmd", nil)
			waiting <- err
		}()
		f.read()
		if err := m.Disconnect(); err != nil {
			t.Error(err)
		}
		contains(t, <-waiting, "qmp cmd: connection closed: Disconnect was called")
		<-m.Done()
		if _, ok := <-events; ok {
			t.Error("an event after Disconnect")
		}
	})
}

// sockets is a connected Monitor on a real Unix socket.
func sockets(t *testing.T) (*qmp.Monitor, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		conns[i] = c.(*net.UnixConn)
	}
	m := qmp.New(conns[0])
	t.Cleanup(func() { conns[1].Close(); m.Disconnect() })
	go func() {
		f := &fake{t: t, conn: conns[1], in: bufio.NewReaderSize(conns[1], 4096)}
		f.send(greeting)
		f.answer(f.read(), `{}`)
	}()
	if err := m.Connect(); err != nil {
		t.Fatal(err)
	}
	return m, conns[1]
}

// receive reads one message, with the descriptor that came along.
func receive(t *testing.T, c *net.UnixConn) (request, *os.File) {
	t.Helper()
	line, oob := make([]byte, 1<<16), make([]byte, 1024)
	n, oobn, _, _, err := c.ReadMsgUnix(line, oob)
	if err != nil {
		t.Error(err)
		return request{}, nil
	}
	var r request
	if err := json.Unmarshal(line[:n], &r); err != nil {
		t.Errorf("%q: %v", line[:n], err)
	}
	control, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(control) != 1 {
		t.Errorf("%d control messages, %v", len(control), err)
		return r, nil
	}
	fds, err := unix.ParseUnixRights(&control[0])
	if err != nil || len(fds) != 1 {
		t.Errorf("descriptors %v, %v", fds, err)
		return r, nil
	}
	return r, os.NewFile(uintptr(fds[0]), "received")
}

func TestExecuteWithFile(t *testing.T) {
	m, c := sockets(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	answer := func(r request) { fmt.Fprintf(c, `{"return": %s, "id": %q}`+"\n", r.Arguments, r.ID) }

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var waiting sync.WaitGroup
	for i := range 2 {
		waiting.Go(func() {
			want := fmt.Sprintf(`{"n":%d}`, i)
			got, err := m.ExecuteWithFile(ctx, "add-fd", map[string]int{"n": i}, w)
			if err != nil || string(got) != want {
				t.Errorf("got %s, %v", got, err)
			}
		})
	}
	first, f := receive(t, c)
	if f == nil {
		t.FailNow()
	}
	// The second must not be on its way: QEMU would lose the first's descriptor.
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("before the answer to the first: %d bytes, %v", n, err)
	}
	c.SetReadDeadline(time.Time{})
	answer(first)
	second, g := receive(t, c)
	answer(second)
	waiting.Wait()
	if g != nil {
		g.Close()
	}

	if _, err := io.WriteString(f, "through"); err != nil {
		t.Error(err)
	}
	f.Close()
	// w is still the caller's, and not blocking: a deadline works.
	if err := w.SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Errorf("file is blocking now: %v", err)
	}
	b := make([]byte, 7)
	if _, err := io.ReadFull(r, b); err != nil || string(b) != "through" {
		t.Errorf("read %q, %v", b, err)
	}
}

// TestExecuteWithFileUnanswered: the next descriptor waits, with its context, for the answer that does not come.
func TestExecuteWithFileUnanswered(t *testing.T) {
	m, c := sockets(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for i, want := range []string{"qmp add-fd: no answer", "qmp add-fd: not sent"} {
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		_, err := m.ExecuteWithFile(ctx, "add-fd", nil, null)
		cancel()
		contains(t, err, want)
		if i == 0 {
			r, f := receive(t, c)
			if f == nil {
				t.FailNow()
			}
			f.Close()
			defer func() {
				fmt.Fprintf(c, `{"return": 1, "id": %q}`+"\n", r.ID)
				go func() {
					r, f := receive(t, c)
					f.Close()
					fmt.Fprintf(c, `{"return": 2, "id": %q}`+"\n", r.ID)
				}()
				if got, err := m.ExecuteWithFile(t.Context(), "add-fd", nil, null); err != nil || string(got) != "2" {
					t.Errorf("after the late answer: %s, %v", got, err)
				}
			}()
		}
	}
}

func TestExecuteWithFileRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, _ := connected(t)
		_, err := m.ExecuteWithFile(t.Context(), "add-fd", nil, os.Stdin)
		contains(t, err, "only be sent over a Unix socket")
		_, err = m.ExecuteWithFile(t.Context(), "add-fd", nil, nil)
		contains(t, err, "no descriptor to send")
	})
	m, _ := sockets(t)
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := m.ExecuteWithFile(t.Context(), "add-fd", nil, f); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed file: %v", err)
	}
}

// FuzzMonitor: whatever QEMU sends, a waiting command ends, nothing panics, and memory stays bounded.
func FuzzMonitor(f *testing.F) {
	f.Add([]byte(`{"return": {}, "id": "$ID"}` + "\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		ours, theirs := net.Pipe()
		m := qmp.New(ours)
		defer m.Disconnect()
		go func() {
			defer theirs.Close()
			q := &fake{t: t, conn: theirs, in: bufio.NewReader(theirs)}
			q.send(greeting)
			q.answer(q.read(), `{}`)
			id := q.read().ID
			io.WriteString(theirs, strings.ReplaceAll(string(data), "$ID", id))
		}()
		events, err := m.Events(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err := m.ConnectContext(ctx); err != nil {
			t.Fatal(err)
		}
		value, err := m.Execute(ctx, "cmd", nil)
		switch {
		case errors.Is(err, context.DeadlineExceeded):
			t.Error("the end of the connection woke nobody")
		case err == nil && !json.Valid(value):
			t.Errorf("value %q is not JSON", value)
		}
		for e := range events {
			if e.Event == "" {
				t.Errorf("event without a name: %+v", e)
			}
		}
	})
}
