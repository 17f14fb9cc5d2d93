package qmpbridge

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"testing/iotest"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
)

// split gives all values of a stream and how it ended.
func split(s *splitter) (values []string, ids []string, end error) {
	for {
		m, err := s.next()
		if err != nil {
			return values, ids, err
		}
		values = append(values, string(m.text))
		ids = append(ids, string(m.raw(memberID)))
	}
}

func TestSplit(t *testing.T) {
	deep := strings.Repeat("[", maxDepth)
	for _, tt := range []struct {
		name, in string
		want     []string
		err      string
	}{
		{"libxl's lines", "{\"a\":1}\r\n{\"b\":2}\r\n", []string{`{"a":1}`, `{"b":2}`}, "EOF"},
		{"no line end", `{"a":1}`, []string{`{"a":1}`}, "EOF"},
		{"two on a line", `{} {}[]{}`, []string{`{}`, `{}`, `[]`, `{}`}, "EOF"},
		{"over lines", "{\n \"a\" : [\n1 ,2 ]\n}\n", []string{"{\n \"a\" : [\n1 ,2 ]\n}"}, "EOF"},
		{"scalars", "1 -2.5e+3\n\"x\" true false null 0", []string{"1", "-2.5e+3", `"x"`, "true", "false", "null"}, "unexpected EOF"},
		{"touching", `1"a"truefalse`, []string{"1", `"a"`, "true", "false"}, "EOF"},
		{"quotes and braces in strings", `{"a":"}\"]\\"}{}`, []string{`{"a":"}\"]\\"}`, `{}`}, "EOF"},
		{"escapes", `"\u00e9\n\/\uD83D\ude00"`, []string{`"\u00e9\n\/\uD83D\ude00"`}, "EOF"},
		{"UTF-8", `{"é":"😀"}`, []string{`{"é":"😀"}`}, "EOF"},
		{"deepest", deep + strings.Repeat("]", maxDepth), []string{deep + strings.Repeat("]", maxDepth)}, "EOF"},
		{"too deep", deep + "[", nil, "JSON parse error, nested deeper than 1024"},
		{"cut off", `{"a":`, nil, "unexpected EOF"},
		{"not UTF-8", "{\"a\":\"\xff\"}", nil, "JSON parse error, a string is not UTF-8"},
		{"control byte in a string", "{\"a\":\"\x01\"}", nil, `JSON parse error, unexpected byte "\x01" at offset 6`},
		{"single quotes", `{'a':1}`, nil, `JSON parse error, unexpected byte "'" at offset 1`},
		{"text", "{}\nhello {}", []string{"{}"}, `JSON parse error, unexpected byte "h" at offset 0`},
		{"stray end", `{}}`, []string{"{}"}, `JSON parse error, unexpected byte "}" at offset 0`},
		{"wrong end", `[1}`, nil, `JSON parse error, unexpected byte "}" at offset 2`},
		{"no value", `{"a":}`, nil, `JSON parse error, unexpected byte "}" at offset 5`},
		{"trailing comma", `{"a":1,}`, nil, `JSON parse error, unexpected byte "}" at offset 7`},
		{"trailing comma in array", `[1,]`, nil, `JSON parse error, unexpected byte "]" at offset 3`},
		{"leading zero", `[01]`, nil, `JSON parse error, unexpected byte "1" at offset 2`},
		{"bare minus", `[-]`, nil, `JSON parse error, unexpected byte "]" at offset 2`},
		{"bare point", `[1.]`, nil, `JSON parse error, unexpected byte "]" at offset 3`},
		{"bare exponent", `[1e+]`, nil, `JSON parse error, unexpected byte "]" at offset 4`},
		{"wrong literal", `[nul]`, nil, `JSON parse error, unexpected byte "]" at offset 4`},
		{"wrong escape", `"\x"`, nil, `JSON parse error, unexpected byte "x" at offset 2`},
		{"wrong hex", `"\u00g0"`, nil, `JSON parse error, unexpected byte "g" at offset 5`},
		{"white space only", " \r\n\t", nil, "EOF"},
		{"nothing", "", nil, "EOF"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			readers := map[string]io.Reader{
				"whole":       strings.NewReader(tt.in),
				"single byte": iotest.OneByteReader(strings.NewReader(tt.in)),
				"data + EOF":  iotest.DataErrReader(strings.NewReader(tt.in)),
			}
			for name, r := range readers {
				got, _, err := split(newSplitter(r.Read, 1<<20, false))
				if d := cmp.Diff(tt.want, got); d != "" {
					t.Errorf("%s: values (-want +got):\n%s", name, d)
				}
				if err.Error() != tt.err {
					t.Errorf("%s: ended with %q, want %q", name, err, tt.err)
				}
			}
		})
	}
}

func TestMembers(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want map[member]string
	}{
		{`{"execute":"stop","id":7}`, map[member]string{memberExecute: `"stop"`, memberID: "7"}},
		{`{ "id" : {"a":[1, 2]} , "return" : {"id":3,"error":{}} }`, map[member]string{memberID: `{"a":[1, 2]}`, memberReturn: `{"id":3,"error":{}}`}},
		{`{"id":1,"id":-2.50e1}`, map[member]string{memberID: "-2.50e1"}},
		{`{"\u0069\u0064":"\u00e9"}`, map[member]string{memberID: `"\u00e9"`}},
		{`{"ID":1,"Execute":2,"identity":3,"i":4,"":5}`, nil},
		{`{"x":{"id":1,"execute":"stop"}}`, nil},
		{`["id",{"id":1}]`, nil},
		{`{"QMP":{},"event":"STOP","error":null,"exec-oob":true,"arguments":[]}`, map[member]string{
			memberGreeting: "{}", memberEvent: `"STOP"`, memberError: "null", memberExecOOB: "true", memberArguments: "[]"}},
		{`{"` + strings.Repeat(`\u0069`, 9) + strings.Repeat("x", 99) + `":1,"id":2}`, map[member]string{memberID: "2"}},
	} {
		for _, r := range []io.Reader{strings.NewReader(tt.in), iotest.OneByteReader(strings.NewReader(tt.in))} {
			m, err := newSplitter(r.Read, 1<<20, false).next()
			if err != nil {
				t.Fatalf("%s: %v", tt.in, err)
			}
			got := map[member]string{}
			for f := range members {
				if m.has(f) {
					got[f] = string(m.raw(f))
				}
			}
			if len(got) == 0 {
				got = nil
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("%s (-want +got):\n%s", tt.in, d)
			}
		}
	}
}

func TestSplitLimit(t *testing.T) {
	fits := `{"return":"` + strings.Repeat("x", 80) + `"}`
	over := `{"id":5,"return":"` + strings.Repeat("y", 500) + `","error":6}`
	limit := len(fits)
	for _, chunk := range []int{1, 7, chunkSize} {
		in := func() io.Reader { return &chunked{strings.NewReader(fits + over + fits), chunk} }

		s := newSplitter(in().Read, limit, false)
		got, _, err := split(s)
		if d := cmp.Diff([]string{fits}, got); d != "" {
			t.Errorf("chunks of %d (-want +got):\n%s", chunk, d)
		}
		var bad *syntaxError
		if !errors.As(err, &bad) || string(bad.id) != "5" || bad.desc != fmt.Sprintf("message of more than %d bytes", limit) {
			t.Errorf("chunks of %d: got error %v with id %s", chunk, err, bad.id)
		}
		if _, err := s.next(); err != io.EOF {
			t.Errorf("after an error: %v, want EOF", err)
		}

		s = newSplitter(in().Read, limit, true)
		for i, want := range []string{fits, over, fits} {
			m, err := s.next()
			if err != nil {
				t.Fatal(err)
			}
			if m.size != len(want) || string(m.text) != want[:min(limit, len(want))] {
				t.Errorf("chunks of %d: value %d has %d bytes, %q", chunk, i, m.size, m.text)
			}
			if i == 1 && (!m.has(memberReturn) || !m.has(memberError) || string(m.raw(memberID)) != "5" || m.raw(memberError) != nil) {
				t.Errorf("chunks of %d: members of a cut value: %v", chunk, m.spans)
			}
		}
	}
}

type chunked struct {
	r io.Reader
	n int
}

func (c *chunked) Read(b []byte) (int, error) { return c.r.Read(b[:min(len(b), c.n)]) }

// FuzzSplit compares the splitter with encoding/json.
func FuzzSplit(f *testing.F) {
	for _, s := range []string{
		"{\"execute\":\"qmp_capabilities\",\"id\":1}\r\n{\"execute\":\"cont\"}\r\n",
		`{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}`,
		`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}`,
		`[-0.5e-7,1E9,"\ud800",true,null,{}]1 2"x"`,
		"{\"\\u0069d\":\"\xc3\xa9\"}",
		strings.Repeat(`{"a":[`, 20),
		"\"\xff\"", "\x01{}", `{'a':1}`, `01`, `{"id":1,"id":2}`,
	} {
		f.Add([]byte(s), uint16(3))
	}
	f.Fuzz(func(t *testing.T, in []byte, seed uint16) {
		const limit = 1 << 20
		values, ids, err := split(newSplitter(bytes.NewReader(in).Read, limit, false))
		again, _, err2 := split(newSplitter((&chunked{bytes.NewReader(in), 1 + int(seed%17)}).Read, limit, false))
		if d := cmp.Diff(values, again); d != "" || err.Error() != err2.Error() {
			t.Fatalf("the size of reads matters: %v, %v\n%s", err, err2, d)
		}
		dec := json.NewDecoder(bytes.NewReader(in))
		for i := 0; ; i++ {
			var want json.RawMessage
			derr := dec.Decode(&want)
			switch {
			case derr == nil && i < len(values):
				if string(want) != values[i] {
					t.Fatalf("value %d is %q, want %q", i, values[i], want)
				}
				if !utf8.ValidString(values[i]) {
					t.Fatalf("value %d is not UTF-8", i)
				}
				var object map[string]json.RawMessage
				if json.Unmarshal(want, &object) == nil && string(object["id"]) != ids[i] {
					t.Fatalf("id is %q, want %q", ids[i], object["id"])
				}
				continue
			case derr == nil: // only these differences are meant
				number := want[0] == '-' || '0' <= want[0] && want[0] <= '9'
				deep := bytes.Count(want, []byte("["))+bytes.Count(want, []byte("{")) > maxDepth
				if utf8.Valid(want) && !deep && !(number && err == io.ErrUnexpectedEOF) {
					t.Fatalf("%q was refused: %v", want, err)
				}
			case i < len(values):
				t.Fatalf("%q was taken, json says %v", values[i], derr)
			}
			return
		}
	})
}

func BenchmarkSplit(b *testing.B) {
	var big bytes.Buffer
	rng := rand.New(rand.NewPCG(1, 2))
	big.WriteString(`{"return": [`)
	for i := 0; big.Len() < 900<<10; i++ {
		if i > 0 {
			big.WriteString(", ")
		}
		// As in query-qmp-schema's answer, and what it has not.
		fmt.Fprintf(&big, `{"name": "%d", "members": [{"name": "type", "type": "int"}, {"name": "%x", "default": null, "type": "str"}], "meta-type": "object"}`, i, rng.Uint32())
		if i%100 == 0 {
			fmt.Fprintf(&big, `, {"n": %d, "t": [true, -1.5e3], "text": "a\n\"b\" é"}`, i)
		}
	}
	big.WriteString(`], "id": "libxl-1"}`)
	b.SetBytes(int64(big.Len()))
	b.ReportAllocs()
	s := newSplitter((&repeated{text: big.Bytes()}).Read, MaxAnswer, true)
	for b.Loop() {
		m, err := s.next()
		if err != nil || m.size != big.Len() {
			b.Fatal(m.size, err)
		}
		s.drop(m)
	}
}

// repeated is text without an end.
type repeated struct {
	text []byte
	off  int
}

func (r *repeated) Read(b []byte) (int, error) {
	n := copy(b, r.text[r.off:])
	r.off = (r.off + n) % len(r.text)
	return n, nil
}
