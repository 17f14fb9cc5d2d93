package initramfs

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"

	"github.com/stubinit/stubinit/initramfs/initramfstest"
)

type (
	ELF  = initramfstest.ELF
	tree = map[string]string
)

const (
	libDir = "usr/lib/x86_64-linux-gnu/"
	interp = "/lib64/ld-linux-x86-64.so.2"
	modDir = "usr/lib/modules/6.12.1-amd64/"
)

// with is the small Debian with some files changed; an empty content removes one.
func with(changes tree) tree {
	all := initramfstest.Debian()
	for path, content := range changes {
		if all[path] = content; content == "" {
			delete(all, path)
		}
	}
	return all
}

// config writes the tree and an init to a folder.
func config(t testing.TB, files tree, manifest string) Config {
	t.Helper()
	dir := t.TempDir()
	initramfstest.Write(t, dir, tree{"init": string(ELF{Content: "init"}.Bytes())})
	initramfstest.Write(t, filepath.Join(dir, "root"), files)
	return Config{Root: filepath.Join(dir, "root"), Init: filepath.Join(dir, "init"), Manifest: parse(t, manifest)}
}

func build(t testing.TB, files tree, manifest string) *Image {
	t.Helper()
	im, err := Build(t.Context(), config(t, files, manifest))
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// paths lists the entries that match none of the folders, as PATH or PATH -> TARGET.
func paths(im *Image) []string {
	var list []string
	for _, e := range im.Entries {
		switch {
		case e.Mode&fs.ModeSymlink != 0:
			list = append(list, e.Path+" -> "+e.Target)
		case !e.Mode.IsDir():
			list = append(list, e.Path)
		}
	}
	return list
}

func TestBuild(t *testing.T) {
	im := build(t, initramfstest.Debian(), initramfstest.DebianManifest)
	want := []string{
		"/dev/console",
		"/etc/stubinit/modules",
		"/init",
		"/lib -> usr/lib",
		"/lib64 -> usr/lib64",
		"/usr/lib/modules/6.12.1-amd64/kernel/net/bridge.ko",
		"/usr/lib/modules/6.12.1-amd64/kernel/net/llc.ko",
		"/usr/lib/modules/6.12.1-amd64/kernel/net/stp.ko",
		"/usr/lib/modules/6.12.1-amd64/kernel/xen-privcmd.ko",
		"/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
		"/usr/lib/x86_64-linux-gnu/libc.so.6",
		"/usr/lib/x86_64-linux-gnu/libz.so.1 -> libz.so.1.3.1",
		"/usr/lib/x86_64-linux-gnu/libz.so.1.3.1",
		"/usr/lib64/ld-linux-x86-64.so.2 -> /lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
		"/usr/libexec/qemu",
		"/usr/share/qemu/efi-e1000.rom",
		"/usr/share/seabios/vgabios.bin",
		"/~unpacked",
	}
	if diff := cmp.Diff(want, paths(im)); diff != "" {
		t.Errorf("entries (-want +got):\n%s", diff)
	}
	list := find(t, im, ModulesList)
	if diff := cmp.Diff("/usr/lib/modules/6.12.1-amd64/kernel/xen-privcmd.ko unrestricted=1\n"+
		"/usr/lib/modules/6.12.1-amd64/kernel/net/llc.ko\n"+
		"/usr/lib/modules/6.12.1-amd64/kernel/net/stp.ko\n"+
		"/usr/lib/modules/6.12.1-amd64/kernel/net/bridge.ko\n", string(list.Data)); diff != "" {
		t.Errorf("modules (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"xen_fbfront"}, im.BuiltIn); diff != "" {
		t.Errorf("built in (-want +got):\n%s", diff)
	}
	modes := map[string]fs.FileMode{}
	for _, p := range []string{"/tmp", "/dev/console", "/init", "/usr/libexec/qemu", "/usr/share/qemu/efi-e1000.rom", "/usr"} {
		modes[p] = find(t, im, p).Mode
	}
	if diff := cmp.Diff(map[string]fs.FileMode{
		"/tmp":                          fs.ModeDir | fs.ModeSticky | 0o777,
		"/dev/console":                  fs.ModeDevice | fs.ModeCharDevice | 0o600,
		"/init":                         0o755,
		"/usr/libexec/qemu":             0o755,
		"/usr/share/qemu/efi-e1000.rom": 0o644,
		"/usr":                          fs.ModeDir | 0o755,
	}, modes); diff != "" {
		t.Errorf("modes (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"needed by /usr/libexec/qemu"}, find(t, im, "/usr/lib/x86_64-linux-gnu/libz.so.1.3.1").Why); diff != "" {
		t.Errorf("reason (-want +got):\n%s", diff)
	}
}

func find(t testing.TB, im *Image, path string) *Entry {
	t.Helper()
	for _, e := range im.Entries {
		if e.Path == path {
			return e
		}
	}
	t.Fatalf("no %s in the image", path)
	return nil
}

// TestLibrarySearch has one program, /usr/bin/p, and looks where its library came from.
func TestLibrarySearch(t *testing.T) {
	program := func(e ELF) string {
		e.Interp = interp
		return string(e.Bytes())
	}
	x := []string{"libx.so"}
	lib := string(ELF{}.Bytes())
	for _, test := range []struct {
		name  string
		files tree
		want  []string // of the entries whose names hold libx or liby
	}{
		{"built-in folder", tree{"usr/bin/p": program(ELF{Needed: x}), libDir + "libx.so": lib, "usr/lib/libx.so": lib},
			[]string{"/usr/lib/x86_64-linux-gnu/libx.so"}},
		{"runpath goes first", tree{"usr/bin/p": program(ELF{Needed: x, RunPath: "/opt/none:/opt/a"}), "opt/a/libx.so": lib, libDir + "libx.so": lib},
			[]string{"/opt/a/libx.so"}},
		{"$ORIGIN", tree{"usr/bin/p": program(ELF{Needed: x, RunPath: "$ORIGIN/../own"}), "usr/own/libx.so": lib},
			[]string{"/usr/own/libx.so"}},
		{"$LIB", tree{"usr/bin/p": program(ELF{Needed: x, RunPath: "/opt/${LIB}"}), "opt/lib/x86_64-linux-gnu/libx.so": lib},
			[]string{"/opt/lib/x86_64-linux-gnu/libx.so"}},
		{"rpath holds for libraries below", tree{"usr/bin/p": program(ELF{Needed: x, RPath: "/opt/a"}),
			"opt/a/libx.so": string(ELF{Needed: []string{"liby.so"}}.Bytes()), "opt/a/liby.so": lib, libDir + "liby.so": lib},
			[]string{"/opt/a/libx.so", "/opt/a/liby.so"}},
		{"runpath does not", tree{"usr/bin/p": program(ELF{Needed: x, RunPath: "/opt/a"}),
			"opt/a/libx.so": string(ELF{Needed: []string{"liby.so"}}.Bytes()), "opt/a/liby.so": lib, libDir + "liby.so": lib},
			[]string{"/opt/a/libx.so", "/usr/lib/x86_64-linux-gnu/liby.so"}},
		{"rpath is void beside runpath", tree{"usr/bin/p": program(ELF{Needed: x, RPath: "/opt/a", RunPath: "/opt/b"}),
			"opt/a/libx.so": lib, "opt/b/libx.so": lib},
			[]string{"/opt/b/libx.so"}},
		{"another machine's is passed over", tree{"usr/bin/p": program(ELF{Needed: x, RunPath: "/opt/a"}),
			"opt/a/libx.so": string(ELF{Machine: elf.EM_AARCH64}.Bytes()), "usr/lib/libx.so": lib},
			[]string{"/usr/lib/libx.so"}},
		{"ld.so.conf's folder gets a link", tree{"usr/bin/p": program(ELF{Needed: x}), "etc/ld.so.conf": "include ld.so.conf.d/*.conf\n",
			"etc/ld.so.conf.d/a.conf": "# none\n/opt/a # here\n", "opt/a/libx.so": lib},
			[]string{"/opt/a/libx.so", "/usr/lib/x86_64-linux-gnu/libx.so -> /opt/a/libx.so"}},
		{"a path", tree{"usr/bin/p": program(ELF{Needed: []string{"/opt/a/libx.so"}}), "opt/a/libx.so": lib},
			[]string{"/opt/a/libx.so"}},
		{"a circle", tree{"usr/bin/p": program(ELF{Needed: x}), libDir + "libx.so": string(ELF{Needed: []string{"liby.so"}}.Bytes()),
			libDir + "liby.so": string(ELF{Needed: x}.Bytes())},
			[]string{"/usr/lib/x86_64-linux-gnu/libx.so", "/usr/lib/x86_64-linux-gnu/liby.so"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			im := build(t, with(test.files), "program /usr/bin/p")
			got := slices.DeleteFunc(paths(im), func(p string) bool { return !strings.Contains(p, "libx") && !strings.Contains(p, "liby") })
			if diff := cmp.Diff(test.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestMissing(t *testing.T) {
	c := config(t, with(tree{
		libDir + "libz.so.1":           "",
		modDir + "kernel/net/llc.ko":   "",
		"usr/share/qemu/efi-e1000.rom": "",
	}), initramfstest.DebianManifest+"file /etc/absent\nlibrary libabsent.so\nlibrary? libabsent2.so\nfile? /etc/absent2\nmodule absent\n")
	_, err := Build(t.Context(), c)
	var missing *MissingError
	if !errors.As(err, &missing) || !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("error %v", err)
	}
	want := strings.ReplaceAll(`ROOT lacks 7 of what the image needs:
  library libz.so.1 (/usr/libexec/qemu)
  firmware efi-e1000.rom in /usr/share/qemu, /usr/share/seabios (m:8 firmware efi-e1000.rom)
  module llc of Linux 6.12.1-amd64 (needed by module bridge)
  module llc of Linux 6.12.1-amd64 (needed by module stp)
  /etc/absent (m:15 file /etc/absent)
  library libabsent.so (m:16 library libabsent.so)
  module absent of Linux 6.12.1-amd64 (m:19 module absent)`, "ROOT", c.Root)
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestBuildErrors(t *testing.T) {
	for _, test := range []struct {
		name, manifest, want string
		files                tree
		change               func(*Config)
	}{
		{name: "no kernel", files: tree{"boot/vmlinuz-6.12.1-amd64": ""}, want: "no kernel"},
		{name: "two kernels", files: tree{"boot/vmlinuz-6.1": "x"}, want: "has 2 kernels, choose one: 6.1 6.12.1-amd64"},
		{name: "other kernel", change: func(c *Config) { c.Kernel = "7" }, want: "boot/vmlinuz-7: no such file"},
		{name: "no bzImage", files: tree{"boot/vmlinuz-6.12.1-amd64": strings.Repeat("x", 4096)}, want: "is not an x86 bzImage"},
		{name: "short kernel", files: tree{"boot/vmlinuz-6.12.1-amd64": "x"}, want: "is not an x86 bzImage"},
		{name: "no init", change: func(c *Config) { c.Init += "x" }, want: "initx: no such file"},
		{name: "dynamic init", files: tree{}, change: func(c *Config) { c.Init = filepath.Join(c.Root, "usr/libexec/qemu") }, want: "is not static: build it with CGO_ENABLED=0"},
		{name: "script as init, its interpreter absent", files: tree{"init": "#!/bin/sh -e\n"}, change: func(c *Config) { c.Init = filepath.Join(c.Root, "init") }, want: "is a script for /bin/sh, which is not in the image"},
		{name: "script as init without interpreter", files: tree{"init": "#! \n"}, change: func(c *Config) { c.Init = filepath.Join(c.Root, "init") }, want: "begins with #! and names no interpreter"},
		{name: "text as init", change: func(c *Config) { c.Init = filepath.Join(c.Root, "var/lib/dpkg/status") }, want: "is not an ELF file"},
		{name: "init of another machine", files: tree{"init2": string(ELF{Machine: elf.EM_AARCH64}.Bytes())},
			change: func(c *Config) { c.Init = filepath.Join(c.Root, "init2") }, manifest: "qemu /usr/libexec/qemu", want: "is for EM_AARCH64, the programs in the image are for EM_X86_64"},
		{name: "program is a script", files: tree{"p": "#!/bin/sh\n" + strings.Repeat("#", 64)}, manifest: "program /p", want: "/p: bad magic number"},
		{name: "program is a folder", files: tree{"p": "dir"}, manifest: "program /p", want: "/p is not a regular file"},
		{name: "library before programs", manifest: "library libc.so.6", want: "no program before it that is not static"},
		{name: "module is no module", files: tree{modDir + "kernel/x.ko": string(ELF{}.Bytes())}, manifest: "module x", want: "no section .modinfo: not a kernel module"},
		{name: "module is no ELF file", files: tree{modDir + "kernel/x.ko": "x"}, manifest: "module x", want: "module x: "},
		{name: "packed module is damaged", files: tree{modDir + "kernel/x.ko.gz": "x"}, manifest: "module x", want: "x.ko.gz: "},
		{name: "a file where a folder is", manifest: "file /boot/config-6.12.1-amd64\ndir /boot/config-6.12.1-amd64 0755", want: "is there already as another thing (m:1 file"},
		{name: "a folder in a file", manifest: "file /boot/config-6.12.1-amd64\ndir /boot/config-6.12.1-amd64/x 0755", want: "which is no folder (m:1 file"},
		{name: "ld.so.conf includes itself", files: tree{"etc/ld.so.conf": "include /etc/ld.so.conf"}, manifest: "program /usr/libexec/qemu", want: "includes itself"},
		{name: "modules are a file", files: tree{"usr/lib/modules/7": "x", "boot/vmlinuz-7": string(initramfstest.BzImage(1, ""))}, change: func(c *Config) { c.Kernel = "7" }, want: "is not a folder"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := config(t, with(test.files), test.manifest)
			if test.change != nil {
				test.change(&c)
			}
			if _, err := Build(t.Context(), c); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q in it", err, test.want)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Build(ctx, config(t, with(nil), "dir /x 0755")); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: error %v", err)
	}
}

func TestModules(t *testing.T) {
	module := func(info ...string) string { return string(ELF{Modinfo: info}.Bytes()) }
	pack := func(content string, writer func(io.Writer) io.WriteCloser) string {
		var b bytes.Buffer
		w := writer(&b)
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	a := module("depends=b-dash,c", "softdep=pre: absent d post: e", "alias=x")
	cmd := exec.Command("xz", "--stdout")
	cmd.Stdin = strings.NewReader(a)
	xz, err := cmd.Output()
	if err != nil {
		t.Fatalf("xz: %v: install xz-utils", err)
	}
	im := build(t, with(tree{
		modDir + "kernel/a.ko.xz":      string(xz),
		modDir + "kernel/b-dash.ko.gz": pack(module("depends="), func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }),
		modDir + "kernel/c.ko.zst": pack(module("depends=xen_fbfront"), func(w io.Writer) io.WriteCloser {
			z, err := zstd.NewWriter(w)
			if err != nil {
				t.Fatal(err)
			}
			return z
		}),
		modDir + "kernel/d.ko": module("depends=", "softdep=pre: a"), // a circle
		modDir + "kernel/e.ko": module("depends="),
	}), "module a\nmodule b_dash x=1 y=2\nmodule? absent")
	const prefix = "/" + modDir + "kernel/"
	if diff := cmp.Diff([]Module{
		{"d", prefix + "d.ko", ""},
		{"b_dash", prefix + "b-dash.ko", "x=1 y=2"},
		{"c", prefix + "c.ko", ""},
		{"a", prefix + "a.ko", ""},
	}, im.Modules); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := find(t, im, prefix+"a.ko").Data; string(got) != a {
		t.Errorf("a.ko has %d bytes, want the %d that were packed", len(got), len(a))
	}
	if diff := cmp.Diff([]string{"xen_fbfront"}, im.BuiltIn); diff != "" {
		t.Errorf("built in (-want +got):\n%s", diff)
	}
}

func TestProbeQEMU(t *testing.T) {
	c := config(t, initramfstest.Debian(), initramfstest.DebianManifest)
	var command []string
	c.ProbeQEMU = func(_ context.Context, args []string) ([]byte, error) {
		command = args
		return []byte("{}\n"), nil
	}
	im, err := Build(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	host := func(p string) string { return filepath.Join(c.Root, p) }
	if diff := cmp.Diff([]string{host(libDir + "ld-linux-x86-64.so.2"), "--library-path", host("usr/lib/x86_64-linux-gnu"),
		host("usr/libexec/qemu")}, command); diff != "" {
		t.Errorf("command (-want +got):\n%s", diff)
	}
	if got := string(find(t, im, QEMUAbilities).Data); got != "{}\n" {
		t.Errorf("%s is %q", QEMUAbilities, got)
	}

	var said []string
	c.Progress = func(s string) { said = append(said, s) }
	c.ProbeQEMU = func(context.Context, []string) ([]byte, error) { return nil, errors.New("exec format error") }
	if im, err = Build(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if slices.ContainsFunc(im.Entries, func(e *Entry) bool { return e.Path == QEMUAbilities }) {
		t.Errorf("%s is there without an answer", QEMUAbilities)
	}
	if want := QEMUAbilities + " left out: exec format error"; !slices.Contains(said, want) {
		t.Errorf("said %q, want %q", said, want)
	}

	c.ProbeQEMU = func(context.Context, []string) ([]byte, error) { return nil, context.DeadlineExceeded }
	if _, err = Build(t.Context(), c); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("an answer that is too late: error %v", err)
	}
}

func archive(t testing.TB, im *Image, c Compression) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := im.WriteArchive(t.Context(), &b, c); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// Two trees with the same content, unpacked at other times under another umask, give the same bytes.
func TestReproducible(t *testing.T) {
	one := config(t, initramfstest.Debian(), initramfstest.DebianManifest)
	two := config(t, initramfstest.Debian(), initramfstest.DebianManifest)
	err := filepath.WalkDir(two.Root, func(name string, e fs.DirEntry, err error) error {
		if err != nil || e.Type() == fs.ModeSymlink {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		if err := os.Chmod(name, info.Mode()&0o700); err != nil {
			return err
		}
		return os.Chtimes(name, time.Time{}, time.Unix(1e9, 0))
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []Compression{LZ4, Zstd, Gzip, None, Zstd19} {
		var got [2][]byte
		for i, config := range []Config{one, two} {
			im, err := Build(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			got[i] = archive(t, im, c)
		}
		if !bytes.Equal(got[0], got[1]) {
			t.Errorf("%v: two builds differ", c)
		}
	}
}

func TestArchive(t *testing.T) {
	im := build(t, initramfstest.Debian(), initramfstest.DebianManifest)
	plain := archive(t, im, None)
	if int64(len(plain)) != im.ArchiveSize() {
		t.Errorf("archive has %d bytes, ArchiveSize says %d", len(plain), im.ArchiveSize())
	}

	zr, err := zstd.NewReader(bytes.NewReader(archive(t, im, Zstd)), zstd.WithDecoderMaxWindow(window))
	if err != nil {
		t.Fatal(err)
	}
	defer zr.Close()
	gr, err := gzip.NewReader(bytes.NewReader(archive(t, im, Gzip)))
	if err != nil {
		t.Fatal(err)
	}
	zr19, err := zstd.NewReader(bytes.NewReader(archive(t, im, Zstd19)), zstd.WithDecoderMaxWindow(window))
	if err != nil {
		t.Fatal(err)
	}
	defer zr19.Close()
	packed := archive(t, im, LZ4)
	if magic := "\x02\x21\x4c\x18"; !bytes.HasPrefix(packed, []byte(magic)) { // ARCHIVE_MAGICNUMBER of lib/decompress_unlz4.c
		t.Errorf("LZ4 begins with % x, want % x", packed[:4], magic)
	}
	for name, r := range map[string]io.Reader{"lz4": lz4.NewReader(bytes.NewReader(packed)), "zstd": zr, "zstd-19": zr19, "gzip": gr} {
		if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s: unpacks to %d bytes, error %v, want %d", name, len(got), err, len(plain))
		}
	}

	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(plain)))
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]cpio.Info{}
	var last string
	for i, r := range records {
		if r.UID != 0 || r.GID != 0 || r.MTime != 0 || r.Ino != uint64(i+1) || r.NLink != 1 {
			t.Errorf("%s: %v", r.Name, r.Info)
		}
		dir := filepath.Dir(r.Name)
		if dir != "." && seen[dir].Mode&cpio.S_IFMT != cpio.S_IFDIR {
			t.Errorf("%s comes before its folder", r.Name)
		}
		if r.Name <= last {
			t.Errorf("%s comes after %s", r.Name, last)
		}
		last = r.Name
		seen[r.Name] = r.Info
	}
	if last != Unpacked[1:] {
		t.Errorf("%s comes last, want %s", last, Unpacked)
	}
	for name, want := range map[string]cpio.Info{
		"dev/console": {Mode: cpio.S_IFCHR | 0o600, Rmajor: 5, Rminor: 1},
		"tmp":         {Mode: cpio.S_IFDIR | 0o1777},
		"init":        {Mode: cpio.S_IFREG | 0o755, FileSize: uint64(len(ELF{Content: "init"}.Bytes()))},
		"lib":         {Mode: cpio.S_IFLNK | 0o777, FileSize: 7},
	} {
		got := seen[name]
		got = cpio.Info{Mode: got.Mode, Rmajor: got.Rmajor, Rminor: got.Rminor, FileSize: got.FileSize}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

// A source that changed since it was counted must not make a broken archive.
func TestArchiveSourceChanged(t *testing.T) {
	c := config(t, initramfstest.Debian(), initramfstest.DebianManifest)
	im, err := Build(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(c.Root, "usr/libexec/qemu")); err != nil {
		t.Fatal(err)
	}
	if err := im.WriteArchive(t.Context(), io.Discard, Zstd); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

func TestUnpacks(t *testing.T) {
	for _, test := range []struct {
		config string
		want   []Compression
	}{
		{"CONFIG_RD_GZIP=y\nCONFIG_RD_ZSTD=y\nCONFIG_RD_LZ4=y\n", []Compression{LZ4, Zstd, Gzip, None}},
		{"CONFIG_RD_GZIP=y\nCONFIG_RD_ZSTD=y\n", []Compression{Zstd, Gzip, None}},
		{"CONFIG_RD_GZIP=y\n# CONFIG_RD_ZSTD is not set\n", []Compression{Gzip, None}},
		{"CONFIG_X=y\n", []Compression{None}},
		{"", []Compression{Gzip, None}}, // no file
	} {
		im := build(t, with(tree{"boot/config-6.12.1-amd64": test.config}), "")
		if diff := cmp.Diff(test.want, im.Kernel.Unpacks()); diff != "" {
			t.Errorf("%q (-want +got):\n%s", test.config, diff)
		}
	}
	for _, c := range []Compression{LZ4, Zstd, Gzip, None, Zstd19} {
		if got, err := ParseCompression(c.String()); got != c || err != nil {
			t.Errorf("%v: %v, %v", c, got, err)
		}
	}
	if _, err := ParseCompression("xz"); err == nil {
		t.Error("xz passed")
	}
}

func TestMemory(t *testing.T) {
	im := &Image{Kernel: &Kernel{Release: "6.12.1-amd64", Loaded: 44 * mib, Kept: 39 * mib}, Entries: []*Entry{
		{Path: "/a", Size: 1}, {Path: "/b", Size: 50*mib - 1}, {Path: "/c", Mode: fs.ModeDir},
		{Path: "/d", Mode: fs.ModeSymlink, Size: 127}, {Path: "/e", Mode: fs.ModeSymlink, Size: 128},
	}}
	m := im.Memory(17 * mib)
	want := Memory{Kernel: 39 * mib, Init: 5 * mib, Tables: 13 * mib, Running: 8 * mib, Packed: 17 * mib,
		Unpacked: 50*mib + 2*page + 5*inode, QEMU: 12 * mib, Agent: 3 * mib}
	if diff := cmp.Diff(want, m); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	// (39 + 5 + 3 + 17 + 2·50.01) · 4096/4016, and (39 + 5 + 13 + 17 + 50.01 + 10) · 4096/4016.
	if m.Least() != 168 || m.LeastRamfs() != 137 {
		t.Errorf("least %d, with ramfs %d", m.Least(), m.LeastRamfs())
	}
	// The unpacking is what needs most: (39 + 5 + 13 + 40 + 10 + 10) · 4096/4016.
	m.Packed, m.Unpacked = 40*mib, 10*mib
	if m.Least() != 120 || m.LeastRamfs() != 120 {
		t.Errorf("big archive: least %d, with ramfs %d", m.Least(), m.LeastRamfs())
	}
	// What runs is: (8 + 3 + 8 + 13 + 12 + 3) · 4096/4016.
	small := Memory{Kernel: 8 * mib, Init: 2 * mib, Tables: 3 * mib, Running: 8 * mib, Packed: 4 * mib, Unpacked: 13 * mib, QEMU: 12 * mib, Agent: 3 * mib}
	if small.Least() != 48 || small.LeastRamfs() != 48 {
		t.Errorf("small: least %d, with ramfs %d", small.Least(), small.LeastRamfs())
	}
}

func TestTraceEvents(t *testing.T) {
	for _, test := range []struct {
		release string
		config  map[string]string
		want    int64
	}{
		{"6.1.0-56-amd64", map[string]string{"EVENT_TRACING": "y"}, traceEvents},
		{"5.19.1", nil, traceEvents},
		{"6.5.0", map[string]string{"X": "y"}, 0},
		{"6.6.1", map[string]string{"EVENT_TRACING": "y"}, 0},
		{"6.12.1", nil, 0},
		{"7.0", nil, 0},
		{"stubdom", nil, 0},
	} {
		im := &Image{Kernel: &Kernel{Release: test.release, config: test.config}}
		if m := im.Memory(0); m.Tables != test.want {
			t.Errorf("%s, %v: tables %d, want %d", test.release, test.config, m.Tables, test.want)
		}
	}
}

func TestModuleSignature(t *testing.T) {
	const ko = modDir + "kernel/x.ko"
	plain := string(initramfstest.Debian()[modDir+"kernel/net/llc.ko"])
	if plain == "" {
		t.Fatal("no module in the test's Debian")
	}
	sign := func(length string) string {
		return plain + "SIGNATURE" + strings.Repeat("\x00", 8) + length + "~Module signature appended~\n"
	}
	for name, test := range map[string]struct{ config, content, want string }{
		"unsigned":         {"", plain, plain},
		"signed":           {"", sign("\x00\x00\x00\x09"), plain},
		"kernel insists":   {"CONFIG_MODULE_SIG_FORCE=y\n", sign("\x00\x00\x00\x09"), sign("\x00\x00\x00\x09")},
		"length is absurd": {"", sign("\xff\xff\xff\xff"), sign("\xff\xff\xff\xff")},
	} {
		t.Run(name, func(t *testing.T) {
			im := build(t, tree{"lib": "-> usr/lib", "boot/vmlinuz-6.12.1-amd64": string(initramfstest.BzImage(1, "")), "boot/config-6.12.1-amd64": test.config, ko: test.content}, "module x")
			if got := string(find(t, im, "/"+ko).Data); got != test.want {
				t.Errorf("%d bytes, want %d", len(got), len(test.want))
			}
		})
	}
}

func TestScriptInit(t *testing.T) {
	c := config(t, tree{"boot/vmlinuz-6": string(initramfstest.BzImage(1, "")), "usr/bin/sh": string(ELF{}.Bytes()), "init": "#! /usr/bin/sh -e\n"}, "file /usr/bin/sh")
	c.Init = filepath.Join(c.Root, "init")
	im, err := Build(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if got := find(t, im, "/init"); got.Source != c.Init || got.Mode != 0o755 {
		t.Errorf("/init is %+v", got)
	}
}

func TestWrite(t *testing.T) {
	im := build(t, initramfstest.Debian(), initramfstest.DebianManifest)
	dir := filepath.Join(t.TempDir(), "new", "out")
	out, err := im.Write(t.Context(), dir, Gzip)
	if err != nil {
		t.Fatal(err)
	}
	read := func(name string) []byte {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	if !bytes.Equal(read(ArchiveFile), archive(t, im, Gzip)) || int64(len(read(ArchiveFile))) != out.Packed {
		t.Error("the archive in the folder is another one")
	}
	if !bytes.Equal(read(KernelFile), initramfstest.BzImage(48<<20, "")) {
		t.Error("the kernel in the folder is another one")
	}
	least, ramfs, err := ReportedLeast(dir)
	if err != nil || least != out.Memory.Least() || ramfs != out.Memory.LeastRamfs() {
		t.Errorf("the report has %d and %d MiB (%v), want %d and %d", least, ramfs, err, out.Memory.Least(), out.Memory.LeastRamfs())
	}
	report := string(read(ReportFile))
	qemu := find(t, im, "/usr/libexec/qemu").Size
	for _, want := range []string{
		"  qemu-stubdom-linux-kernel  Linux 6.12.1-amd64, 1552 bytes\n",
		"  qemu-stubdom-linux-rootfs  gzip, ",
		"qemu-system-xen 1:10.0 qemu\n            with pixman (= 1), zlib (= 2)\n",
		"libc6 2.41-12 libc6\n",
		"  xen_privcmd unrestricted=1\n",
		"/usr/libexec/qemu\n",
	} {
		if !strings.Contains(report, want) {
			t.Errorf("report lacks %q:\n%s", want, report)
		}
	}
	if strings.Contains(report, "unused") {
		t.Errorf("report names a package of which nothing is in the image:\n%s", report)
	}
	packages, err := im.packages()
	if diff := cmp.Diff([]Package{
		{Name: "libc6", Version: "2.41-12", Bytes: find(t, im, "/"+libDir+"libc.so.6").Size},
		{Name: "qemu-system-xen", Version: "1:10.0", Source: "qemu", BuiltUsing: "pixman (= 1), zlib (= 2)", Bytes: qemu},
	}, packages); diff != "" || err != nil {
		t.Errorf("packages: %v (-want +got):\n%s", err, diff)
	}
	// Again: the same report, and no leftovers.
	if _, err := im.Write(t.Context(), dir, Gzip); err != nil {
		t.Fatal(err)
	}
	if got := string(read(ReportFile)); got != report {
		t.Errorf("second report (-want +got):\n%s", cmp.Diff(report, got))
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 3 {
		t.Errorf("%d files in the folder, want 3 (%v)", len(entries), err)
	}
	other := t.TempDir()
	if _, _, err := ReportedLeast(other); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no report: %v", err)
	}
	if err := os.WriteFile(filepath.Join(other, ReportFile), []byte("stubdomain_memory 5 at most\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, _, err := ReportedLeast(other); err == nil || !strings.Contains(err.Error(), other) {
		t.Errorf("a report without the line: %v", err)
	}
	// A failure leaves what was there.
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := im.Write(ctx, dir, Gzip); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 3 {
		t.Errorf("%d files after a failure, want 3", len(entries))
	}
}

func TestList(t *testing.T) {
	im := build(t, initramfstest.Debian(), "dir /tmp 1777\nnode /dev/console 0600 c 5 1\nfile /usr/share/qemu/efi-e1000.rom\nlink /x y\nmodule xen-fbfront")
	var b strings.Builder
	if err := im.List(&b); err != nil {
		t.Fatal(err)
	}
	want := `drwxr-xr-x         0 /dev  [holds /dev/console]
Dcrw-------         0 /dev/console (5, 1)  [m:2 node /dev/console]
drwxr-xr-x         0 /etc  [holds /etc/stubinit]
drwxr-xr-x         0 /etc/stubinit  [holds /etc/stubinit/modules]
-rw-r--r--         0 /etc/stubinit/modules  [load order]
-rwxr-xr-x      SIZE /init  [init]
dtrwxrwxrwx         0 /tmp  [m:1 dir /tmp]
drwxr-xr-x         0 /usr  [holds /usr/share]
drwxr-xr-x         0 /usr/share  [holds /usr/share/qemu]
drwxr-xr-x         0 /usr/share/qemu  [holds /usr/share/qemu/efi-e1000.rom]
-rw-r--r--         3 /usr/share/qemu/efi-e1000.rom  [m:3 file /usr/share/qemu/efi-e1000.rom]
Lrwxrwxrwx         1 /x -> y  [m:4 link /x]
-rw-r--r--         0 /~unpacked  [comes last]
# module xen_fbfront is built into Linux 6.12.1-amd64
`
	want = strings.Replace(want, "     SIZE", fmt.Sprintf("%9d", find(t, im, "/init").Size), 1)
	got := b.String()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestReasons(t *testing.T) {
	im := build(t, initramfstest.Debian(), strings.Repeat("file /usr/share/qemu/efi-e1000.rom\n", 5))
	var b strings.Builder
	if err := im.List(&b); err != nil {
		t.Fatal(err)
	}
	if want := "[m:1 file /usr/share/qemu/efi-e1000.rom; m:2 file /usr/share/qemu/efi-e1000.rom; m:3 file /usr/share/qemu/efi-e1000.rom; and 2 more]"; !strings.Contains(b.String(), want) {
		t.Errorf("no %q in\n%s", want, b.String())
	}
}

// Whatever a tree has for modules and libraries, reading it ends in an answer or an error.
func FuzzELF(f *testing.F) {
	f.Add(ELF{Interp: interp, Needed: []string{"libc.so.6"}, RPath: "/a:/b", RunPath: "$ORIGIN", Modinfo: []string{"depends=a,b", "softdep=pre: c"}}.Bytes())
	f.Add(ELF{}.Bytes())
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, content []byte) {
		if err := os.WriteFile(filepath.Join(dir, "x"), content, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := root(dir).readObject("/x"); err != nil && !strings.Contains(err.Error(), "/x") {
			t.Errorf("error without the file's name: %v", err)
		}
		if hard, _, err := dependencies(content); err == nil && slices.Contains(hard, "") {
			t.Error("a dependency without a name")
		}
	})
}
