package qemu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/initramfs"
)

func TestAbsentPath(t *testing.T) {
	if AbsentPath != initramfs.AbsentList {
		t.Errorf("the agent reads %s, the image has %s", AbsentPath, initramfs.AbsentList)
	}
}

func TestLoadAbsent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "absent")
	if a, err := LoadAbsent(path); len(a) != 0 || err != nil {
		t.Errorf("no list: %v, %v", a, err)
	}
	for _, test := range []struct {
		text string
		want Absent
	}{
		{"", Absent{}},
		{"liba.so.1 no use\nlibb.so b\n", Absent{"liba.so.1": "no use", "libb.so": "b"}},
		{"liba.so.1\n", nil},
		{"\n", nil},
	} {
		if err := os.WriteFile(path, []byte(test.text), 0o644); err != nil {
			t.Fatal(err)
		}
		a, err := LoadAbsent(path)
		if (err != nil) != (test.want == nil) || err != nil && !strings.Contains(err.Error(), path) {
			t.Errorf("%q: error %v", test.text, err)
		}
		if diff := cmp.Diff(test.want, a); diff != "" {
			t.Errorf("%q (-want +got):\n%s", test.text, diff)
		}
	}
	if _, err := LoadAbsent(filepath.Dir(path)); err == nil {
		t.Error("a folder was read")
	}
}

func TestAbsentCheck(t *testing.T) {
	const lib, reason = "libspice-server.so.1", "no network"
	absent := Absent{lib: reason}
	for _, test := range []struct {
		args string
		want *AbsentError
	}{
		{args: "-xen-domid 5 -vnc none -device VGA,vgamem_mb=16 -display none"},
		{args: "-name -spicy -device VGA,id=qxl -chardev socket,id=spicevmc -vga std -device"},
		{args: "-xen-domid 5 -spice port=0,tls-port=0,addr=127.0.0.1", want: &AbsentError{3, "-spice", lib, reason, noArgument}},
		{args: "--spice unix=on", want: &AbsentError{1, "--spice", lib, reason, noArgument}},
		{args: "-device qxl-vga,vram_size_mb=64,ram_size_mb=64 -spice x",
			want: &AbsentError{2, "-device qxl-vga,vram_size_mb=64,ram_size_mb=64", lib, reason, `write vga="stdvga"`}},
		{args: "-device VGA -device driver=qxl", want: &AbsentError{4, "-device driver=qxl", lib, reason, `write vga="stdvga"`}},
		{args: "-vga qxl", want: &AbsentError{2, "-vga qxl", lib, reason, `write vga="stdvga"`}},
		{args: "-chardev spicevmc,id=vdagent,name=vdagent", want: &AbsentError{2, "-chardev spicevmc,id=vdagent,name=vdagent", lib, reason, noArgument}},
	} {
		args := strings.Fields(test.args)
		err := absent.Check(args)
		var got *AbsentError
		if err != nil && !errors.As(err, &got) {
			t.Fatalf("%s: error %T", test.args, err)
		}
		if diff := cmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.args, diff)
		}
		for _, other := range []Absent{nil, {"libother.so": reason}} {
			if err := other.Check(args); err != nil {
				t.Errorf("%s: %v, with %v absent", test.args, err, other)
			}
		}
	}
	const want = "dm-argv argument 1: -spice needs libspice-server.so.1, which this image leaves out: no network"
	if got := absent.Check([]string{"-spice"}).Error(); got != want {
		t.Errorf("error %q, want %q", got, want)
	}
}
