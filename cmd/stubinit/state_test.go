package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/qmp"
	"github.com/stubinit/stubinit/internal/xen/consring"
	"github.com/stubinit/stubinit/internal/xen/frame"
)

// A fakeQEMU is the other end of a monitor, with fdset 1 as QEMU has it.
type fakeQEMU struct {
	conn *net.UnixConn
	done chan struct{}

	mu    sync.Mutex
	calls []string
	set   *os.File
	fail  map[string]string // command → its error's text
}

// newFakeQEMU gives a monitor that is connected to one.
func newFakeQEMU(t *testing.T) (*fakeQEMU, *qmp.Monitor) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socketpair")
		conn, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		ends[i] = conn.(*net.UnixConn)
	}
	q := &fakeQEMU{conn: ends[1], done: make(chan struct{}), fail: map[string]string{}}
	go q.serve(t)
	m := qmp.New(ends[0])
	t.Cleanup(func() {
		m.Disconnect()
		<-q.done
	})
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	if err := m.ConnectContext(ctx); err != nil {
		t.Fatal(err)
	}
	return q, m
}

func (q *fakeQEMU) serve(t *testing.T) {
	defer close(q.done)
	defer q.conn.Close()
	fmt.Fprint(q.conn, `{"QMP": {"version": {"qemu": {"major": 10, "minor": 0, "micro": 2}, "package": ""}, "capabilities": []}}`+"\r\n")
	var passed *os.File
	lines := bufio.NewScanner(readerFunc(func(p []byte) (int, error) {
		oob := make([]byte, unix.CmsgSpace(4))
		n, oobn, _, _, err := q.conn.ReadMsgUnix(p, oob)
		if oobn > 0 {
			messages, err := unix.ParseSocketControlMessage(oob[:oobn])
			if err != nil {
				return n, err
			}
			fds, err := unix.ParseUnixRights(&messages[0])
			if err != nil {
				return n, err
			}
			passed = os.NewFile(uintptr(fds[0]), "passed")
		}
		if n == 0 && err == nil {
			err = io.EOF
		}
		return n, err
	}))
	for lines.Scan() {
		var c struct {
			Execute   string          `json:"execute"`
			ID        json.RawMessage `json:"id"`
			Arguments struct {
				Set    *int   `json:"fdset-id"`
				Opaque string `json:"opaque"`
			} `json:"arguments"`
		}
		if err := json.Unmarshal(lines.Bytes(), &c); err != nil {
			t.Errorf("QEMU was sent %q: %v", lines.Text(), err)
			return
		}
		answer := map[string]any{"id": c.ID}
		if text := q.execute(c.Execute, c.Arguments.Set, c.Arguments.Opaque, passed); text != "" {
			answer["error"] = map[string]string{"class": "GenericError", "desc": text}
		} else {
			answer["return"] = map[string]any{}
		}
		passed = nil
		b, err := json.Marshal(answer)
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := q.conn.Write(append(b, "\r\n"...)); err != nil {
			return
		}
	}
	if q.set != nil {
		q.set.Close()
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

func (q *fakeQEMU) execute(command string, set *int, opaque string, passed *os.File) (problem string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if command == "qmp_capabilities" {
		return ""
	}
	q.calls = append(q.calls, command)
	if text := q.fail[command]; text != "" {
		if passed != nil {
			passed.Close()
		}
		return text
	}
	switch command {
	case "add-fd":
		switch {
		case passed == nil:
			return "No file descriptor supplied via SCM_RIGHTS"
		case q.set != nil || set == nil || *set != 1 || opaque != "stubinit-state":
			passed.Close()
			return fmt.Sprintf("set %v, opaque %q, already there: %v", set, opaque, q.set != nil)
		}
		q.set = passed
	case "remove-fd":
		if set == nil || *set != 1 || q.set == nil {
			return "File descriptor named 'fdset-id:1' not found"
		}
		q.set.Close()
		q.set = nil
	case "cont":
	default:
		return command + " is not expected"
	}
	return ""
}

// save does what QEMU does with the file of a save: open it for writing, which for an fdset takes a member with
// exactly this access mode, truncate, write.
func (q *fakeQEMU) save(t *testing.T, state []byte) {
	t.Helper()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.set == nil {
		t.Fatal("there is no fdset 1")
	}
	flags, err := unix.FcntlInt(q.set.Fd(), unix.F_GETFL, 0)
	if err != nil {
		t.Fatal(err)
	}
	if flags&unix.O_ACCMODE != unix.O_WRONLY {
		t.Errorf("fdset 1 has access mode %d, QEMU wants %d", flags&unix.O_ACCMODE, unix.O_WRONLY)
	}
	if offset, err := q.set.Seek(0, io.SeekCurrent); offset != 0 || err != nil {
		t.Errorf("fdset 1 starts at %d, %v", offset, err)
	}
	if err := q.set.Truncate(0); err != nil {
		t.Error(err)
	}
	if _, err := q.set.Write(state); err != nil {
		t.Error(err)
	}
}

func (q *fakeQEMU) has() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.set != nil
}

func (q *fakeQEMU) failing(command, text string) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.fail[command] = text
}

// takeCalls gives the commands since the last time.
func (q *fakeQEMU) takeCalls() []string {
	q.mu.Lock()
	defer q.mu.Unlock()
	calls := q.calls
	q.calls = nil
	return calls
}

// A fakeConsole is console 1's ring, and dom0, which takes a few bytes with each event.
type fakeConsole struct {
	frame  *frame.Frame
	out    bytes.Buffer
	pace   uint32 // bytes that dom0 takes at once; 0: it does not read
	events int
	fail   error // of the second event on
	file   bool
	done   chan struct{} // closed at the test's end
	mu     sync.Mutex
}

// Places in struct xencons_interface (xen/include/public/io/console.h).
const (
	outRing = 1024
	inCons  = 3072
	inProd  = 3076
	outCons = 3080
	outProd = 3084
)

func newFakeConsole(t *testing.T) *fakeConsole {
	c := &fakeConsole{frame: frame.Of(make([]byte, frame.Size)), pace: 700, file: true, done: make(chan struct{})}
	const nearWrap = 0xfffffff0
	c.frame.SetUint32(outCons, nearWrap)
	c.frame.SetUint32(outProd, nearWrap)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			select {
			case <-c.done:
				return
			case <-time.After(20 * time.Microsecond):
				c.take()
			}
		}
	}()
	t.Cleanup(func() { close(c.done); <-ended })
	return c
}

func (c *fakeConsole) take() {
	c.mu.Lock()
	defer c.mu.Unlock()
	cons := c.frame.Uint32(outCons)
	n := min(c.pace, c.frame.Uint32(outProd)-cons)
	for i := range n {
		c.out.WriteByte(c.frame.Bytes()[outRing+int(cons+i)%2048])
	}
	c.frame.SetUint32(outCons, cons+n)
}

// send is an event for dom0.
func (c *fakeConsole) send() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.events++; c.events > 1 {
		return c.fail
	}
	return nil
}

func (c *fakeConsole) open(context.Context) (*consring.Ring, error) {
	r := consring.New(c.frame, c.send)
	r.File = c.file
	return r, nil
}

func (c *fakeConsole) setPace(n uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pace = n
}

// taken is what dom0 has taken since the last time.
func (c *fakeConsole) taken() []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	b := bytes.Clone(c.out.Bytes())
	c.out.Reset()
	return b
}

// newSaver is a saver whose fdset 1 is registered, and which can save more than once.
func newSaver(t *testing.T) (*stateSaver, *fakeQEMU, *fakeConsole, *logBuffer) {
	t.Helper()
	q, m := newFakeQEMU(t)
	log, c := new(logBuffer), newFakeConsole(t)
	c.file = false
	s := &stateSaver{qmp: m, log: slog.New(slog.NewTextHandler(log, nil)), open: c.open}
	if err := s.register(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if s.state != nil {
			s.state.Close()
		}
	})
	if d := cmp.Diff([]string{"add-fd"}, q.takeCalls()); d != "" {
		t.Errorf("commands of register (-want +got):\n%s", d)
	}
	return s, q, c, log
}

// memfds are the state files that this process has open, QEMU's included.
func memfds(t *testing.T) (n int) {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if path, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && strings.HasPrefix(path, "/memfd:state") {
			n++
		}
	}
	return n
}

// everyByte is a state with all byte values, of no round length.
func everyByte(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i * 7 / 3)
	}
	return b
}

// Saves in a row: each is whole on console 1 before Commit returns, and nothing is left of it.
func TestSave(t *testing.T) {
	s, q, c, log := newSaver(t)
	for _, size := range []int{1, 200<<10 + 17, 64 << 10, 5000} {
		if err := s.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]string{"remove-fd", "add-fd"}, q.takeCalls()); d != "" {
			t.Errorf("commands of Prepare (-want +got):\n%s", d)
		}
		q.save(t, everyByte(size))
		if err := s.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := c.taken(); !bytes.Equal(got, everyByte(size)) { // all of it, when Commit returns
			t.Errorf("%d bytes came out as %d others", size, len(got))
		}
		if d := cmp.Diff([]string{"remove-fd", "add-fd"}, q.takeCalls()); d != "" {
			t.Errorf("commands of Commit (-want +got):\n%s", d)
		}
		if want := fmt.Sprintf("msg=\"state saved\" bytes=%d ", size); !strings.Contains(log.String(), want) {
			t.Errorf("log lacks %s:\n%s", want, log)
		}
		if n := memfds(t); n != 2 { // the next save's: ours, QEMU's
			t.Errorf("%d descriptors of state files, want 2", n)
		}
	}
}

// A save that fails says why, gives console, ring and memory back, and Abort lets the guest go on with a fresh fdset 1.
func TestSaveFails(t *testing.T) {
	for _, tt := range []struct {
		name  string
		state string
		spoil func(*stateSaver, *fakeConsole)
		want  string
	}{
		{"empty state", "", func(*stateSaver, *fakeConsole) {}, "QEMU saved an empty state"},
		{"no ring", "x", func(s *stateSaver, _ *fakeConsole) {
			s.open = func(context.Context) (*consring.Ring, error) { return nil, errors.New("nobody serves console 1") }
		}, "nobody serves console 1"},
		{"no event", strings.Repeat("x", 5000), func(_ *stateSaver, c *fakeConsole) { c.fail = unix.EIO }, "copy the state to console 1: input/output error"},
		{"never drained", "x", func(_ *stateSaver, c *fakeConsole) { c.setPace(0) }, "console 1: the end of the state: context deadline exceeded"},
		{"full for ever", strings.Repeat("x", 5000), func(_ *stateSaver, c *fakeConsole) { c.setPace(0) }, "copy the state to console 1: context deadline exceeded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, q, c, log := newSaver(t)
			if err := s.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
			q.save(t, []byte(tt.state))
			tt.spoil(s, c)
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			err := s.Commit(ctx)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Commit: %v, want %s", err, tt.want)
			}
			if strings.Contains(log.String(), "state saved") {
				t.Errorf("log:\n%s", log)
			}
			q.takeCalls()
			if err := s.Abort(t.Context(), err); err != nil {
				t.Errorf("Abort: %v", err)
			}
			if calls := q.takeCalls(); calls[len(calls)-1] != "cont" || !q.has() {
				t.Errorf("commands of Abort: %v; fdset 1 there: %v", calls, q.has())
			}
			if want := tt.want[:10]; !strings.Contains(log.String(), "save failed; the guest goes on") || !strings.Contains(log.String(), want) {
				t.Errorf("log lacks the cause %q:\n%s", want, log)
			}
			if n := memfds(t); n != 2 {
				t.Errorf("%d descriptors of state files, want 2", n)
			}
		})
	}
}

// QEMU before 9.1 keeps a removed descriptor while the guest is stopped: the memory behind it must be free all the same.
func TestSaveFreesMemory(t *testing.T) {
	s, q, _, _ := newSaver(t)
	q.save(t, everyByte(1<<20))
	q.mu.Lock()
	kept, err := unix.Dup(int(q.set.Fd()))
	q.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(kept)
	if err := s.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(kept, &st); err != nil || st.Blocks != 0 {
		t.Errorf("the old state still has %d blocks, %v", st.Blocks, err)
	}
}

// QEMU's refusals: of remove-fd they mean that there is no set; of add-fd they are the save's end, but the guest goes on.
func TestSaveRefused(t *testing.T) {
	s, q, _, _ := newSaver(t)
	q.mu.Lock()
	q.set.Close()
	q.set = nil // as after a monitor's close with QEMU before 9.1
	q.mu.Unlock()
	if err := s.Prepare(t.Context()); err != nil {
		t.Errorf("Prepare without a set: %v", err)
	}
	q.failing("add-fd", "too many open files")
	err := s.Prepare(t.Context())
	var refused *qmp.Error
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), "fdset 1: ") {
		t.Errorf("Prepare: %v", err)
	}
	if n := memfds(t); n != 0 {
		t.Errorf("%d descriptors of state files are left", n)
	}
	q.takeCalls()
	if err := s.Abort(t.Context(), err); !errors.As(err, &refused) {
		t.Errorf("Abort: %v, want QEMU's refusal", err)
	}
	if calls := q.takeCalls(); calls[len(calls)-1] != "cont" {
		t.Errorf("the guest does not go on: %v", calls)
	}
	if err := s.Commit(t.Context()); err == nil {
		t.Error("Commit without a state: no error")
	}
}

// A monitor that has ended ends a save with an error.
func TestSaveWithoutQEMU(t *testing.T) {
	s, _, _, _ := newSaver(t)
	s.qmp.Disconnect()
	if err := s.Prepare(t.Context()); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Prepare: %v", err)
	}
	if err := s.Abort(t.Context(), errors.New("gone")); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Abort: %v", err)
	}
}

// receiving is an agent that receives a state until ctx ends: dom0's side, QEMU's, the agent's log; done is closed at its end.
func receiving(t *testing.T, ctx context.Context, silence time.Duration) (dom0 *frame.Frame, qemu *os.File, log *logBuffer, done chan struct{}) {
	t.Helper()
	dom0, log, done = frame.Of(make([]byte, frame.Size)), new(logBuffer), make(chan struct{})
	a := newAgent()
	a.log = slog.New(slog.NewTextHandler(log, nil))
	qemu, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { qemu.Close() })
	if err := setPipeSize(w, 64<<10); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(done)
		a.receive(ctx, consring.New(dom0, func() error { return nil }), w, silence)
	}()
	return dom0, qemu, log, done
}

// The state to restore from reaches QEMU as dom0 sent it, as far as it has come when QEMU has all; then dom0 is left alone.
func TestReceive(t *testing.T) {
	for _, tt := range []struct {
		name  string
		spoil func(*frame.Frame, *os.File, context.CancelFunc)
		log   string
	}{
		{"QEMU runs", func(_ *frame.Frame, _ *os.File, cancel context.CancelFunc) { cancel() }, `level=INFO msg="state received" bytes=10000 `},
		{"QEMU has closed it", func(f *frame.Frame, qemu *os.File, _ context.CancelFunc) {
			qemu.Close()
			f.SetUint32(inProd, f.Uint32(inProd)+1)
		}, `level=INFO msg="state received" bytes=10000 `},
		{"broken ring", func(f *frame.Frame, _ *os.File, _ context.CancelFunc) { f.SetUint32(inProd, f.Uint32(inProd)+2000) }, `level=ERROR msg="the state breaks off" bytes=10000 err="the console's ring is broken`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			f, r, log, done := receiving(t, ctx, time.Hour)
			want := everyByte(10000)
			for i := range want { // dom0
				for f.Uint32(inProd)-f.Uint32(inCons) == consring.InSize {
					time.Sleep(10 * time.Microsecond)
				}
				f.Bytes()[i%consring.InSize] = want[i]
				f.SetUint32(inProd, uint32(i+1))
			}
			got := make([]byte, len(want))
			if _, err := io.ReadFull(r, got); err != nil || !bytes.Equal(got, want) {
				t.Errorf("QEMU got others, %v", err)
			}
			tt.spoil(f, r, cancel)
			<-done
			if !strings.Contains(log.String(), tt.log) {
				t.Errorf("log lacks %s:\n%s", tt.log, log)
			}
			if n, err := r.Read(got); n != 0 || err == nil {
				t.Errorf("%d bytes more, %v, want the end", n, err)
			}
		})
	}
}

// A state that does not go on is said to be cut off, once, and waited for all the same.
func TestReceiveCutOff(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), waitLimit)
	defer cancel()
	f, r, log, done := receiving(t, ctx, 20*time.Millisecond)
	for n := range 2 {
		f.SetUint32(inProd, uint32(n+1))
		if _, err := io.ReadFull(r, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		const want = "no more of the state comes"
		for strings.Count(log.String(), want) != n+1 && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		time.Sleep(50 * time.Millisecond)
		if got := strings.Count(log.String(), want); got != n+1 {
			t.Errorf("after %d bytes it was said %d times", n+1, got)
		}
	}
	cancel()
	<-done
}
