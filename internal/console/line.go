package console

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// MaxLine is the most bytes of one line, prefix excluded. Longer lines are
// split, so that a reader of dom0's log file never meets an endless one.
const MaxLine = 1024

// Escape appends text to dst with everything that is not printable ASCII
// or well-formed UTF-8 written as \xNN (or \t, \r, \\): a guest can make QEMU print
// what it likes, and it must not drive the terminal of whoever reads the log.
func Escape(dst []byte, text []byte) []byte {
	for len(text) > 0 {
		c := text[0]
		switch {
		case c == '\\':
			dst = append(dst, '\\', '\\')
		case c == '\t':
			dst = append(dst, '\\', 't')
		case c == '\r':
			dst = append(dst, '\\', 'r')
		case c >= 0x20 && c < 0x7f:
			dst = append(dst, c)
		case c >= utf8.RuneSelf:
			// U+0080 to U+009F are terminal controls too.
			r, n := utf8.DecodeRune(text)
			if r != utf8.RuneError && r >= 0xa0 && !isBidiControl(r) {
				dst = append(dst, text[:n]...)
				text = text[n:]
				continue
			}
			dst = fmt.Appendf(dst, `\x%02x`, c)
		default:
			dst = fmt.Appendf(dst, `\x%02x`, c)
		}
		text = text[1:]
	}
	return dst
}

// isBidiControl reports the code points that reorder or hide text on a screen.
func isBidiControl(r rune) bool {
	return r >= 0x200b && r <= 0x200f || r >= 0x2028 && r <= 0x202e || r >= 0x2060 && r <= 0x2069 || r == 0xfeff
}

// A splitter cuts a byte stream into lines of at most MaxLine bytes.
// The zero value is ready.
type splitter struct {
	rest []byte
}

// feed passes every line that p completes to emit, without its line end.
func (s *splitter) feed(p []byte, emit func(line []byte)) {
	for len(p) > 0 {
		n := len(p)
		end := false
		for i, c := range p {
			if c == '\n' {
				n, end = i, true
				break
			}
		}
		for n > 0 {
			take := min(n, MaxLine-len(s.rest))
			s.rest = append(s.rest, p[:take]...)
			p, n = p[take:], n-take
			if len(s.rest) == MaxLine && !(n == 0 && end) {
				s.flush(emit)
			}
		}
		if end {
			p = p[1:]
			if l := len(s.rest); l > 0 && s.rest[l-1] == '\r' {
				s.rest = s.rest[:l-1]
			}
			s.flush(emit)
		}
	}
}

// flush emits an unfinished line, if there is one.
func (s *splitter) flush(emit func(line []byte)) {
	if len(s.rest) > 0 {
		emit(s.rest)
		s.rest = s.rest[:0]
	}
}

// quote makes one token of s for a key=value line.
func quote(s string) string {
	plain := s != ""
	for _, r := range s {
		if r <= ' ' || r == '"' || r == '=' || r == 0x7f {
			plain = false
			break
		}
	}
	e := string(Escape(nil, []byte(s)))
	if plain {
		return e
	}
	return `"` + strings.ReplaceAll(e, `"`, `\"`) + `"`
}
