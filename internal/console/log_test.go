package console

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// fakeTerminal has room for what the test allows.
type fakeTerminal struct {
	mu   sync.Mutex
	room int
	out  strings.Builder
	over int // bytes written beyond the room
	fail error
}

func (f *fakeTerminal) Room() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.room
}

func (f *fakeTerminal) Write(p []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return 0, f.fail
	}
	if len(p) > f.room {
		f.over += len(p) - f.room
	}
	f.room -= len(p) + 1
	f.out.Write(p)
	return len(p), nil
}

func (f *fakeTerminal) set(room int, fail error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.room, f.fail = room, fail
}

func (f *fakeTerminal) text() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.out.String()
}

func limited(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestHandlerFormat(t *testing.T) {
	term := &fakeTerminal{room: 1 << 20}
	l := NewLog(term)
	defer l.Close()
	now := func() time.Duration { return 1234567 * time.Microsecond }
	log := slog.New(NewHandler(l, slog.LevelInfo, now))
	log.Debug("not shown")
	log.Info("step done", "step", "mounts", "took", 1234*time.Microsecond)
	log.With("vif", 0).WithGroup("link").Warn("late", "name", "vif7.0 emu", slog.Group("mtu", "was", 1500))
	log.Error("bad \x1b[2J value", "value", "a\"b=c\x00", "empty", "")
	if err := l.Flush(limited(t)); err != nil {
		t.Fatal(err)
	}
	want := `stubinit 1.234567 info step done step=mounts took=1.23ms
stubinit 1.234567 warn late vif=0 link.name="vif7.0 emu" link.mtu.was=1500
stubinit 1.234567 error bad \x1b[2J value value="a\"b=c\x00" empty=""
`
	if d := cmp.Diff(want, term.text()); d != "" {
		t.Errorf("log (-want +got):\n%s", d)
	}
}

// A terminal that nobody reads gets nothing and blocks nobody; what was kept
// comes out in order once somebody reads, with the count of what was dropped.
func TestLogUndrained(t *testing.T) {
	term := &fakeTerminal{}
	l := NewLog(term)
	defer l.Close()
	const lines = 2000
	for i := range lines {
		l.Add(fmt.Appendf(nil, "line %04d %s", i, strings.Repeat("x", 90)))
	}
	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := l.Flush(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Flush of an undrained console: %v", err)
	}
	if got := term.text(); got != "" {
		t.Fatalf("written without room: %q", got)
	}
	term.set(1<<20, nil)
	l.Kick()
	if err := l.Flush(limited(t)); err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSuffix(term.text(), "\n"), "\n")
	// The writer holds one line already, which may be a count of what was dropped until then: the counts add up.
	var kept, dropped, bytes int
	for _, line := range got {
		var n, b int
		if _, err := fmt.Sscanf(line, "stubinit: console 0 was not read: %d lines, %d bytes of log dropped", &n, &b); err == nil {
			dropped, bytes = dropped+n, bytes+b
		} else {
			kept++
		}
	}
	if kept+dropped != lines || kept < 500 || bytes != dropped*101 {
		t.Errorf("%d lines kept, %d lines and %d bytes dropped, of %d", kept, dropped, bytes, lines)
	}
	if want := fmt.Sprintf("line %04d", lines-1); !strings.HasPrefix(got[len(got)-1], want) {
		t.Errorf("last line %q, want %s…", got[len(got)-1], want)
	}
}

// Nothing is ever written beyond the room, and a terminal that fails is tried again.
func TestLogNeverBeyondRoom(t *testing.T) {
	term := &fakeTerminal{fail: errors.New("EIO")}
	l := NewLog(term)
	defer l.Close()
	want := ""
	for i := range 20 {
		line := fmt.Sprintf("%d %s", i, strings.Repeat("y", 100*i))
		want += line + "\n"
		l.Add([]byte(line))
	}
	ctx := limited(t)
	for term.text() != want {
		if ctx.Err() != nil {
			t.Fatalf("got %d bytes of %d", len(term.text()), len(want))
		}
		term.set(700, nil)
		l.Kick()
		time.Sleep(time.Millisecond)
	}
	if term.over != 0 {
		t.Errorf("%d bytes written beyond the room", term.over)
	}
}

// What waits before the last words goes, and is counted.
func TestLogShed(t *testing.T) {
	term := &fakeTerminal{}
	l := NewLog(term)
	defer l.Close()
	for i := range 100 {
		l.Add(fmt.Appendf(nil, "line %02d %s", i, strings.Repeat("x", 91)))
	}
	l.Shed(500)
	l.Add([]byte("last words"))
	term.set(1<<20, nil)
	l.Kick()
	if err := l.Flush(limited(t)); err != nil {
		t.Fatal(err)
	}
	got := term.text()
	if n := strings.Count(got, "xxx\n"); n < 5 || n > 6 { // the writer may hold one already
		t.Errorf("%d lines kept, want 5 or 6:\n%s", n, got)
	}
	if !strings.Contains(got, "bytes of log dropped\nline 95") || !strings.HasSuffix(got, "\nlast words\n") {
		t.Errorf("log:\n%s", got)
	}
}

func TestOutput(t *testing.T) {
	term := &fakeTerminal{room: 1 << 20}
	l := NewLog(term)
	defer l.Close()
	now := time.Second
	o := NewOutput(l, "qemu", func() time.Duration { return now }, Limit{Burst: 300, Rate: 100})
	fmt.Fprint(o, "first\nsecond \x07\n")
	fmt.Fprint(o, strings.Repeat("flood\n", 40))
	now += 10 * time.Second
	fmt.Fprint(o, "after\nunfinished")
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Flush(limited(t)); err != nil {
		t.Fatal(err)
	}
	got := term.text()
	var lines, bytes int
	for s := range strings.Lines(got) {
		if _, err := fmt.Sscanf(s, "qemu 11.000000 ... %d lines, %d bytes dropped", &lines, &bytes); err == nil {
			break
		}
	}
	shown := strings.Count(got, " flood\n")
	if shown+lines != 40 || lines == 0 || bytes != 6*lines {
		t.Errorf("%d shown, %d lines and %d bytes dropped, of 40:\n%s", shown, lines, bytes, got)
	}
	for _, want := range []string{"qemu 1.000000 first\n", `qemu 1.000000 second \x07` + "\n", "qemu 11.000000 after\n", "qemu 11.000000 unfinished\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("no line %q in:\n%s", want, got)
		}
	}
}

// The bound that issue statements rest on: a flood of any length writes at
// most the burst and then the rate.
func TestOutputFloodIsBounded(t *testing.T) {
	term := &fakeTerminal{room: 1 << 30}
	l := NewLog(term)
	defer l.Close()
	now := time.Duration(0)
	o := NewOutput(l, "qemu", func() time.Duration { return now }, DefaultLimit)
	line := strings.Repeat("z", 200) + "\n"
	const seconds = 20
	for range seconds * 100 {
		now += 10 * time.Millisecond
		for range 20 {
			fmt.Fprint(o, line)
		}
		if err := l.Flush(limited(t)); err != nil {
			t.Fatal(err)
		}
	}
	o.Close()
	if err := l.Flush(limited(t)); err != nil {
		t.Fatal(err)
	}
	most := DefaultLimit.Burst + seconds*DefaultLimit.Rate + summaryCost
	if got := len(term.text()); got > most || got < most/2 {
		t.Errorf("%d bytes written, the limit allows %d", got, most)
	}
}

// A count of dropped lines is written even if the flood just stops.
func TestOutputSummaryWithoutFurtherLine(t *testing.T) {
	term := &fakeTerminal{room: 1 << 20}
	l := NewLog(term)
	defer l.Close()
	start := time.Now()
	o := NewOutput(l, "qemu", func() time.Duration { return time.Since(start) }, Limit{Burst: 200, Rate: 1000})
	defer o.Close()
	fmt.Fprint(o, strings.Repeat("0123456789\n", 50))
	ctx := limited(t)
	for !strings.Contains(term.text(), "dropped") {
		if ctx.Err() != nil {
			t.Fatalf("no count in:\n%s", term.text())
		}
		time.Sleep(10 * time.Millisecond)
	}
}
