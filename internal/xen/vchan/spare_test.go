package vchan_test

import (
	"testing"

	"github.com/stubinit/stubinit/internal/xen/vchan"
	"github.com/stubinit/stubinit/internal/xen/vchan/vchantest"
)

// TestSpare: the endpoint after the next is made while nobody waits, and given back at the end.
func TestSpare(t *testing.T) {
	x := vchantest.New()
	made := 0
	x.Fault = func(op string) error {
		if op == "share" {
			made++
		}
		return nil
	}
	s, err := vchan.NewStepper(x, vchan.Options{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	want := func(when string, n int) {
		t.Helper()
		if made != n {
			t.Errorf("%d endpoints were made %s: want %d", made, when, n)
		}
	}
	want("to listen", 1)
	for n := 2; n < 5; n++ {
		c := vchantest.NewClient(x)
		if err := c.Attach(); err != nil {
			t.Fatal(err)
		}
		s.Scan()
		want("when a client was there", n)
		c.Detach()
		s.Scan()
		want("when it had left", n+1)
	}
	if err := s.Close(); err != nil { // says what was not given back
		t.Error(err)
	}
}
