package initramfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseManifestErrors(t *testing.T) {
	for _, test := range []struct{ text, want string }{
		{"frobnicate /x", `m:1: "frobnicate" is no directive`},
		{"\n# comment\ndir /x", "m:3: dir: 1 arguments"},
		{"dir? /x 0755", "m:1: dir cannot be optional"},
		{"dir x 0755", `m:1: dir: path "x" is not absolute and clean`},
		{"dir / 0755", `m:1: dir: path "/" is not absolute and clean`},
		{"file /a/../b", `m:1: file: path "/a/../b" is not absolute and clean`},
		{"firmware-path /a b", `m:1: firmware-path: path "b" is not absolute and clean`},
		{"dir /x 0888", `m:1: mode "0888" is not octal, 7777 at most`},
		{"dir /x 10000", `m:1: mode "10000" is not octal, 7777 at most`},
		{"node /x 0600 p 1 2", `m:1: node: type "p" is neither c nor b`},
		{"node /x 0600 c x 2", `m:1: node: major: strconv.ParseUint: parsing "x": invalid syntax`},
		{"node /x 0600 c 1 -1", `m:1: node: minor: strconv.ParseUint: parsing "-1": invalid syntax`},
		{"library /lib/x.so", `m:1: library: "/lib/x.so" is a path: want a name such as libgcc_s.so.1`},
		{"absent /lib/x.so no use", `m:1: absent: "/lib/x.so" is a path: want a name such as libgcc_s.so.1`},
		{"absent libx.so", "m:1: absent: 1 arguments"},
		{"absent? libx.so no use", "m:1: absent cannot be optional"},
		{"firmware ../x", `m:1: firmware: "../x" is not a relative path`},
		{"bad\nfile /x\nworse", "m:1: \"bad\" is no directive\nm:3: \"worse\" is no directive"},
	} {
		_, err := ParseManifest(strings.NewReader(test.text), "m")
		if err == nil || err.Error() != test.want {
			t.Errorf("%q: error %v, want %s", test.text, err, test.want)
		}
	}
}

// The project's own manifests must parse, and name their packages.
func TestProjectManifests(t *testing.T) {
	files, err := filepath.Glob("../configs/*.manifest")
	if err != nil || len(files) == 0 {
		t.Fatalf("no manifest in ../configs: %v", err)
	}
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := ParseManifest(f, name); err != nil {
			t.Error(err)
		}
	}
	m := parse(t, "package a b\n  package\tc  ")
	if diff := cmp.Diff([]string{"a", "b", "c"}, m.Packages()); diff != "" {
		t.Error(diff)
	}
}

func parse(t testing.TB, text string) *Manifest {
	t.Helper()
	m, err := ParseManifest(strings.NewReader(text), "m")
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func FuzzParseManifest(f *testing.F) {
	f.Add("dir /x 1777\nnode /dev/console 0600 c 5 1\nmodule? tun a=b")
	f.Fuzz(func(t *testing.T, text string) {
		m, err := ParseManifest(strings.NewReader(text), "m")
		if err != nil {
			return
		}
		for _, l := range m.lines {
			if l.directive == "node" {
				if _, err := l.node(); err != nil {
					t.Errorf("accepted, then: %v", err)
				}
			}
		}
	})
}
