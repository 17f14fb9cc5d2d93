package wire

import (
	"bytes"
	"errors"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestAppend(t *testing.T) {
	got := Append(nil, Frame{Kind: Stdout, ID: 0x01020304, Data: []byte("hi")})
	want := []byte{0, 0, 0, 2, 7, 1, 2, 3, 4, 'h', 'i'}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("encoding (-want +got):\n%s", diff)
	}
}

func TestReadWrite(t *testing.T) {
	frames := []Frame{
		{Kind: Hello, Data: []byte{}},
		{Kind: Stdin, ID: 7, Data: bytes.Repeat([]byte{0, 0xff}, MaxData/2)},
		JSON(Exit, 7, Status{Code: 3, Error: "gone"}),
	}
	var b bytes.Buffer
	for _, f := range frames {
		if err := Write(&b, f); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range frames {
		got, err := Read(&b)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("frame (-want +got):\n%s", diff)
		}
	}
	if _, err := Read(&b); err != io.EOF {
		t.Errorf("after the last frame: %v, want EOF", err)
	}
	if err := Write(&b, Frame{Kind: Stdin, Data: make([]byte, MaxData+1)}); err == nil {
		t.Error("a frame too long was written")
	}
}

func TestReadBad(t *testing.T) {
	for name, in := range map[string][]byte{
		"no such kind": {0, 0, 0, 0, 99, 0, 0, 0, 0},
		"too long":     {0, 1, 0, 0, 7, 0, 0, 0, 0},
		"cut header":   {0, 0, 0},
		"cut data":     {0, 0, 0, 2, 7, 0, 0, 0, 0, 'x'},
	} {
		if f, err := Read(bytes.NewReader(in)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: %v, %v: want an error that is not EOF", name, f, err)
		}
	}
}
