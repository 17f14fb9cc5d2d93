package initramfs

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/initramfs/initramfstest"
)

type symbol = initramfstest.Symbol

const spice = "libspice.so.1"

// spiceTree has a QEMU that takes functions from spice, which needs libssl for itself and libz like QEMU.
func spiceTree(changes tree) tree {
	const f = elf.STT_FUNC
	files := with(tree{
		"usr/libexec/qemu": string(ELF{Interp: interp, Needed: []string{spice, "libz.so.1", "libc.so.6"}, Content: "qemu", Symbols: []symbol{
			{Name: "spice_new", Version: "SPICE_1", Library: spice, Type: f},
			{Name: "spice_old", Version: "SPICE_0", Library: spice, Type: f},
			{Name: "plain", Type: f}, // as of a library without versions
			{Name: "maybe", Type: f, Weak: true},
			{Name: "elsewhere", Type: f}, // another library's
			{Name: "malloc", Version: "GLIBC_2", Library: "libc.so.6", Type: f},
		}}.Bytes()),
		libDir + spice: "-> " + spice + ".2",
		libDir + spice + ".2": string(ELF{SOName: spice, Needed: []string{"libssl.so", "libz.so.1", "libc.so.6"}, Symbols: []symbol{
			{Name: "spice_new", Version: "SPICE_1", Type: f, Defined: true},
			{Name: "spice_old", Version: "SPICE_1", Type: f, Defined: true},
			{Name: "spice_old", Version: "SPICE_0", Type: elf.STT_GNU_IFUNC, Defined: true, Hidden: true},
			{Name: "spice_unused", Version: "SPICE_1", Type: f, Defined: true},
			{Name: "plain", Version: "SPICE_1", Type: f, Defined: true},
			{Name: "maybe", Type: f, Defined: true},
			{Name: "malloc", Version: "GLIBC_2", Library: "libc.so.6", Type: f},
		}}.Bytes()),
		libDir + "libssl.so": string(ELF{Needed: []string{"libc.so.6", spice}, Symbols: []symbol{{Name: "plain", Type: f}}, Content: strings.Repeat("ssl", 4000)}.Bytes()),
	})
	for path, content := range changes {
		files[path] = content
	}
	return files
}

const spiceManifest = "absent " + spice + " nobody   looks\nqemu /usr/libexec/qemu\n"

// open parses an entry's content.
func open(t testing.TB, e *Entry) *elf.File {
	t.Helper()
	f, err := elf.NewFile(bytes.NewReader(e.Data))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestAbsent(t *testing.T) {
	im := build(t, spiceTree(nil), spiceManifest)
	got := slices.DeleteFunc(paths(im), func(p string) bool { return !strings.Contains(p, ".so") })
	if diff := cmp.Diff([]string{
		"/usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
		"/usr/lib/x86_64-linux-gnu/libc.so.6",
		"/usr/lib/x86_64-linux-gnu/libspice.so.1",
		"/usr/lib/x86_64-linux-gnu/libz.so.1 -> libz.so.1.3.1",
		"/usr/lib/x86_64-linux-gnu/libz.so.1.3.1",
		"/usr/lib64/ld-linux-x86-64.so.2 -> /lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
	}, got); diff != "" {
		t.Errorf("libraries (-want +got):\n%s", diff)
	}
	if got := string(find(t, im, AbsentList).Data); got != spice+" nobody looks\n" {
		t.Errorf("%s is %q", AbsentList, got)
	}

	e := find(t, im, "/"+libDir+spice)
	f := open(t, e)
	names, err := f.DynString(elf.DT_SONAME)
	if diff := cmp.Diff([]string{spice}, names); diff != "" || err != nil {
		t.Errorf("DT_SONAME: %v (-want +got):\n%s", err, diff)
	}
	if needed, err := f.ImportedLibraries(); len(needed) > 0 || err != nil {
		t.Errorf("it needs %v (%v)", needed, err)
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		t.Fatal(err)
	}
	var defined []string
	for _, s := range symbols {
		if s.Section == elf.SHN_UNDEF || s.Info != elf.ST_INFO(elf.STB_GLOBAL, elf.STT_FUNC) || s.Value != symbols[0].Value {
			t.Errorf("%+v is not the function", s)
		}
		defined = append(defined, fmt.Sprintf("%s %s hidden=%v", s.Name, s.Version, s.VersionIndex.IsHidden()))
	}
	if diff := cmp.Diff([]string{"maybe  hidden=false", "plain  hidden=false", "spice_new SPICE_1 hidden=false", "spice_old SPICE_0 hidden=true"}, defined); diff != "" {
		t.Errorf("symbols (-want +got):\n%s", diff)
	}
	versions, err := f.DynamicVersions()
	if diff := cmp.Diff([]elf.DynamicVersion{
		{Name: spice, Index: 1, Flags: elf.VER_FLG_BASE}, {Name: "SPICE_0", Index: 2}, {Name: "SPICE_1", Index: 3},
	}, versions); diff != "" || err != nil {
		t.Errorf("versions: %v (-want +got):\n%s", err, diff)
	}

	ssl, err := os.Stat(im.root.host("/" + libDir + "libssl.so"))
	if err != nil {
		t.Fatal(err)
	}
	real, err := os.Stat(im.root.host("/" + libDir + spice + ".2"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]Absent{{Name: spice, Reason: "nobody looks", Path: e.Path, Symbols: 4, Files: []AbsentFile{
		{"/" + libDir + "libssl.so", ssl.Size()}, {"/" + libDir + spice + ".2", real.Size()},
	}}}, im.Absent); diff != "" {
		t.Errorf("left out (-want +got):\n%s", diff)
	}
	var report strings.Builder
	if err := im.report(&report); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf(`
Left out, as nothing calls it: libspice.so.1 (nobody looks).
In its place is /usr/lib/x86_64-linux-gnu/libspice.so.1, whose 4 functions say so and end QEMU. Not in the image are (bytes, path):
  %9d /usr/lib/x86_64-linux-gnu/libssl.so
  %9d /usr/lib/x86_64-linux-gnu/libspice.so.1.2
`, ssl.Size(), real.Size())
	if !strings.Contains(report.String(), want) {
		t.Errorf("report lacks %s:\n%s", want, report.String())
	}

	// What something else needs stays.
	im = build(t, spiceTree(nil), spiceManifest+"library libssl.so\n")
	if files := im.Absent[0].Files; len(files) != 1 || find(t, im, "/"+libDir+"libssl.so") == nil {
		t.Errorf("libssl is needed, and left out are %v", files)
	}
	// Nobody needs it: there is nothing to stand in for.
	im = build(t, with(nil), spiceManifest)
	if len(im.Absent) != 0 || slices.ContainsFunc(im.Entries, func(e *Entry) bool { return e.Path == AbsentList }) {
		t.Errorf("left out: %v", im.Absent)
	}
	// In a folder of ld.so.conf.
	im = build(t, spiceTree(tree{libDir + spice: string(ELF{Machine: elf.EM_AARCH64}.Bytes()), "etc/ld.so.conf": "/opt/a\n",
		"opt/a/" + spice: spiceTree(nil)[libDir+spice+".2"]}), spiceManifest)
	if got := paths(im); !slices.Contains(got, "/opt/a/"+spice) || !slices.Contains(got, "/"+libDir+spice+" -> /opt/a/"+spice) {
		t.Errorf("from /opt/a: %v", got)
	}
}

func TestAbsentErrors(t *testing.T) {
	library := func(symbols ...symbol) tree {
		return tree{libDir + spice + ".2": string(ELF{Symbols: symbols}.Bytes())}
	}
	lines := func(lines string) string { return spiceManifest + lines }
	for _, test := range []struct {
		name, manifest, want string
		files                tree
	}{
		{"data", spiceManifest, "m:1 absent libspice.so.1: /usr/libexec/qemu takes plain from it, which is no function (STT_OBJECT): a stand-in has none",
			library(symbol{Name: "spice_new", Version: "SPICE_1", Type: elf.STT_FUNC, Defined: true},
				symbol{Name: "spice_old", Version: "SPICE_0", Type: elf.STT_FUNC, Defined: true},
				symbol{Name: "plain", Type: elf.STT_OBJECT, Defined: true})},
		{"another version", spiceManifest, "m:1 absent libspice.so.1: /usr/libexec/qemu takes spice_new (version SPICE_1) from it, and it has none",
			library(symbol{Name: "spice_new", Version: "SPICE_2", Type: elf.STT_FUNC, Defined: true})},
		{"no symbols", spiceManifest, libDir + spice + ".2: no symbol section", library()},
		{"needed by a library line too", lines("library " + spice), "library libspice.so.1: the manifest says absent libspice.so.1 too", nil},
		{"wanted as a file too", lines("file /" + libDir + spice), "is there already as another thing", nil},
		{"another machine", "absent libx.so x\nprogram /usr/bin/p", "stand-ins are for x86-64, /usr/bin/p is for EM_AARCH64", tree{
			"usr/bin/p":       string(ELF{Machine: elf.EM_AARCH64, Interp: interp, Needed: []string{"libx.so"}}.Bytes()),
			"usr/lib/libx.so": string(ELF{Machine: elf.EM_AARCH64}.Bytes()),
		}},
		{"at two places", lines("program /usr/bin/p"), "/usr/libexec/qemu finds it at /lib/x86_64-linux-gnu/libspice.so.1, /usr/bin/p at /opt/libspice.so.1", tree{
			"usr/bin/p": string(ELF{Interp: interp, Needed: []string{spice}, RunPath: "/opt"}.Bytes()), "opt/" + spice: spiceTree(nil)[libDir+spice+".2"],
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := Build(t.Context(), config(t, spiceTree(test.files), test.manifest)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q in it", err, test.want)
			}
		})
	}
	var missing *MissingError
	files := spiceTree(nil)
	delete(files, libDir+spice)
	if _, err := Build(t.Context(), config(t, files, spiceManifest)); !errors.As(err, &missing) {
		t.Errorf("the tree lacks the library: error %v", err)
	}
}

// QEMU is asked with the stand-ins; if it runs only without them, that is an error.
func TestAbsentProbe(t *testing.T) {
	c := config(t, spiceTree(nil), spiceManifest)
	var dir string
	refuse := false
	c.ProbeQEMU = func(_ context.Context, command []string) ([]byte, error) {
		var with bool
		if dir, _, with = strings.Cut(command[2], ":"); !with {
			return []byte("{}"), nil
		}
		content, err := os.ReadFile(filepath.Join(dir, spice))
		if err != nil || !bytes.Contains(content, []byte("nobody looks")) {
			t.Errorf("no stand-in in %s: %v", dir, err)
		}
		if refuse {
			return nil, errors.New("symbol lookup error")
		}
		return []byte("{}"), nil
	}
	im, err := Build(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	find(t, im, QEMUAbilities)
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s was left behind (%v)", dir, err)
	}
	refuse = true
	if _, err := Build(t.Context(), c); err == nil || !strings.Contains(err.Error(), "QEMU does not start without the libraries that the manifest says are absent: symbol lookup error") {
		t.Errorf("error %v", err)
	}
}

// What ld.so relies on, for stand-ins of every size: segments that are aligned and never both writable and executable, tables that
// lie in them, and a hash table by which each symbol is found.
func TestStandIn(t *testing.T) {
	for _, count := range []int{0, 1, 2, 75, 1000} {
		t.Run(fmt.Sprint(count), func(t *testing.T) {
			s := &standIn{soname: "libx.so.1", message: "said\n", versions: []string{"V_1", "V_2"}}
			for i := range count {
				s.symbols = append(s.symbols, standInSymbol{versioned: versioned{fmt.Sprintf("function_%d", i), s.versions[i%2]}})
			}
			content := s.bytes()
			if !bytes.Equal(content, s.bytes()) {
				t.Error("two builds differ")
			}
			f := open(t, &Entry{Data: content})

			kinds := map[elf.ProgType][]elf.ProgFlag{}
			var end uint64 // of the page that the segment before ends in
			for _, p := range f.Progs {
				kinds[p.Type] = append(kinds[p.Type], p.Flags)
				if p.Type != elf.PT_LOAD {
					continue
				}
				if p.Align != page || p.Off%page != p.Vaddr%page || p.Vaddr < end || p.Off+p.Filesz > uint64(len(content)) || p.Memsz != p.Filesz {
					t.Errorf("segment %+v, the one before ends at %#x", p.ProgHeader, end)
				}
				end = align(p.Vaddr+p.Memsz, page)
			}
			const r, w, x = elf.PF_R, elf.PF_W, elf.PF_X
			if diff := cmp.Diff(map[elf.ProgType][]elf.ProgFlag{
				elf.PT_LOAD: {r, r | x, r | w}, elf.PT_DYNAMIC: {r | w}, elf.PT_GNU_STACK: {r | w},
			}, kinds); diff != "" {
				t.Errorf("segments (-want +got):\n%s", diff)
			}
			for _, section := range f.Sections {
				if section.Flags&elf.SHF_ALLOC == 0 {
					continue
				}
				if !slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool {
					return p.Type == elf.PT_LOAD && section.Addr >= p.Vaddr && section.Addr+section.Size <= p.Vaddr+p.Memsz &&
						(p.Flags&w != 0) == (section.Flags&elf.SHF_WRITE != 0) && (p.Flags&x != 0) == (section.Flags&elf.SHF_EXECINSTR != 0)
				}) {
					t.Errorf("%s is in no segment of its kind", section.Name)
				}
			}
			for tag, name := range map[elf.DynTag]string{elf.DT_HASH: ".hash", elf.DT_STRTAB: ".dynstr", elf.DT_SYMTAB: ".dynsym",
				elf.DT_VERSYM: ".gnu.version", elf.DT_VERDEF: ".gnu.version_d"} {
				if at, err := f.DynValue(tag); err != nil || !slices.Equal(at, []uint64{f.Section(name).Addr}) {
					t.Errorf("%v is %#x (%v), %s at %#x", tag, at, err, name, f.Section(name).Addr)
				}
			}
			if n, err := f.DynValue(elf.DT_VERDEFNUM); err != nil || !slices.Equal(n, []uint64{3}) {
				t.Errorf("DT_VERDEFNUM %v (%v)", n, err)
			}

			symbols, err := f.DynamicSymbols()
			if err != nil || len(symbols) != count {
				t.Fatalf("%d symbols (%v)", len(symbols), err)
			}
			raw, err := f.Section(".hash").Data()
			if err != nil {
				t.Fatal(err)
			}
			table := make([]uint32, len(raw)/4)
			for i := range table {
				table[i] = f.ByteOrder.Uint32(raw[4*i:])
			}
			for i, sym := range symbols {
				if sym.Version != s.versions[i%2] || sym.Value != f.Section(".text").Addr {
					t.Errorf("%+v", sym)
				}
				at := table[2+sysvHash(sym.Name)%table[0]]
				for at != 0 && symbols[at-1].Name != sym.Name {
					at = table[2+table[0]+at]
				}
				if at != uint32(i+1) {
					t.Errorf("%s is found as symbol %d, want %d", sym.Name, at, i+1)
				}
			}
		})
	}
	// gABI gives no examples; these are of glibc's own version names, as in every binary (vna_hash).
	for name, want := range map[string]uint32{"": 0, "GLIBC_2.2.5": 0x09691a75, "GLIBC_2.34": 0x069691b4, "GLIBC_2.17": 0x06969197} {
		if got := sysvHash(name); got != want {
			t.Errorf("hash of %q is %#08x, want %#08x", name, got, want)
		}
	}
	code := (&standIn{message: "12345678"}).code()
	if diff := cmp.Diff([]byte{
		0xbf, 2, 0, 0, 0, // mov edi, 2
		0x48, 0x8d, 0x35, 26, 0, 0, 0, // lea rsi, [rip+26]
		0xba, 8, 0, 0, 0, // mov edx, 8
		0xb8, 1, 0, 0, 0, // mov eax, write
		0x0f, 0x05, // syscall
		0xbf, 127, 0, 0, 0, // mov edi, 127
		0xb8, 231, 0, 0, 0, // mov eax, exit_group
		0x0f, 0x05, // syscall
		0x0f, 0x0b, // ud2
	}, code); diff != "" {
		t.Errorf("code (-want +got):\n%s", diff)
	}
}
