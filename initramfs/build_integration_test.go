//go:build integration

package initramfs

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/initramfs/initramfstest"
)

// TestRealProgram builds an image of a program that gcc made, with libraries found by DT_RPATH, DT_RUNPATH and ld.so.conf, unpacks it,
// and runs the program in it: nothing of this machine is there then but its kernel.
func TestRealProgram(t *testing.T) {
	for tool, pkg := range map[string]string{"gcc": "gcc and libc6-dev", "cpio": "cpio", "zstd": "zstd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Fatalf("%v: install %s", err, pkg)
		}
	}
	if os.Getuid() != 0 {
		t.Fatal("chroot needs root")
	}
	work := t.TempDir()
	tree := filepath.Join(work, "root")
	run := func(dir, name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	initramfstest.Write(t, work, map[string]string{
		"a.c":    "int b(void); int a(void) { return b() + 1; }",
		"b.c":    "int b(void) { return 40; }",
		"c.c":    "int c(void) { return 1; }",
		"init.c": "int main(void) { return 0; }",
		"main.c": "#include <stdio.h>\nint a(void), c(void);\nint main(void) { printf(\"%d\\n\", a() + c()); return 0; }",
	})
	initramfstest.Write(t, tree, map[string]string{
		"bin": "dir", "opt/rpath": "dir", "opt/conf": "dir", "usr/lib": "dir",
		"lib": "-> usr/lib", "lib64": "-> usr/lib",
		"etc/ld.so.conf": "/opt/conf\n",
		"boot/vmlinuz-6": string(initramfstest.BzImage(1)),
	})
	in := func(p string) string { return filepath.Join(tree, p) }
	run(work, "gcc", "-shared", "-fPIC", "-o", in("opt/rpath/libb.so"), "b.c")
	run(work, "gcc", "-shared", "-fPIC", "-o", in("opt/rpath/liba.so"), "a.c", "-L"+in("opt/rpath"), "-lb")
	run(work, "gcc", "-shared", "-fPIC", "-o", in("opt/conf/libc1.so"), "c.c")
	// liba has no path of its own: libb is found by the program's DT_RPATH, which holds for what is below it.
	run(work, "gcc", "-o", in("bin/p"), "main.c", "-L"+in("opt/rpath"), "-L"+in("opt/conf"), "-la", "-lb", "-lc1",
		"-Wl,--disable-new-dtags,-rpath,/opt/rpath") // not $ORIGIN: ld.so needs /proc for that
	run(work, "gcc", "-static", "-o", "init", "init.c")

	// The C library of this machine, where its own ld.so says that it is.
	for line := range strings.Lines(run(work, "ldd", "/bin/true")) {
		for _, word := range strings.Fields(line) {
			if !filepath.IsAbs(word) {
				continue
			}
			content, err := os.ReadFile(word)
			if err != nil {
				t.Fatal(err)
			}
			to := in(word) // through the links lib and lib64
			if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(to, content, 0o755); err != nil {
				t.Fatal(err)
			}
		}
	}

	im, err := Build(t.Context(), Config{Root: tree, Init: filepath.Join(work, "init"), Manifest: parse(t, "program /bin/p")})
	if err != nil {
		t.Fatal(err)
	}
	packed := filepath.Join(work, "archive")
	if err := os.WriteFile(packed, archive(t, im, Zstd), 0o644); err != nil {
		t.Fatal(err)
	}
	unpacked := filepath.Join(work, "unpacked")
	if err := os.Mkdir(unpacked, 0o755); err != nil {
		t.Fatal(err)
	}
	run(unpacked, "sh", "-c", `zstd -dc "$1" | cpio --extract --quiet`, "sh", packed)
	if got := run(work, "chroot", unpacked, "/bin/p"); got != "42\n" {
		t.Errorf("the program printed %q, want 42", got)
	}

	// What cpio lists is what was asked for, in order.
	cmd := exec.CommandContext(t.Context(), "cpio", "--list", "--quiet")
	cmd.Stdin = bytes.NewReader(archive(t, im, None))
	list, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, e := range im.Entries {
		want = append(want, e.Path[1:])
	}
	if diff := cmp.Diff(want, strings.Fields(string(list))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}
