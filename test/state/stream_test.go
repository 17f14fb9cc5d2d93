package main

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A stream holds every value, and at another place in each round.
func TestStream(t *testing.T) {
	a, b := stream(1, 4096), stream(2, 4096)
	for v := range 256 {
		found := false
		for _, got := range a[:256] {
			found = found || int(got) == v
		}
		if !found {
			t.Errorf("no %#x among the first 256 bytes", v)
		}
	}
	same := 0
	for i := range a {
		if a[i] == b[i] {
			same++
		}
	}
	if same > 64 {
		t.Errorf("two rounds have %d of %d bytes in common", same, len(a))
	}
}

func TestCompare(t *testing.T) {
	for _, tt := range []struct {
		name      string
		want, got string
		outcome   outcome
	}{
		{"exact", "abc", "abc", outcome{Received: 3, First: -1}},
		{"nothing", "abc", "", outcome{Missing: 3}},
		{"end lost", "abc", "ab", outcome{Received: 2, Missing: 1, First: 2}},
		{"more", "abc", "abcd", outcome{Received: 4, Extra: 1, First: 3}},
		{"changed", "a\rb\rc", "a\nb\nc", outcome{Received: 5, Different: 2, First: 1}},
		{"lost", "abcd", "acd", outcome{Received: 3, Missing: 1, Different: 2, First: 1}},
	} {
		o := compare([]byte(tt.want), []byte(tt.got))
		if d := cmp.Diff(tt.outcome, o); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
		if o.exact() != (tt.want == tt.got) {
			t.Errorf("%s: exact is %t", tt.name, o.exact())
		}
		if back, err := parseOutcome(o.String()); err != nil || back != o {
			t.Errorf("%s: %v comes back as %v, %v", tt.name, o, back, err)
		}
	}
}

func TestRequest(t *testing.T) {
	r := request{Round: 7, Bytes: 4 << 20, Way: stty}
	if back, err := parseRequest(r.String()); err != nil || back != r {
		t.Errorf("%v comes back as %v, %v", r, back, err)
	}
	if _, err := parseRequest("round=x"); err == nil {
		t.Error("no error for nonsense")
	}
}
