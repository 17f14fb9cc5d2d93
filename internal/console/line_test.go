package console

import (
	"bytes"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestEscape(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", ""},
		{"plain text 123", "plain text 123"},
		{"tab\there", `tab\there`},
		{"cr\rbell\a", `cr\rbell\x07`},
		{`back\slash`, `back\\slash`},
		{"\x1b[2J", `\x1b[2J`},
		{"\x00\x7f", `\x00\x7f`},
		{"caf\u00e9", "caf\u00e9"},
		{"\x9bK", `\x9bK`},             // a C1 byte that is not UTF-8
		{"\u009bK", `\xc2\x9bK`},       // the same, encoded
		{"a\u202eb", `a\xe2\x80\xaeb`}, // right-to-left override
		{"\xff\xfe", `\xff\xfe`},
	} {
		if got := string(Escape(nil, []byte(tt.in))); got != tt.want {
			t.Errorf("Escape(%q) = %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestSplitter(t *testing.T) {
	long := strings.Repeat("x", MaxLine)
	for _, tt := range []struct {
		name string
		in   []string
		want []string
	}{
		{"one", []string{"a\n"}, []string{"a"}},
		{"crlf", []string{"a\r\nb\r", "\n"}, []string{"a", "b"}},
		{"pieces", []string{"a", "b", "c\nd"}, []string{"abc", "d"}},
		{"empty lines vanish", []string{"\n\na\n\n"}, []string{"a"}},
		{"exactly full", []string{long + "\n"}, []string{long}},
		{"one more", []string{long + "y\n"}, []string{long, "y"}},
		{"endless", []string{long, long, "z"}, []string{long, long, "z"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var s splitter
			var got []string
			emit := func(l []byte) { got = append(got, string(l)) }
			for _, p := range tt.in {
				s.feed([]byte(p), emit)
			}
			s.flush(emit)
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("lines (-want +got):\n%s", d)
			}
		})
	}
}

// FuzzLines: whatever QEMU prints, each line that leaves is bounded, holds no
// control byte, and nothing but line ends is lost.
func FuzzLines(f *testing.F) {
	f.Add([]byte("a\nb\r\n\x1b[0m"), 3)
	f.Add(bytes.Repeat([]byte("x"), 3000), 100)
	f.Fuzz(func(t *testing.T, in []byte, piece int) {
		piece = max(1, piece%4096)
		var s splitter
		var lines [][]byte
		emit := func(l []byte) { lines = append(lines, bytes.Clone(l)) }
		for p := in; len(p) > 0; {
			n := min(piece, len(p))
			s.feed(p[:n], emit)
			p = p[n:]
		}
		s.flush(emit)
		strip := func(b []byte) []byte {
			return bytes.ReplaceAll(bytes.ReplaceAll(b, []byte("\n"), nil), []byte("\r"), nil)
		}
		if got, want := strip(bytes.Join(lines, nil)), strip(in); !bytes.Equal(got, want) {
			t.Fatalf("lines hold %q, the input was %q", got, want)
		}
		for _, l := range lines {
			if len(l) > MaxLine {
				t.Fatalf("a line of %d bytes", len(l))
			}
			for _, c := range Escape(nil, l) {
				if c < 0x20 || c == 0x7f {
					t.Fatalf("byte %#x left", c)
				}
			}
		}
	})
}
