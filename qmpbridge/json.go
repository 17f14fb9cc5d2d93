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
// longer than any command's name.
func (m *message) str(f member) string {
	var s string
	if raw := m.raw(f); len(raw) > 0 && len(raw) <= 256 && raw[0] == '"' && json.Unmarshal(raw, &s) == nil {
		return s
	}
	return ""
}

// A syntaxError is input that is not JSON, or too large. It is the sender's fault.
type syntaxError struct {
	desc string
	id   []byte // of the message, when it had come by then
}

func (e *syntaxError) Error() string { return e.desc }

// A splitter cuts a byte stream into JSON values, wherever lines end: QEMU's own
// parser takes values that span lines and several on one line.
type splitter struct {
	r       io.Reader
	limit   int  // bytes of one value
	discard bool // what a value has beyond limit is checked and dropped, not refused

	chunk  []byte // read buffer
	unread []byte // part of chunk
	broken bool
	spare  chan []byte // holds a buffer for a value that does not come in one chunk
}

const (
	chunkSize = 32 << 10
	keptMax   = 2 << 20 // a larger buffer is not kept for the next value
)

func newSplitter(r io.Reader, limit int, discard bool) *splitter {
	return &splitter{r: r, limit: limit, discard: discard, chunk: make([]byte, chunkSize), spare: make(chan []byte, 1)}
}

// drop releases a message that nobody wants, or no longer.
func (s *splitter) drop(m *message) {
	if m.kept {
		s.release(m.text)
	}
}

// release takes back the text of a message that was kept. Safe beside next.
func (s *splitter) release(text []byte) {
	if cap(text) > keptMax {
		return
	}
	select {
	case s.spare <- text[:0]:
	default:
	}
}

// next gives the next value. It fails with a *syntaxError, after which it only
// reads and drops what still comes; with io.EOF between values; and with
// io.ErrUnexpectedEOF inside of one.
func (s *splitter) next() (message, error) {
	if s.broken {
		if _, err := io.Copy(io.Discard, s.r); err != nil {
			return message{}, err
		}
		return message{}, io.EOF
	}
	var (
		m    message
		p    = scanner{spans: &m.spans}
		kept []byte // what came in earlier chunks
	)
	select {
	case kept = <-s.spare:
	default:
	}
	fail := func(desc string) (message, error) {
		s.broken, s.unread = true, nil
		m.text = kept
		return message{}, &syntaxError{desc, m.raw(memberID)}
	}
	for {
		if m.size == 0 {
			s.unread = s.unread[leadingSpace(s.unread):]
		}
		if len(s.unread) == 0 {
			n, err := s.r.Read(s.chunk)
			switch s.unread = s.chunk[:n]; {
			case n > 0: // an error comes again with the next call
			case err == nil:
			case m.size > 0 && errors.Is(err, io.EOF):
				return message{}, io.ErrUnexpectedEOF
			default:
				return message{}, err
			}
			continue
		}
		n, done, err := p.scan(s.unread)
		part := s.unread[:n]
		if err != nil {
			kept = append(kept, part...)
			return fail(err.Error())
		}
		if m.size += n; m.size > s.limit && !s.discard {
			kept = append(kept, part...)
			return fail(fmt.Sprintf("message of more than %d bytes", s.limit))
		}
		s.unread = s.unread[n:]
		if m.kept = !done || m.size > n; m.kept {
			part = part[:min(n, s.limit-len(kept))]
			if cap(kept)-len(kept) < len(part) {
				kept = slices.Grow(kept, max(cap(kept), len(part))) // append would grow it by less, and copy more
			}
			kept = append(kept, part...)
			m.text = kept
		} else {
			m.text = part[:min(n, s.limit)]
			s.release(kept)
		}
		if !done {
			continue
		}
		// Bytes that were discarded go to nobody; the rest must be UTF-8.
		if p.high && m.size == len(m.text) && !utf8.Valid(m.text) {
			kept = m.text
			return fail("JSON parse error, a string is not UTF-8")
		}
		m.newlines = p.newlines
		return m, nil
	}
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

// keyMax is more than any known name needs with each byte written as \u00XX.
const keyMax = 64

// scan takes the next piece, which at the start of a value has no white space
// before it, and says how many of its bytes belong to the value. A number that
// is a value by itself ends before the first byte that cannot belong to it.
func (s *scanner) scan(b []byte) (n int, done bool, err error) {
	bad := func(i int) (int, bool, error) {
		return i, false, fmt.Errorf("JSON parse error, unexpected byte %q at offset %d", b[i:i+1], s.off+i)
	}
	blockEnd, blockPlain := 0, false // of b, looked through by isPlain
	for i := 0; i < len(b); i++ {
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
			if s.depth > 1 {
				if i >= blockEnd {
					blockEnd = min(i+blockSize, len(b))
					blockPlain = s.isPlain(b[i:blockEnd])
				}
				if blockPlain {
					i = s.skipStrings(b[:blockEnd], i)
				}
			}
			var all byte
			start := i
			for i < len(b) && plain[b[i]] {
				all |= b[i]
				i++
			}
			s.high = s.high || all >= 0x80
			if s.key {
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
// w-ones*' ' from that of one below ' '.
const ones, tops = 0x0101010101010101, 0x8080808080808080

// blockSize is how much is looked through at once: one special byte makes its block slow.
const blockSize = 2048

// isPlain says whether a block has only bytes that mean nothing special in a
// string, and quotes; and it notes whether some are ≥ 0x80.
func (s *scanner) isPlain(b []byte) bool {
	if bytes.IndexByte(b, '\\') >= 0 {
		return false
	}
	var below, all uint64
	for ; len(b) >= 8; b = b[8:] {
		w := binary.LittleEndian.Uint64(b)
		below |= (w - ones*' ') &^ w
		all |= w
	}
	for _, c := range b {
		all |= uint64(c)
		if c < ' ' {
			below = tops
		}
	}
	s.high = s.high || all&tops != 0
	return below&tops == 0
}

// skipStrings goes on from inside of a string of a plain block to its end and over
// further ones, as long as they are apart as QEMU writes them. Most of a large answer
// is that. It stops inside of a string, or at the quote that ends one. Only for
// strings whose text nobody wants: below the outermost value's members.
func (s *scanner) skipStrings(b []byte, i int) int {
	const (
		afterKey = uint32('"') | ':'<<8 | ' '<<16 | '"'<<24
		nextItem = uint32('"') | ','<<8 | ' '<<16 | '"'<<24
		// The last string of an object in an array, and the first key of the next one.
		nextObject = uint64('"') | '}'<<8 | ','<<16 | ' '<<24 | '{'<<32 | '"'<<40
	)
	object, objects := s.inObject(), s.inArrayOfObjects()
	for i <= len(b)-8 {
		w := binary.LittleEndian.Uint64(b[i:])
		x := w ^ ones*'"'
		end := (x - ones) &^ x & tops
		if end == 0 {
			i += 8
			continue
		}
		i += bits.TrailingZeros64(end) / 8
		if i > len(b)-8 {
			break
		}
		switch w = binary.LittleEndian.Uint64(b[i:]); {
		case s.key && uint32(w) == afterKey:
			s.key = false
			i += 4
		case s.key:
			return i
		case uint32(w) == nextItem:
			s.key = object
			i += 4
		case objects && w<<16 == nextObject<<16:
			s.key = true
			i += 6
		default:
			return i
		}
	}
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

// inArrayOfObjects says whether this is an object that an array below the outermost value holds.
func (s *scanner) inArrayOfObjects() bool {
	d := s.depth - 2
	return d > 0 && s.inObject() && s.nesting[d/8]&(1<<(d%8)) == 0
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
