// Package initramfstest makes small package trees, with ELF files and kernels that hold just what a builder of images reads.
package initramfstest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// ELF describes a 64-bit ELF file.
type ELF struct {
	Machine elf.Machine // EM_X86_64 if zero
	Interp  string
	Needed  []string
	RPath   string
	RunPath string
	SOName  string
	Symbols []Symbol  // dynamic ones
	Modinfo []string  // strings of .modinfo, which make it a kernel module
	Content string    // more bytes, to make it differ
	Loaded  []Section // more ones, of which there are only the headers: a kernel's
}

// Section is where a section goes in memory.
type Section struct {
	Name       string
	Addr, Size uint64
}

// Symbol is a dynamic symbol.
type Symbol struct {
	Name    string
	Version string
	Library string // of an undefined symbol with a version
	Type    elf.SymType
	Defined bool
	Weak    bool
	Hidden  bool // a version that is not the default
}

// Bytes is the file.
func (e ELF) Bytes() []byte {
	const headerSize, progSize, sectionSize = 64, 56, 64
	if e.Machine == elf.EM_NONE {
		e.Machine = elf.EM_X86_64
	}
	dynstr := "\x00"
	var dynamic bytes.Buffer
	tag := func(tag elf.DynTag, value string) {
		binary.Write(&dynamic, binary.LittleEndian, elf.Dyn64{Tag: int64(tag), Val: uint64(len(dynstr))})
		dynstr += value + "\x00"
	}
	for _, name := range e.Needed {
		tag(elf.DT_NEEDED, name)
	}
	if e.RPath != "" {
		tag(elf.DT_RPATH, e.RPath)
	}
	if e.RunPath != "" {
		tag(elf.DT_RUNPATH, e.RunPath)
	}
	if e.SOName != "" {
		tag(elf.DT_SONAME, e.SOName)
	}
	binary.Write(&dynamic, binary.LittleEndian, elf.Dyn64{})
	str := func(s string) uint32 {
		dynstr += s + "\x00"
		return uint32(len(dynstr) - len(s) - 1)
	}
	dynsym, versym, verdef, verneed := e.symbolTables(str)

	type section struct {
		name    string
		kind    elf.SectionType
		content []byte
		link    uint32
	}
	sections := []section{ // links are to .dynstr, and from versions to .dynsym
		{"", elf.SHT_NULL, nil, 0},
		{".dynstr", elf.SHT_STRTAB, []byte(dynstr), 0},
		{".dynamic", elf.SHT_DYNAMIC, dynamic.Bytes(), 1},
		{".interp", elf.SHT_PROGBITS, []byte(e.Interp + "\x00"), 0},
		{".data", elf.SHT_PROGBITS, []byte(e.Content), 0},
	}
	if e.Symbols != nil {
		dynsymIndex := uint32(len(sections))
		sections = append(sections, section{".dynsym", elf.SHT_DYNSYM, dynsym, 1}, section{".gnu.version", elf.SHT_GNU_VERSYM, versym, dynsymIndex})
		if len(verdef) > 0 {
			sections = append(sections, section{".gnu.version_d", elf.SHT_GNU_VERDEF, verdef, 1})
		}
		if len(verneed) > 0 {
			sections = append(sections, section{".gnu.version_r", elf.SHT_GNU_VERNEED, verneed, 1})
		}
	}
	if e.Modinfo != nil {
		sections = append(sections, section{".modinfo", elf.SHT_PROGBITS, []byte(strings.Join(e.Modinfo, "\x00") + "\x00"), 0})
	}
	loaded := map[string]Section{}
	for _, s := range e.Loaded {
		sections = append(sections, section{s.Name, elf.SHT_NOBITS, nil, 0})
		loaded[s.Name] = s
	}
	names := ""
	for _, s := range sections {
		names += s.name + "\x00"
	}
	names += ".shstrtab\x00"
	sections = append(sections, section{".shstrtab", elf.SHT_STRTAB, []byte(names), 0})

	var body bytes.Buffer
	var headers []elf.Section64
	var interp elf.Prog64
	name := uint32(0)
	for _, s := range sections {
		offset := uint64(headerSize + progSize + body.Len())
		size := uint64(len(s.content))
		header := elf.Section64{Name: name, Type: uint32(s.kind), Off: offset, Size: size, Link: s.link, Addralign: 1}
		if l, ok := loaded[s.name]; ok {
			header.Flags, header.Addr, header.Size = uint64(elf.SHF_ALLOC), l.Addr, l.Size
		}
		headers = append(headers, header)
		if s.name == ".interp" {
			interp = elf.Prog64{Type: uint32(elf.PT_INTERP), Off: offset, Filesz: size, Memsz: size}
		}
		body.Write(s.content)
		name += uint32(len(s.name)) + 1
	}
	header := elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(e.Machine), Version: uint32(elf.EV_CURRENT),
		Phoff: headerSize, Shoff: uint64(headerSize + progSize + body.Len()),
		Ehsize: headerSize, Phentsize: progSize, Shentsize: sectionSize,
		Shnum: uint16(len(sections)), Shstrndx: uint16(len(sections) - 1),
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	header.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	if e.Interp != "" {
		header.Phnum = 1
	}
	var file bytes.Buffer
	binary.Write(&file, binary.LittleEndian, header)
	binary.Write(&file, binary.LittleEndian, interp)
	file.Write(body.Bytes())
	binary.Write(&file, binary.LittleEndian, headers)
	return file.Bytes()
}

// symbolTables are the contents of .dynsym, .gnu.version, .gnu.version_d and .gnu.version_r; str adds to .dynstr. Each version
// has an entry of its own.
func (e ELF) symbolTables(str func(string) uint32) (dynsym, versym, verdef, verneed []byte) {
	le := binary.LittleEndian
	dynsym = make([]byte, elf.Sym64Size)
	versym = le.AppendUint16(nil, 0)
	var defs, needs [][]byte
	for _, s := range e.Symbols {
		bind, section, index := elf.STB_GLOBAL, elf.SHN_UNDEF, uint16(1)
		if s.Weak {
			bind = elf.STB_WEAK
		}
		if s.Defined {
			section = elf.SHN_ABS
		}
		if s.Version != "" {
			index = uint16(2 + len(defs) + len(needs))
		}
		switch {
		case s.Version != "" && s.Defined: // Elfxx_Verdef, Elfxx_Verdaux
			def := le.AppendUint16(le.AppendUint16(le.AppendUint16(le.AppendUint16(nil, 1), 0), index), 1)
			def = le.AppendUint32(le.AppendUint32(le.AppendUint32(def, 0), 20), 28)
			defs = append(defs, le.AppendUint32(le.AppendUint32(def, str(s.Version)), 0))
		case s.Version != "": // Elfxx_Verneed, Elfxx_Vernaux
			need := le.AppendUint16(le.AppendUint16(nil, 1), 1)
			need = le.AppendUint32(le.AppendUint32(le.AppendUint32(need, str(s.Library)), 16), 32)
			need = le.AppendUint16(le.AppendUint16(le.AppendUint32(need, 0), 0), index)
			needs = append(needs, le.AppendUint32(le.AppendUint32(need, str(s.Version)), 0))
		}
		if s.Hidden {
			index |= 0x8000
		}
		versym = le.AppendUint16(versym, index)
		dynsym, _ = binary.Append(dynsym, le, elf.Sym64{Name: str(s.Name), Info: elf.ST_INFO(bind, s.Type), Shndx: uint16(section)})
	}
	last := func(entries [][]byte, next int) []byte { // its offset of the next one
		if len(entries) > 0 {
			le.PutUint32(entries[len(entries)-1][next:], 0)
		}
		return bytes.Join(entries, nil)
	}
	return dynsym, versym, last(defs, 16), last(needs, 12)
}

// BzImage is an x86 kernel, boot protocol 2.15, with an init_size of that many bytes and a payload, which is packed.
func BzImage(initSize uint32, payload string) []byte {
	const sectors, offset = 2, 16 // of 512 bytes, before the payload's segment; of the payload in that
	image := make([]byte, (sectors+1)*512+offset, (sectors+1)*512+offset+len(payload))
	image[0x1f1] = sectors
	copy(image[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(image[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(image[0x248:], offset)
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(len(payload)))
	binary.LittleEndian.PutUint32(image[0x260:], initSize)
	return append(image, payload...)
}

// Write makes a tree in dir. Keys are paths in it; a value is a file's content, or "-> TARGET" for a link, or "dir".
func Write(t testing.TB, dir string, tree map[string]string) {
	t.Helper()
	if err := WriteTree(dir, tree); err != nil {
		t.Fatal(err)
	}
}

// WriteTree is Write outside of a test.
func WriteTree(dir string, tree map[string]string) error {
	for path, content := range tree {
		name := filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		var err error
		if target, ok := strings.CutPrefix(content, "-> "); ok {
			err = os.Symlink(target, name)
		} else if content == "dir" {
			err = os.MkdirAll(name, 0o755)
		} else {
			mode := os.FileMode(0o644)
			if strings.HasPrefix(content, elf.ELFMAG) {
				mode = 0o755
			}
			err = os.WriteFile(name, []byte(content), mode)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Debian is a tree as of a small Debian with merged /usr: a QEMU with two libraries, its firmware, a kernel with modules, and
// the package database.
func Debian() map[string]string {
	const lib = "usr/lib/x86_64-linux-gnu/"
	const modules = "usr/lib/modules/6.12.1-amd64/"
	const interp = "/lib64/ld-linux-x86-64.so.2"
	return map[string]string{
		"bin": "-> usr/bin", "lib": "-> usr/lib", "lib64": "-> usr/lib64", "sbin": "-> usr/sbin",
		"usr/bin": "dir", "usr/sbin": "dir",

		"usr/libexec/qemu":    string(ELF{Interp: interp, Needed: []string{"libz.so.1", "libc.so.6"}, Content: "qemu"}.Bytes()),
		lib + "libz.so.1":     "-> libz.so.1.3.1",
		lib + "libz.so.1.3.1": string(ELF{Needed: []string{"libc.so.6"}, Content: "libz"}.Bytes()),
		lib + "libc.so.6":     string(ELF{Interp: interp, Needed: []string{"ld-linux-x86-64.so.2"}, Content: "libc"}.Bytes()),
		lib + "ld-linux-x86-64.so.2": string(ELF{
			Content: "\x00/lib/x86_64-linux-gnu/\x00/usr/lib/x86_64-linux-gnu/\x00/lib/\x00/usr/lib/\x00"}.Bytes()),
		lib + "libunused.so.1":            string(ELF{}.Bytes()),
		"usr/lib64/ld-linux-x86-64.so.2":  "-> /lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
		"usr/share/qemu/efi-e1000.rom":    "rom",
		"usr/share/seabios/vgabios.bin":   "vga",
		"boot/vmlinuz-6.12.1-amd64":       string(BzImage(48<<20, "")),
		"boot/config-6.12.1-amd64":        "# CONFIG_RD_LZ4 is not set\nCONFIG_RD_GZIP=y\nCONFIG_RD_ZSTD=y\n",
		modules + "modules.builtin":       "kernel/drivers/xen/xen-fbfront.ko\n",
		modules + "kernel/net/bridge.ko":  string(ELF{Modinfo: []string{"depends=stp,llc", "name=bridge"}}.Bytes()),
		modules + "kernel/net/stp.ko":     string(ELF{Modinfo: []string{"depends=llc"}}.Bytes()),
		modules + "kernel/net/llc.ko":     string(ELF{Modinfo: []string{"depends="}}.Bytes()),
		modules + "kernel/xen-privcmd.ko": string(ELF{Modinfo: []string{"depends="}}.Bytes()),

		"var/lib/dpkg/status":                    "Package: qemu-system-xen\nVersion: 1:10.0\nSource: qemu\nBuilt-Using: pixman (= 1), zlib (= 2)\n\nPackage: libc6\nVersion: 2.41-12\n\nPackage: unused\nVersion: 1\n",
		"var/lib/dpkg/info/qemu-system-xen.list": "/.\n/usr/libexec/qemu\n",
		"var/lib/dpkg/info/libc6:amd64.list":     "/lib/x86_64-linux-gnu/libc.so.6\n",
		"var/lib/dpkg/info/unused.list":          "/usr/lib/x86_64-linux-gnu/libunused.so.1\n",
	}
}

// DebianManifest takes what Debian has.
const DebianManifest = `# test
package qemu-system-xen linux-image-amd64
dir /dev 0755
node /dev/console 0600 c 5 1
dir /tmp 1777
qemu /usr/libexec/qemu
firmware-path /usr/share/qemu /usr/share/seabios
firmware efi-e1000.rom
firmware vgabios.bin
firmware? absent.bin
module xen-privcmd unrestricted=1
module bridge
module? xen-fbfront
module? xen-kbdfront
`
