package wire

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
)

// Every message as xs_wire.h and docs/misc/xenstore.txt have it.
func TestGolden(t *testing.T) {
	for _, tt := range []struct {
		name string
		m    Message
		want string
	}{
		{"directory", Message{Directory, 1, 0, Join("device")}, "\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00device\x00"},
		{"read", Message{Read, 0x01020304, 9, Join("/a")}, "\x02\x00\x00\x00\x04\x03\x02\x01\x09\x00\x00\x00\x03\x00\x00\x00/a\x00"},
		{"get permissions", Message{GetPerms, 2, 0, Join("a")}, "\x03\x00\x00\x00\x02\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00a\x00"},
		{"watch", Message{Watch, 3, 0, Join("device/vif", "7")}, "\x04\x00\x00\x00\x03\x00\x00\x00\x00\x00\x00\x00\x0d\x00\x00\x00device/vif\x007\x00"},
		{"unwatch", Message{Unwatch, 4, 0, Join("a", "7")}, "\x05\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00a\x007\x00"},
		{"start transaction", Message{TransactionStart, 5, 0, Join("")}, "\x06\x00\x00\x00\x05\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00"},
		{"end transaction", Message{TransactionEnd, 6, 0xfffffffe, Join("T")}, "\x07\x00\x00\x00\x06\x00\x00\x00\xfe\xff\xff\xff\x02\x00\x00\x00T\x00"},
		{"write", Message{Write, 7, 0, append(Join("a"), "v\x80"...)}, "\x0b\x00\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00a\x00v\x80"},
		{"mkdir", Message{Mkdir, 8, 0, Join("a")}, "\x0c\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00a\x00"},
		{"remove", Message{Remove, 9, 0, Join("a")}, "\x0d\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00a\x00"},
		{"set permissions", Message{SetPerms, 10, 0, Join("a", "n5", "r0")}, "\x0e\x00\x00\x00\x0a\x00\x00\x00\x00\x00\x00\x00\x08\x00\x00\x00a\x00n5\x00r0\x00"},
		{"watch event", Message{WatchEvent, 0, 0, Join("a/b", "7")}, "\x0f\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x06\x00\x00\x00a/b\x007\x00"},
		{"error", Message{Error, 11, 0, Join("ENOENT")}, "\x10\x00\x00\x00\x0b\x00\x00\x00\x00\x00\x00\x00\x07\x00\x00\x00ENOENT\x00"},
		{"directory part", Message{DirectoryPart, 12, 0, Join("a", "0")}, "\x16\x00\x00\x00\x0c\x00\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00a\x000\x00"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.m.Type.String(); got != tt.name {
				t.Errorf("String() = %q", got)
			}
			if diff := cmp.Diff(tt.want, string(tt.m.Append(nil))); diff != "" {
				t.Error(diff)
			}
			// Messages span reads.
			got, err := Receive(iotest.OneByteReader(strings.NewReader(tt.want)))
			if diff := cmp.Diff(tt.m, got); err != nil || diff != "" {
				t.Error(err, diff)
			}
		})
	}
	if got := Type(20).String(); got != "type 20" {
		t.Errorf("Type(20) = %q", got)
	}
}

func TestReceiveErrors(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		is       error
	}{
		{"", "EOF", io.EOF},
		{"\x02\x00\x00", "3 of the 16 bytes of a header: unexpected EOF", io.ErrUnexpectedEOF},
		{"\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00", `0 of the 2 bytes of a message of type "read": unexpected EOF`, io.ErrUnexpectedEOF},
		{"\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00a", `1 of the 2 bytes of a message of type "read": unexpected EOF`, io.ErrUnexpectedEOF},
		{"\x02\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x01\x10\x00\x00", `bad header: payload of 4097 bytes in a message of type "read", the limit is 4096`, nil},
	} {
		_, err := Receive(strings.NewReader(tt.in))
		if err == nil || err.Error() != tt.want {
			t.Errorf("Receive(%q) = %v, want %s", tt.in, err, tt.want)
		}
		if tt.is != nil && !errors.Is(err, tt.is) {
			t.Errorf("Receive(%q) = %v is not %v", tt.in, err, tt.is)
		}
	}
}

func TestSplit(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want []string
	}{
		{"", nil},
		{"\x00", []string{""}},
		{"a\x00", []string{"a"}},
		{"a\x00\x00b\x80\x00", []string{"a", "", "b\x80"}},
	} {
		got, err := Split([]byte(tt.in))
		if diff := cmp.Diff(tt.want, got); err != nil || diff != "" {
			t.Errorf("Split(%q): %v %s", tt.in, err, diff)
		}
		if back := string(Join(got...)); back != tt.in {
			t.Errorf("Join = %q, want %q", back, tt.in)
		}
	}
	if _, err := Split([]byte("a\x00b")); err == nil {
		t.Error("a string without its NUL passed")
	}
}

func TestErrors(t *testing.T) {
	if err := ParseError(Join("ENOENT")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("ENOENT = %v", err)
	}
	for name, errno := range errnos {
		if got := ParseError(Join(name)); got != errno {
			t.Errorf("%s = %v", name, got)
		}
		if got := ErrorName(errno); got != name {
			t.Errorf("ErrorName(%d) = %s, want %s", errno, got, name)
		}
	}
	if got := ErrorName(syscall.ENOTTY); got != "EINVAL" {
		t.Errorf("ErrorName(ENOTTY) = %s", got)
	}
	for _, in := range []string{"", "ENOENT", "EWHAT\x00", "ENOENT\x00ENOENT\x00"} {
		var errno syscall.Errno
		if err := ParseError([]byte(in)); err == nil || errors.As(err, &errno) {
			t.Errorf("ParseError(%q) = %v", in, err)
		}
	}
}

// FuzzReceive: whatever comes is an error or messages that encode to the same bytes.
func FuzzReceive(f *testing.F) {
	f.Add(Message{Read, 1, 2, Join("a")}.Append(nil))
	f.Add(Message{Error, 1, 2, Join("EAGAIN")}.Append(Message{WatchEvent, 0, 0, Join("a", "1")}.Append(nil)))
	f.Fuzz(func(t *testing.T, in []byte) {
		r := bytes.NewReader(in)
		var out []byte
		for {
			m, err := Receive(r)
			if err != nil {
				if err == io.EOF && !bytes.Equal(in, out) {
					t.Fatalf("%q became %q", in, out)
				}
				return
			}
			if list, err := Split(m.Payload); err == nil && !bytes.Equal(Join(list...), m.Payload) {
				t.Fatalf("%q became %q", m.Payload, list)
			}
			if ParseError(m.Payload) == nil {
				t.Fatalf("no error from %q", m.Payload)
			}
			out = m.Append(out)
		}
	})
}
