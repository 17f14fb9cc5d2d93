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
	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
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

// A fakeConsole is console 1 with its ring, and dom0, which takes a few bytes each time that somebody looks at its index.
type fakeConsole struct {
	t          *testing.T
	out        bytes.Buffer
	cons, prod uint32
	pace       uint32 // bytes that dom0 takes at once; 0: it does not read
	open       int    // descriptors and mappings
	writeError error
}

// Write takes no more than there is room for: the kernel would spin.
func (c *fakeConsole) Write(p []byte) (int, error) {
	if c.writeError != nil {
		return 0, c.writeError
	}
	if free := 2048 - (c.prod - c.cons); uint32(len(p)) > free {
		c.t.Errorf("a write of %d bytes into a ring with room for %d", len(p), free)
	}
	c.prod += uint32(len(p))
	return c.out.Write(p)
}

func (c *fakeConsole) Close() error { c.open--; return nil }

type fakeRing struct{ c *fakeConsole }

func (r fakeRing) Uint32(offset int) uint32 {
	switch offset {
	case outProd:
		return r.c.prod
	case outCons:
		cons := r.c.cons
		r.c.cons += min(r.c.pace, r.c.prod-r.c.cons)
		return cons
	}
	panic("not an index of the output ring")
}

func (r fakeRing) Close() error { r.c.open--; return nil }

// newSaver is a saver whose fdset 1 is registered.
func newSaver(t *testing.T) (*stateSaver, *fakeQEMU, *fakeConsole, *xenstoretest.Server, *logBuffer) {
	t.Helper()
	q, m := newFakeQEMU(t)
	store := storeOf(t, map[string]string{
		"/local/domain/6/device/console/1/backend":     "/local/domain/0/backend/console/6/1",
		"/local/domain/6/device/console/1/ring-ref":    "9",
		"/local/domain/0/backend/console/6/1/state":    "4",
		"/local/domain/0/backend/console/6/1/protocol": "vt100",
	})
	const nearWrap = 0xfffffff0
	log, c := new(logBuffer), &fakeConsole{t: t, cons: nearWrap, prod: nearWrap, pace: 700}
	s := &stateSaver{qmp: m, xs: store.Dial(testSelf), log: slog.New(slog.NewTextHandler(log, nil))}
	s.openOut = func() (io.WriteCloser, error) { c.open++; return c, nil }
	s.mapRing = func(ref uint32) (ringFrame, error) {
		if ref != 9 {
			t.Errorf("ring is grant %d, want 9", ref)
		}
		c.open++
		return fakeRing{c}, nil
	}
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
	return s, q, c, store, log
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
	s, q, c, _, log := newSaver(t)
	for _, size := range []int{1, 200<<10 + 17, 64 << 10, 5000} {
		if err := s.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff([]string{"remove-fd", "add-fd"}, q.takeCalls()); d != "" {
			t.Errorf("commands of Prepare (-want +got):\n%s", d)
		}
		q.save(t, everyByte(size))
		c.out.Reset()
		if err := s.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if c.cons != c.prod {
			t.Errorf("Commit returned with %d bytes that dom0 had not taken", c.prod-c.cons)
		}
		if !bytes.Equal(c.out.Bytes(), everyByte(size)) {
			t.Errorf("%d bytes came out as %d others", size, c.out.Len())
		}
		if d := cmp.Diff([]string{"remove-fd", "add-fd"}, q.takeCalls()); d != "" {
			t.Errorf("commands of Commit (-want +got):\n%s", d)
		}
		if want := fmt.Sprintf("msg=\"state saved\" bytes=%d ", size); !strings.Contains(log.String(), want) {
			t.Errorf("log lacks %s:\n%s", want, log)
		}
		if c.open != 0 {
			t.Errorf("console and ring: %d are still open", c.open)
		}
		if n := memfds(t); n != 2 { // the next save's: ours, QEMU's
			t.Errorf("%d descriptors of state files, want 2", n)
		}
	}
}

// A save that fails says why, gives console, ring and memory back, and Abort lets the guest go on with a fresh fdset 1.
func TestSaveFails(t *testing.T) {
	const backend = "/local/domain/0/backend/console/6/1/state"
	for _, tt := range []struct {
		name  string
		state string
		spoil func(*stateSaver, *fakeConsole, *xenstoretest.Server)
		want  string
	}{
		{"empty state", "", func(*stateSaver, *fakeConsole, *xenstoretest.Server) {}, "QEMU saved an empty state"},
		{"nobody reads", "x", func(_ *stateSaver, _ *fakeConsole, x *xenstoretest.Server) { x.Set(backend, "2") }, "nobody reads console 1: " + backend + " is 2, not 4"},
		{"no backend", "x", func(_ *stateSaver, _ *fakeConsole, x *xenstoretest.Server) {
			x.Remove("/local/domain/6/device/console/1/backend")
		}, "device/console/1/backend"},
		{"no state", "x", func(_ *stateSaver, _ *fakeConsole, x *xenstoretest.Server) { x.Remove(backend) }, backend},
		{"no ring", "x", func(_ *stateSaver, _ *fakeConsole, x *xenstoretest.Server) {
			x.Remove("/local/domain/6/device/console/1/ring-ref")
		}, "device/console/1/ring-ref"},
		{"ring no number", "x", func(_ *stateSaver, _ *fakeConsole, x *xenstoretest.Server) {
			x.Set("/local/domain/6/device/console/1/ring-ref", "nine")
		}, `xenstore device/console/1/ring-ref: "nine" is not a grant reference`},
		{"ring not mapped", "x", func(s *stateSaver, _ *fakeConsole, _ *xenstoretest.Server) {
			s.mapRing = func(uint32) (ringFrame, error) { return nil, errors.New("not a grant") }
		}, "not a grant"},
		{"console not opened", "x", func(s *stateSaver, _ *fakeConsole, _ *xenstoretest.Server) {
			s.openOut = func() (io.WriteCloser, error) { return nil, errors.New("no such console") }
		}, "no such console"},
		{"write fails", "x", func(_ *stateSaver, c *fakeConsole, _ *xenstoretest.Server) { c.writeError = unix.EIO }, "copy the state to console 1: "},
		{"never drained", "x", func(_ *stateSaver, c *fakeConsole, _ *xenstoretest.Server) { c.pace = 0 }, "dom0 did not read the end of the state"},
		{"full for ever", strings.Repeat("x", 5000), func(_ *stateSaver, c *fakeConsole, _ *xenstoretest.Server) { c.pace = 0 }, "copy the state to console 1: context deadline exceeded"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, q, c, store, log := newSaver(t)
			if err := s.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
			q.save(t, []byte(tt.state))
			tt.spoil(s, c, store)
			ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
			defer cancel()
			err := s.Commit(ctx)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Commit: %v, want %s", err, tt.want)
			}
			if c.open != 0 {
				t.Errorf("console and ring: %d are still open", c.open)
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
	s, q, _, _, _ := newSaver(t)
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
	s, q, _, _, _ := newSaver(t)
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
	s, _, _, _, _ := newSaver(t)
	s.qmp.Disconnect()
	if err := s.Prepare(t.Context()); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Prepare: %v", err)
	}
	if err := s.Abort(t.Context(), errors.New("gone")); !errors.Is(err, qmp.ErrClosed) {
		t.Errorf("Abort: %v", err)
	}
}
