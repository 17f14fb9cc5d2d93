package initramfs

import (
	"errors"
	"io/fs"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/initramfs/initramfstest"
)

func TestResolve(t *testing.T) {
	dir := t.TempDir()
	initramfstest.Write(t, dir, map[string]string{
		"usr/lib/a":  "a",
		"lib":        "-> usr/lib",
		"abs":        "-> /lib/a",
		"escape":     "-> ../../../../../../../usr/lib/a",
		"usr/up":     "-> ../lib/./a",
		"loop":       "-> loop",
		"dangling":   "-> /nowhere",
		"usr/parent": "-> ..",
	})
	for _, test := range []struct {
		path, real string
		links      []link
		err        error
	}{
		{path: "/usr/lib/a", real: "/usr/lib/a"},
		{path: "/lib/a", real: "/usr/lib/a", links: []link{{"/lib", "usr/lib"}}},
		{path: "/abs", real: "/usr/lib/a", links: []link{{"/abs", "/lib/a"}, {"/lib", "usr/lib"}}},
		{path: "/escape", real: "/usr/lib/a", links: []link{{"/escape", "../../../../../../../usr/lib/a"}}},
		{path: "/usr/up", real: "/usr/lib/a", links: []link{{"/usr/up", "../lib/./a"}, {"/lib", "usr/lib"}}},
		{path: "/usr/parent", real: "/", links: []link{{"/usr/parent", ".."}}},
		{path: "/", real: "/"},
		{path: "/loop", err: syscall.ELOOP},
		{path: "/dangling", err: fs.ErrNotExist},
		{path: "/usr/lib/a/b", err: syscall.ENOTDIR},
	} {
		real, links, _, err := root(dir).resolve(test.path)
		if !errors.Is(err, test.err) || real != test.real {
			t.Errorf("%s: %q, error %v, want %q, %v", test.path, real, err, test.real, test.err)
		}
		if diff := cmp.Diff(test.links, links, cmp.AllowUnexported(link{})); diff != "" && err == nil {
			t.Errorf("%s: links (-want +got):\n%s", test.path, diff)
		}
	}
	if _, _, err := root(dir).regular("/usr/lib"); err == nil {
		t.Error("a folder passed for a file")
	}
}
