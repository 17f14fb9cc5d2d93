package fdio

import (
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"
)

// newPipe gives a pipe whose reading end is watched, and how often that was ready.
func newPipe(t *testing.T, p *Poller) (w *os.File, watch *Watch, calls *int) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		r.Close()
		w.Close()
	})
	calls = new(int)
	b := make([]byte, 1)
	watch, err = p.Watch(int(r.Fd()), func() {
		*calls++
		if _, err := r.Read(b); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return w, watch, calls
}

func TestPoller(t *testing.T) {
	p, err := NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	a, watchA, callsA := newPipe(t, p)
	b, _, callsB := newPipe(t, p)
	for name, hot := range map[string]bool{"in Go's poller": false, "on the thread": true} {
		// Written while it waits, after it has stopped lingering, and before.
		for _, delay := range []time.Duration{3 * lingerLimit, 100 * time.Microsecond, 0} {
			*callsA, *callsB = 0, 0
			if hot {
				p.Linger()
			}
			time.AfterFunc(delay, func() { a.Write([]byte{1}) })
			for *callsA == 0 {
				wait(t, p)
			}
			if *callsA != 1 || *callsB != 0 {
				t.Errorf("%s, after %v: called %d and %d times", name, delay, *callsA, *callsB)
			}
		}
	}
	a.Write([]byte{1, 2})
	b.Write([]byte{1})
	*callsA, *callsB = 0, 0
	for *callsA < 2 || *callsB < 1 { // what is left is told again
		wait(t, p)
	}
	if err := watchA.Stop(); err != nil {
		t.Fatal(err)
	}
	a.Write([]byte{1})
	b.Write([]byte{1})
	for *callsB < 2 {
		wait(t, p)
	}
	if *callsA != 2 {
		t.Error("called after Stop")
	}
}

func TestInterrupt(t *testing.T) {
	p, err := NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(time.Millisecond, p.Interrupt)
	for _, hot := range []bool{false, true, true} {
		if hot {
			p.Linger()
		}
		start := time.Now()
		for time.Since(start) < 10*time.Second {
			if err = p.Wait(); err != nil {
				break
			}
		}
		if !errors.Is(err, fs.ErrClosed) {
			t.Errorf("hot %v: %v", hot, err)
		}
	}
	p.Close()
	if _, err := p.Watch(0, func() {}); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
}

// A file cannot be watched (epoll_ctl's EPERM).
func TestWatchErrors(t *testing.T) {
	p, err := NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	f, err := os.Open(os.Args[0])
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var call *os.SyscallError
	if _, err := p.Watch(int(f.Fd()), func() {}); !errors.As(err, &call) || call.Syscall != "epoll_ctl" {
		t.Errorf("a plain file: %v", err)
	}
	if len(p.watched) != 0 {
		t.Error("it is still watched")
	}
}

// A conversation's waits allocate nothing: they are part of each QMP round trip.
func TestWaitAllocates(t *testing.T) {
	p, err := NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	w, _, calls := newPipe(t, p)
	b := []byte{1}
	allocated := testing.AllocsPerRun(100, func() {
		if _, err := w.Write(b); err != nil {
			t.Error(err)
		}
		p.Linger()
		if err := p.Wait(); err != nil {
			t.Error(err)
		}
	})
	if allocated > 0 || *calls != 101 {
		t.Errorf("%v allocations a wait, %d calls", allocated, *calls)
	}
}
