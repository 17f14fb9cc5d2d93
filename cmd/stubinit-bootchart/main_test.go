package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files anew")

func chart(t *testing.T, args ...string) string {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if code := bootchart(args, &stdout, &stderr); code != 0 {
		t.Fatalf("exit code %d: %s", code, &stderr)
	}
	return stdout.String()
}

// elements returns the attributes of the picture's elements of one kind and class; it fails if the picture is no XML.
func elements(t *testing.T, picture, name, class string) []map[string]string {
	t.Helper()
	var list []map[string]string
	for d := xml.NewDecoder(strings.NewReader(picture)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok && e.Name.Local == name {
			attrs := map[string]string{}
			for _, a := range e.Attr {
				attrs[a.Name.Local] = a.Value
			}
			if attrs["class"] == class {
				list = append(list, attrs)
			}
		}
	}
}

func TestGolden(t *testing.T) {
	for name, args := range map[string][]string{
		"one.svg": {"testdata/small.log"},
		"two.svg": {"-titles", "Debian's <QEMU> & kernel,small", "testdata/debian.log", "testdata/small.log"},
	} {
		t.Run(name, func(t *testing.T) {
			got := chart(t, args...)
			elements(t, got, "", "")
			golden := filepath.Join("testdata", name)
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(want), got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestScale: both panels have one scale, so that what took twice as long is twice as wide.
func TestScale(t *testing.T) {
	kernels := elements(t, chart(t, "testdata/debian.log", "testdata/small.log"), "rect", "kernel")
	if len(kernels) != 2 {
		t.Fatalf("%d kernels", len(kernels))
	}
	var w [2]float64
	for i, k := range kernels {
		var err error
		if w[i], err = strconv.ParseFloat(k["width"], 64); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := w[0]/w[1], 8.5661/1.0492; got < want*0.99 || got > want*1.01 {
		t.Errorf("the kernels' bars are as %.2f to 1, want %.2f", got, want)
	}
}

func TestRows(t *testing.T) {
	picture := chart(t, "testdata/small.log")
	if got := len(elements(t, picture, "rect", "step")); got != 5 {
		t.Errorf("%d steps, want 5", got)
	}
	qemu := elements(t, picture, "rect", "qemu")
	if len(qemu) != 1 {
		t.Fatalf("%d bars of QEMU's start, want 1", len(qemu))
	}
	// From 1.08 s to 1.2 s of 1.2 s.
	if x, want := qemu[0]["x"], "468.0"; x != want {
		t.Errorf("QEMU's bar is at %s, want %s", x, want)
	}
	if w, want := qemu[0]["width"], "42.0"; w != want {
		t.Errorf("QEMU's bar is %s wide, want %s", w, want)
	}
}

func TestFile(t *testing.T) {
	out := filepath.Join(t.TempDir(), "x.svg")
	if got := chart(t, "-o", out, "testdata/small.log"); got != "" {
		t.Errorf("also on standard output: %q", got)
	}
	got, err := os.ReadFile(out)
	if err != nil || string(got) != chart(t, "testdata/small.log") {
		t.Errorf("the file is another picture (%v)", err)
	}
}

func TestErrors(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 2, "usage:"},
		{[]string{"a", "b", "c"}, 2, "usage:"},
		{[]string{"-titles", "a,b", "testdata/small.log"}, 2, "usage:"},
		{[]string{"-x"}, 2, "not defined"},
		{[]string{"absent"}, 1, "absent: no such file"},
		{[]string{empty}, 1, "stubinit's first line is not there"},
	} {
		var stdout, stderr bytes.Buffer
		if code := bootchart(test.args, &stdout, &stderr); code != test.code || !strings.Contains(stderr.String(), test.want) {
			t.Errorf("%q: exit code %d, %q, want %d, %q", test.args, code, &stderr, test.code, test.want)
		}
	}
}

func TestTicks(t *testing.T) {
	for end, want := range map[time.Duration]time.Duration{
		time.Millisecond: time.Millisecond, 25 * time.Millisecond: 5 * time.Millisecond,
		1200 * time.Millisecond: 200 * time.Millisecond, 11 * time.Second: 2 * time.Second, 100 * time.Second: 20 * time.Second,
	} {
		if got := tickFor(end); got != want {
			t.Errorf("%v: %v, want %v", end, got, want)
		}
	}
}
