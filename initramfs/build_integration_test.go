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
		"boot/vmlinuz-6": string(initramfstest.BzImage(1, "")),
	})
	in := func(p string) string { return filepath.Join(tree, p) }
	run(work, "gcc", "-shared", "-fPIC", "-o", in("opt/rpath/libb.so"), "b.c")
	run(work, "gcc", "-shared", "-fPIC", "-o", in("opt/rpath/liba.so"), "a.c", "-L"+in("opt/rpath"), "-lb")
	run(work, "gcc", "-shared", "-fPIC", "-o", in("opt/conf/libc1.so"), "c.c")
	// liba has no path of its own: libb is found by the program's DT_RPATH, which holds for what is below it.
	run(work, "gcc", "-o", in("bin/p"), "main.c", "-L"+in("opt/rpath"), "-L"+in("opt/conf"), "-la", "-lb", "-lc1",
		"-Wl,--disable-new-dtags,-rpath,/opt/rpath") // not $ORIGIN: ld.so needs /proc for that
	run(work, "gcc", "-static", "-o", "init", "init.c")

	copyLibc(t, tree, run(work, "ldd", "/bin/true"))

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

// TestRealAbsent lets ld.so load stand-ins: of a library with versioned symbols and of one without, in a program that binds all
// symbols at its start. It runs as long as it calls neither.
func TestRealAbsent(t *testing.T) {
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Fatalf("%v: install gcc and libc6-dev", err)
	}
	if os.Getuid() != 0 {
		t.Fatal("chroot needs root")
	}
	work := t.TempDir()
	tree := filepath.Join(work, "root")
	initramfstest.Write(t, work, map[string]string{
		"versioned.c": `
			int old_call(void) { return 1; }
			int new_call(void) { return 2; }
			__asm__(".symver old_call,call@V_1");
			__asm__(".symver new_call,call@@V_2");
			int never(void) { return 3; }`,
		"versioned.map": "V_1 { local: *; }; V_2 { global: never; } V_1;",
		"plain.c":       "int plain(void) { return 4; }\nint data = 5;",
		"init.c":        "int main(void) { return 0; }",
		"main.c": `
			#include <stdio.h>
			int call(void), plain(void);
			int main(int argc, char **argv) {
				int (*volatile pointer)(void) = plain;
				if (argc > 1)
					printf("called %d\n", *argv[1] == 'v' ? call() : pointer());
				printf("fine\n");
				return 0;
			}`,
		"data.c": "extern int data; int main(void) { return data; }",
	})
	initramfstest.Write(t, tree, map[string]string{
		"bin": "dir", "usr/lib": "dir", "lib": "-> usr/lib", "lib64": "-> usr/lib",
		"boot/vmlinuz-6": string(initramfstest.BzImage(1, "")),
	})
	in := func(p string) string { return filepath.Join(tree, p) }
	run := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = work
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	run("gcc", "-shared", "-fPIC", "-o", in("usr/lib/libversioned.so.1"), "versioned.c", "-Wl,-soname,libversioned.so.1,--version-script,versioned.map")
	run("gcc", "-shared", "-fPIC", "-o", in("usr/lib/libplain.so"), "plain.c", "-Wl,-soname,libplain.so")
	run("gcc", "-pie", "-o", in("bin/p"), "main.c", in("usr/lib/libversioned.so.1"), in("usr/lib/libplain.so"), "-Wl,-z,now")
	run("gcc", "-fPIC", "-pie", "-o", in("bin/data"), "data.c", in("usr/lib/libplain.so"))
	run("gcc", "-static", "-o", "init", "init.c")
	copyLibc(t, tree, run("ldd", "/bin/true"))

	const absent = "absent libversioned.so.1 nobody calls it\nabsent libplain.so nor this\n"
	c := Config{Root: tree, Init: filepath.Join(work, "init"), Manifest: parse(t, absent+"program /bin/p")}
	im, err := Build(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	unpacked := filepath.Join(work, "unpacked")
	for _, e := range im.Entries {
		to := filepath.Join(unpacked, e.Path)
		content := e.Data
		if e.Source != "" {
			if content, err = os.ReadFile(e.Source); err != nil {
				t.Fatal(err)
			}
		}
		switch {
		case e.Mode.IsDir():
			err = os.MkdirAll(to, 0o755)
		case e.Mode.IsRegular():
			err = os.WriteFile(to, content, e.Mode)
		default:
			err = os.Symlink(e.Target, to)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		args []string
		want string
		code int
	}{
		{nil, "fine\n", 0}, // no warning of ld.so either
		{[]string{"versioned"}, "QEMU called libversioned.so.1, which this image leaves out: nobody calls it\n", 127},
		{[]string{"plain"}, "QEMU called libplain.so, which this image leaves out: nor this\n", 127},
	} {
		cmd := exec.CommandContext(t.Context(), "chroot", append([]string{unpacked, "/bin/p"}, test.args...)...)
		out, err := cmd.CombinedOutput()
		if got := cmd.ProcessState.ExitCode(); string(out) != test.want || got != test.code {
			t.Errorf("%q: exit %d (%v), output %q; want %d, %q", test.args, got, err, out, test.code, test.want)
		}
	}

	c.Manifest = parse(t, absent+"program /bin/data")
	if _, err := Build(t.Context(), c); err == nil || !strings.Contains(err.Error(), "/bin/data takes data from it, which is no function (STT_OBJECT)") {
		t.Errorf("a variable of an absent library: error %v", err)
	}
}

// copyLibc puts the C library of this machine into a tree, where its own ld.so says that it is.
func copyLibc(t *testing.T, tree, ldd string) {
	t.Helper()
	for _, word := range strings.Fields(ldd) {
		if !filepath.IsAbs(word) {
			continue
		}
		content, err := os.ReadFile(word)
		if err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(tree, word) // through the links lib and lib64
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(to, content, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}
