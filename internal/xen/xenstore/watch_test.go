package xenstore_test

import (
	"context"
	"fmt"
	"io/fs"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
)

func next(t *testing.T, w *xenstore.Watch) string {
	t.Helper()
	path, err := w.Next(within(t))
	check(t, err)
	return path
}

func TestWatch(t *testing.T) {
	s, c := dial(t)
	ctx := within(t)
	rel, err := c.Watch(ctx, "device/vif")
	check(t, err)
	abs, err := c.Watch(ctx, "/local/domain/5/device")
	check(t, err)
	if rel.Path() != "device/vif" {
		t.Errorf("Path = %q", rel.Path())
	}
	// Once at registration, node or not; then each change, in the watch's form.
	got := []string{next(t, rel), next(t, abs)}
	s.Set("/local/domain/5/device/vif/0/state", "1")
	got = append(got, next(t, rel), next(t, abs))
	s.Remove("/local/domain/5")
	got = append(got, next(t, rel), next(t, abs))
	if diff := cmp.Diff([]string{
		"device/vif", "/local/domain/5/device",
		"device/vif/0/state", "/local/domain/5/device/vif/0/state",
		"device/vif", "/local/domain/5/device",
	}, got); diff != "" {
		t.Error(diff)
	}
	check(t, rel.Close())
	check(t, rel.Close())
	_, err = rel.Next(ctx)
	wantErr(t, err, fs.ErrClosed, "wait for a change of device/vif")
	if n := s.Watches(dom); n != 1 {
		t.Errorf("%d watches at the server, want 1", n)
	}
	special, err := c.Watch(ctx, "@releaseDomain")
	check(t, err)
	next(t, special)
	s.Fire("@releaseDomain")
	if p := next(t, special); p != "@releaseDomain" {
		t.Errorf("event %q", p)
	}
}

func TestEventBeforeAckAndAfterUnwatch(t *testing.T) {
	s, c := dial(t)
	s.SetFaults(xenstoretest.Faults{EventBeforeAck: true, EventAfterUnwatch: true})
	w, err := c.Watch(within(t), "/a")
	check(t, err)
	if p := next(t, w); p != "/a" {
		t.Errorf("event %q", p)
	}
	check(t, w.Close())
	if _, err := c.List(within(t), "/"); err != nil { // comes after the stray event
		t.Error(err)
	}
}

// Order is that of the first occurrence; a path waits once.
func TestWatchCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := dial(t)
		w, err := c.Watch(t.Context(), "/d")
		check(t, err)
		for _, p := range []string{"/d/b", "/d/a", "/d/b", "/d/c", "/d/a"} {
			s.Fire(p)
		}
		synctest.Wait()
		var got []string
		for range 4 {
			got = append(got, next(t, w))
		}
		if diff := cmp.Diff([]string{"/d", "/d/b", "/d/a", "/d/c"}, got); diff != "" {
			t.Error(diff)
		}
		idle(t, w)
		s.Fire("/d/b") // again, now that it was taken
		if p := next(t, w); p != "/d/b" {
			t.Errorf("event %q", p)
		}
	})
}

// idle checks that no event waits.
func idle(t *testing.T, w *xenstore.Watch) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	p, err := w.Next(ctx)
	if err == nil {
		t.Errorf("event %q too many", p)
	}
}

func TestWatchOverflow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := dial(t)
		w, err := c.Watch(t.Context(), "/d")
		check(t, err)
		next(t, w)
		fire := func(n int) {
			for i := range n {
				s.Fire(fmt.Sprintf("/d/%d", i))
			}
			synctest.Wait()
		}
		fire(256)
		for i := range 256 {
			if p := next(t, w); p != fmt.Sprintf("/d/%d", i) {
				t.Fatalf("event %d is %q", i, p)
			}
		}
		fire(1000) // one event that stands for all
		if p := next(t, w); p != "/d" {
			t.Errorf("event %q", p)
		}
		idle(t, w)
		fire(1)
		if p := next(t, w); p != "/d/0" {
			t.Errorf("event %q", p)
		}
	})
}

// A second's worth of events at 10 000 a second, on many paths, with a reader
// that is slow and requests that go on meanwhile: nothing is lost but doubles.
func TestWatchStorm(t *testing.T) {
	const events = 10_000
	s, c := dial(t)
	ctx := within(t)
	w, err := c.Watch(ctx, "/d")
	check(t, err)
	other, err := c.Watch(ctx, "/d") // nobody reads this one
	check(t, err)
	defer other.Close()

	var wg sync.WaitGroup
	var took time.Duration
	wg.Go(func() {
		start := time.Now()
		for i := range events {
			s.Set(fmt.Sprintf("/d/%d", i%400), fmt.Sprint(i))
		}
		s.Set("/d/last", "")
		took = time.Since(start)
	})
	wg.Go(func() {
		for i := range 100 {
			if err := c.Write(ctx, "alive", fmt.Sprint(i)); err != nil {
				t.Error(err)
			}
		}
	})
	count := 0
	for {
		p := next(t, w)
		count++
		if p == "/d/last" {
			break
		}
		if p == "/d" { // everything under it may have changed
			if _, err := c.Read(ctx, "/d/last"); err == nil {
				break
			}
		}
	}
	wg.Wait()
	t.Logf("%d events sent in %v, %d seen", events, took, count)
	if count > events+2 {
		t.Errorf("%d events seen, %d sent", count, events)
	}
	if p := next(t, other); p != "/d" {
		t.Errorf("the unread watch begins with %q", p)
	}
	if got, err := c.Read(ctx, "alive"); err != nil || got != "99" {
		t.Errorf("alive = %q, %v", got, err)
	}
}

// Two goroutines in Next share the events; none sleeps while one waits.
func TestWatchTwoReaders(t *testing.T) {
	s, c := dial(t)
	w, err := c.Watch(within(t), "/d")
	check(t, err)
	next(t, w)
	got := make(chan string, 100)
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				p, err := w.Next(t.Context())
				if err != nil {
					wantErr(t, err, fs.ErrClosed, "/d")
					return
				}
				got <- p
			}
		})
	}
	for i := range 50 {
		s.Fire(fmt.Sprintf("/d/%d", i))
	}
	seen := map[string]bool{}
	for range 50 {
		seen[<-got] = true
	}
	if len(seen) != 50 {
		t.Errorf("%d paths seen, want 50", len(seen))
	}
	check(t, w.Close())
	wg.Wait()
}

// What came before the end is handed out before the end is.
func TestWatchDrainsAtEOF(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, c := dial(t)
		w, err := c.Watch(t.Context(), "/d")
		check(t, err)
		s.Hangup(dom)
		<-c.Done()
		if p := next(t, w); p != "/d" {
			t.Errorf("event %q", p)
		}
		_, err = w.Next(t.Context())
		wantErr(t, err, nil, "xenbus closed its end")
	})
}

func TestUnwatchRefused(t *testing.T) {
	s, c := dial(t)
	w, err := c.Watch(within(t), "/d")
	check(t, err)
	s.SetFaults(xenstoretest.Faults{WriteErrno: func(string, string) syscall.Errno { return syscall.ENOMEM }})
	wantErr(t, w.Close(), syscall.ENOMEM, "xenstore: unwatch /d")
	_, err = c.WaitFor(within(t), "/d", nil)
	wantErr(t, err, syscall.ENOMEM, "watch /d")
}
