package qmpbridge

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"
	"unicode/utf8"
)

// maxDepth is the nesting that QEMU's parser takes (MAX_NESTING in
// qobject/json-streamer.c); past it QEMU loses its place in the stream.
const maxDepth = 1024

// A member is one of the members of a message's outermost object that the
// bridge looks at.
type member int

const (
	memberNone member = iota
	memberExecute
	memberExecOOB
	memberArguments
	memberID
	memberReturn
	memberError
	memberEvent
	memberGreeting
	members
)

func memberNamed(name []byte) member {
	switch string(name) {
	case "execute":
		return memberExecute
	case "exec-oob":
		return memberExecOOB
	case "arguments":
		return memberArguments
	case "id":
		return memberID
	case "return":
		return memberReturn
	case "error":
		return memberError
	case "event":
		return memberEvent
	case "QMP":
		return memberGreeting
	}
	return memberNone
}

// A span is a range of bytes in a value; end is 0 when the member is absent.
type span struct{ start, end int }

// A message is one JSON value taken from a stream, without the white space
// around it. Its bytes are valid until the splitter's next call, or, if it is
// kept, until it is released.
type message struct {
	text     []byte
	kept     bool          // text is a buffer of its own, until it goes to splitter.release
	size     int           // in bytes; more than len(text) when the rest was discarded
	newlines bool          // has \r or \n between tokens
	spans    [members]span // the last one, where a name comes twice
}

func (m *message) has(f member) bool { return m.spans[f].end > 0 }

// raw gives a member's bytes; nil when it is absent or was discarded.
func (m *message) raw(f member) []byte {
	s := m.spans[f]
	if s.end == 0 || s.end > len(m.text) {
		return nil
	}
	return m.text[s.start:s.end]
}

// str gives a member that is a string, "" for anything else and for a string
// longer than any command's name. guess is given back if it is that, so that what
// comes again and again is not allocated each time.
func (m *message) str(f member, guess string) string {
	raw := m.raw(f)
	if len(raw) < 2 || len(raw) > 256 || raw[0] != '"' {
		return ""
	}
	if bytes.IndexByte(raw, '\\') < 0 {
		if text := raw[1 : len(raw)-1]; string(text) != guess {
			return string(text)
		}
		return guess
	}
	var s string
	_ = json.Unmarshal(raw, &s) // it is valid
	return s
}

// A syntaxError is input that is not JSON, or too large. It is the sender's fault.
type syntaxError struct {
	desc string
	id   []byte // of the message, when it had come by then
}

func (e *syntaxError) Error() string { return e.desc }

// errNothingYet is next's error when the stream has no more for now.
var errNothingYet = errors.New("no complete value yet")

// A splitter cuts a byte stream into JSON values, wherever lines end: QEMU's own
// parser takes values that span lines and several on one line.
type splitter struct {
	read    func([]byte) (int, error) // 0 bytes and no error: nothing yet
	limit   int                       // bytes of one value
	discard bool                      // what a value has beyond limit is checked and dropped, not refused

	chunk  []byte // read buffer
	unread []byte // part of chunk
	broken bool
	m      message // that has begun, when its size is not 0
	given  bool    // m was next's, and is over
	scan   scanner
	spare  []byte // a buffer for a value that does not come in one chunk
}

const (
	chunkSize = 32 << 10
	keptMax   = 2 << 20 // a larger buffer is not kept for the next value
)

func newSplitter(read func([]byte) (int, error), limit int, discard bool) *splitter {
	s := &splitter{read: read, limit: limit, discard: discard, chunk: make([]byte, chunkSize)}
	s.scan.spans = &s.m.spans
	return s
}

// keep makes m valid until its text is released.
func (s *splitter) keep(m *message) {
	if !m.kept {
		m.text = append(s.spare, m.text...)
		m.kept, s.spare = true, nil
	}
}

// drop releases a message that nobody wants, or no longer.
func (s *splitter) drop(m *message) {
	if m.kept {
		s.release(m.text)
	}
}

// release takes back the text of a message that was kept.
func (s *splitter) release(text []byte) {
	if cap(text) <= keptMax {
		s.spare = text[:0]
	}
}

// next gives the next value, until it is called again. It fails with errNothingYet, and goes on with the
// next call; with a *syntaxError, after which it only reads and drops what still
// comes; with io.EOF between values; and with io.ErrUnexpectedEOF inside of one.
func (s *splitter) next() (*message, error) {
	for s.broken {
		if n, err := s.read(s.chunk); err != nil {
			return nil, err
		} else if n == 0 {
			return nil, errNothingYet
		}
	}
	if s.given {
		s.m, s.given = message{}, false
	}
	for {
		if s.m.size == 0 {
			s.unread = s.unread[leadingSpace(s.unread):]
		}
		if len(s.unread) == 0 {
			n, err := s.read(s.chunk)
			switch s.unread = s.chunk[:n]; {
			case n > 0: // an error comes again with the next call
				continue
			case err == nil:
				return nil, errNothingYet
			case s.m.size > 0 && errors.Is(err, io.EOF):
				return nil, io.ErrUnexpectedEOF
			}
			return nil, err
		}
		if s.m.size == 0 {
			s.scan.begin()
		}
		done, err := s.take()
		if err != nil {
			s.broken, s.unread = true, nil
			return nil, &syntaxError{err.Error(), s.m.raw(memberID)}
		}
		if done {
			s.given = true
			return &s.m, nil
		}
	}
}

// take adds to the message what of it is unread, and says whether it is complete.
func (s *splitter) take() (bool, error) {
	m := &s.m
	n, done, err := s.scan.scan(s.unread)
	part := s.unread[:n]
	s.unread = s.unread[n:]
	m.size += n
	if err == nil && m.size > s.limit && !s.discard {
		err = fmt.Errorf("message of more than %d bytes", s.limit)
	}
	if done && m.size == n && err == nil {
		m.text = part[:min(n, s.limit)]
	} else {
		if !m.kept {
			m.kept, m.text, s.spare = true, s.spare, nil
		}
		if s.discard {
			part = part[:min(n, s.limit-len(m.text))]
		}
		if cap(m.text)-len(m.text) < len(part) {
			m.text = slices.Grow(m.text, max(cap(m.text), len(part))) // append would grow it by less, and copy more
		}
		m.text = append(m.text, part...)
	}
	// Bytes that were discarded go to nobody; the rest must be UTF-8.
	if done && err == nil && s.scan.high && m.size == len(m.text) && !utf8.Valid(m.text) {
		err = errors.New("JSON parse error, a string is not UTF-8")
	}
	m.newlines = s.scan.newlines
	return done, err
}

func leadingSpace(b []byte) int {
	for i, c := range b {
		if !isSpace(c) {
			return i
		}
	}
	return len(b)
}

func isSpace(c byte) bool { return c == ' ' || c == '\t' || c == '\r' || c == '\n' }

type scanState uint8

const (
	wantValue      scanState = iota
	wantFirstValue           // after '[': or the end
	wantFirstKey             // after '{': or the end
	wantKey                  // after ',' in an object
	wantColon
	wantCommaOrEnd
	inString
	inEscape
	inHex
	inLiteral
	numMinus // a number's states, as RFC 8259 draws them
	numZero
	numInt
	numPoint
	numFraction
	numE
	numSign
	numExponent
)

// A scanner checks one JSON value (RFC 8259, UTF-8 apart) that comes in pieces
// of any size, and notes where the outermost object's members are. One pass:
// an answer can be a megabyte, on the machine's only processor.
type scanner struct {
	spans *[members]span

	state   scanState
	depth   int
	nesting [maxDepth / 8]byte // a bit a level: is it an object?
	off     int                // of the piece in the value

	key      bool // the string is a member's name
	keyText  [keyMax]byte
	keyLen   int
	current  member
	hex      int
	literal  string // what is left of true, false, null
	newlines bool
	high     bool // has bytes ≥ 0x80
}

// begin makes the scanner ready for another value.
func (s *scanner) begin() {
	s.state, s.depth, s.off = wantValue, 0, 0
	s.key, s.current = false, memberNone
	s.newlines, s.high = false, false
}

// keyMax is more than any known name needs with each byte written as \u00XX.
const keyMax = 64

// scan takes the next piece, which at the start of a value has no white space
// before it, and says how many of its bytes belong to the value. A number that
// is a value by itself ends before the first byte that cannot belong to it.
func (s *scanner) scan(b []byte) (n int, done bool, err error) {
	bad := func(i int) (int, bool, error) {
		return i, false, fmt.Errorf("JSON parse error, unexpected byte %q at offset %d", b[i:i+1], s.off+i)
	}
	for i := 0; i < len(b); i++ {
		if s.depth > 1 && s.state <= inString {
			if i = s.skim(b, i); i == len(b) {
				break
			}
		}
		c := b[i]
	again:
		switch s.state {
		case wantFirstValue, wantValue:
			if isSpace(c) {
				s.newlines = s.newlines || c == '\n' || c == '\r'
				continue
			}
			if c == ']' && s.state == wantFirstValue {
				if s.pop(i + 1) {
					return i + 1, true, nil
				}
				continue
			}
			if s.depth == 1 && s.current != memberNone {
				s.spans[s.current] = span{start: s.off + i}
			}
			switch {
			case c == '{' || c == '[':
				if s.depth == maxDepth {
					return i, false, fmt.Errorf("JSON parse error, nested deeper than %d", maxDepth)
				}
				s.push(c == '{')
			case c == '"':
				s.key, s.state = false, inString
			case c == '-':
				s.state = numMinus
			case c == '0':
				s.state = numZero
			case '1' <= c && c <= '9':
				s.state = numInt
			case c == 't':
				s.literal, s.state = "rue", inLiteral
			case c == 'f':
				s.literal, s.state = "alse", inLiteral
			case c == 'n':
				s.literal, s.state = "ull", inLiteral
			default:
				return bad(i)
			}

		case wantFirstKey, wantKey:
			switch {
			case isSpace(c):
				s.newlines = s.newlines || c == '\n' || c == '\r'
			case c == '"':
				s.key, s.keyLen, s.state = true, 0, inString
			case c == '}' && s.state == wantFirstKey:
				if s.pop(i + 1) {
					return i + 1, true, nil
				}
			default:
				return bad(i)
			}

		case wantColon:
			switch {
			case isSpace(c):
				s.newlines = s.newlines || c == '\n' || c == '\r'
			case c == ':':
				s.state = wantValue
			default:
				return bad(i)
			}

		case wantCommaOrEnd:
			object := s.inObject()
			switch {
			case isSpace(c):
				s.newlines = s.newlines || c == '\n' || c == '\r'
			case c == ',' && object:
				s.state = wantKey
			case c == ',':
				s.state = wantValue
			case c == '}' && object, c == ']' && !object:
				if s.pop(i + 1) {
					return i + 1, true, nil
				}
			default:
				return bad(i)
			}

		case inString:
			start, high := i, false
			i, high = skipPlain(b, i)
			s.high = s.high || high
			if s.key && s.depth == 1 {
				if s.keyLen == 0 && i < len(b) && b[i] == '"' { // as nearly all are: in one piece, and without escapes
					s.current = memberNamed(b[start:i])
					s.state = wantColon
					continue
				}
				s.addKey(b[start:i])
			}
			switch {
			case i == len(b):
			case b[i] == '\\':
				s.addKey(b[i : i+1])
				s.state = inEscape
			case b[i] != '"':
				return bad(i)
			case s.key:
				s.endKey()
				s.state = wantColon
			case s.endValue(i + 1):
				return i + 1, true, nil
			}

		case inEscape:
			switch c {
			case '"', '\\', '/', 'b', 'f', 'n', 'r', 't':
				s.state = inString
			case 'u':
				s.hex, s.state = 4, inHex
			default:
				return bad(i)
			}
			s.addKey(b[i : i+1])

		case inHex:
			if !('0' <= c && c <= '9' || 'a' <= c|0x20 && c|0x20 <= 'f') {
				return bad(i)
			}
			s.addKey(b[i : i+1])
			if s.hex--; s.hex == 0 {
				s.state = inString
			}

		case inLiteral:
			if c != s.literal[0] {
				return bad(i)
			}
			if s.literal = s.literal[1:]; s.literal == "" && s.endValue(i+1) {
				return i + 1, true, nil
			}

		default:
			next, ok := numberStep(s.state, c)
			switch {
			case ok:
				s.state = next
			case s.state != numZero && s.state != numInt && s.state != numFraction && s.state != numExponent:
				return bad(i)
			case s.endValue(i):
				return i, true, nil
			default:
				goto again
			}
		}
	}
	s.off += len(b)
	return len(b), false, nil
}

// plain are the bytes that mean nothing special in a string.
var plain = func() (t [256]bool) {
	for c := range t {
		t[c] = c >= ' ' && c != '"' && c != '\\'
	}
	return t
}()

// A word of eight bytes: x-ones borrows from the top bit of a byte that is 0, and
// w-ones*' ' from that of one below ' '. The lowest top bit that is set is right,
// those above it may not be.
const ones, tops = 0x0101010101010101, 0x8080808080808080

// specials has the top bit set of the first byte that is special in a string.
func specials(w uint64) uint64 {
	quote, slash := w^ones*'"', w^ones*'\\'
	return ((quote-ones)&^quote | (slash-ones)&^slash | (w-ones*' ')&^w) & tops
}

// What QEMU writes between two strings.
const (
	afterKey = uint32('"') | ':'<<8 | ' '<<16 | '"'<<24
	nextItem = uint32('"') | ','<<8 | ' '<<16 | '"'<<24
)

// skipPlain gives where, from b[i] on, a byte is special in a string, or len(b), and whether
// bytes ≥ 0x80 came before that, or soon after.
func skipPlain(b []byte, i int) (end int, high bool) {
	var all uint64
	for ; i <= len(b)-8; i += 8 {
		w := binary.LittleEndian.Uint64(b[i:])
		all |= w
		if special := specials(w); special != 0 {
			return i + bits.TrailingZeros64(special)/8, all&tops != 0
		}
	}
	for ; i < len(b) && plain[b[i]]; i++ {
		all |= uint64(b[i])
	}
	return i, all&tops != 0
}

// skim goes on from b[i] as scan does, where scan has nothing to note: below the
// outermost value's members. That is most of a large answer, and here it costs a few
// instructions a byte. It stops before whatever is rarer (numbers, escapes, empty objects,
// line ends, errors, the last bytes of b), for scan to go on.
func (s *scanner) skim(b []byte, i int) int {
	var (
		state  = s.state
		object = s.inObject()
		key    = s.key
		all    uint64
	)
scan:
	for i <= len(b)-8 {
		if state == inString {
			w := binary.LittleEndian.Uint64(b[i:])
			all |= w // what is behind the string, too: it only has UTF-8 checked without need
			special := specials(w)
			if special == 0 {
				i += 8
				continue
			}
			i += bits.TrailingZeros64(special) / 8
			if i > len(b)-8 || b[i] != '"' {
				break
			}
			switch between := binary.LittleEndian.Uint32(b[i:]); {
			case key && between == afterKey:
				key = false
				i += 4
			case !key && between == nextItem:
				key = object
				i += 4
			case key:
				state = wantColon
				i++
			default:
				state = wantCommaOrEnd
				i++
			}
			continue
		}
		c := b[i]
		if c == ' ' {
			i++
			continue
		}
		switch state {
		case wantCommaOrEnd:
			switch {
			case c == ',' && object:
				state = wantKey
			case c == ',':
				state = wantValue
			case s.depth > 2 && (c == '}' && object || c == ']' && !object):
				s.depth--
				object = s.inObject()
			default:
				break scan
			}
		case wantValue, wantFirstValue:
			switch {
			case c == '"':
				key, state = false, inString
			case (c == '{' || c == '[') && s.depth < maxDepth:
				object = c == '{'
				s.push(object)
				state = s.state
			case c == 'n' && string(b[i:i+4]) == "null", c == 't' && string(b[i:i+4]) == "true":
				state = wantCommaOrEnd
				i += 3
			case c == 'f' && string(b[i:i+5]) == "false":
				state = wantCommaOrEnd
				i += 4
			default:
				break scan
			}
		case wantKey, wantFirstKey:
			if c != '"' {
				break scan
			}
			key, state = true, inString
		default: // wantColon
			if c != ':' {
				break scan
			}
			state = wantValue
		}
		i++
	}
	s.state, s.key = state, key
	s.high = s.high || all&tops != 0
	return i
}

// numberStep gives the state after c; ok is false when c is no part of the number.
func numberStep(state scanState, c byte) (next scanState, ok bool) {
	digit := '0' <= c && c <= '9'
	switch state {
	case numMinus:
		if c == '0' {
			return numZero, true
		}
		return numInt, digit
	case numZero, numInt:
		switch {
		case digit && state == numInt:
			return numInt, true
		case c == '.':
			return numPoint, true
		}
		return numE, c|0x20 == 'e'
	case numPoint:
		return numFraction, digit
	case numFraction:
		if digit {
			return numFraction, true
		}
		return numE, c|0x20 == 'e'
	case numE:
		if c == '+' || c == '-' {
			return numSign, true
		}
	}
	return numExponent, digit // numE, numSign, numExponent
}

func (s *scanner) push(object bool) {
	bit := byte(1) << (s.depth % 8)
	if object {
		s.nesting[s.depth/8] |= bit
		s.state = wantFirstKey
	} else {
		s.nesting[s.depth/8] &^= bit
		s.state = wantFirstValue
	}
	s.depth++
}

func (s *scanner) inObject() bool {
	d := s.depth - 1
	return s.nesting[d/8]&(1<<(d%8)) != 0
}

// pop ends an object or array before b[end], and says whether that ends the value.
func (s *scanner) pop(end int) bool {
	s.depth--
	return s.endValue(end)
}

func (s *scanner) endValue(end int) bool {
	if s.depth == 0 {
		return true
	}
	if s.depth == 1 && s.current != memberNone {
		s.spans[s.current].end = s.off + end
	}
	s.state = wantCommaOrEnd
	return false
}

func (s *scanner) addKey(b []byte) {
	if s.key && s.depth == 1 {
		s.keyLen += copy(s.keyText[s.keyLen:], b)
	}
}

func (s *scanner) endKey() {
	if s.depth != 1 {
		return
	}
	name := s.keyText[:s.keyLen]
	if bytes.IndexByte(name, '\\') >= 0 {
		var plain string
		if json.Unmarshal([]byte(`"`+string(name)+`"`), &plain) == nil {
			name = []byte(plain)
		}
	}
	s.current = memberNamed(name)
}
