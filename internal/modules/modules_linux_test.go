package modules

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/initramfs"
)

func TestParse(t *testing.T) {
	if List != initramfs.ModulesList {
		t.Errorf("the agent reads %s, the image has %s", List, initramfs.ModulesList)
	}
	for _, tt := range []struct {
		name, in string
		want     []module
		err      string
	}{
		{"empty", "", nil, ""},
		{"paths and parameters", "/lib/a.ko\n\n# a comment\n  /lib/b.ko.xz unrestricted=1  x=\"a b\" \n/lib/c.ko",
			[]module{{"/lib/a.ko", ""}, {"/lib/b.ko.xz", `unrestricted=1  x="a b"`}, {"/lib/c.ko", ""}}, ""},
		{"carriage returns", "/lib/a.ko\r\n", []module{{"/lib/a.ko", ""}}, ""},
		{"relative", "/lib/a.ko\nb.ko", nil, `/etc/stubinit/modules:2: "b.ko" is not an absolute path`},
		{"too long", "/" + strings.Repeat("x", 70000), nil, "token too long"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parse(strings.NewReader(tt.in))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("%v, want %s", err, tt.err)
				}
				return
			}
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(module{})); d != "" || err != nil {
				t.Errorf("%v; modules (-want +got):\n%s", err, d)
			}
		})
	}
}
