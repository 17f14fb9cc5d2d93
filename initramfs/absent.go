package initramfs

import (
	"bytes"
	"cmp"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
)

// AbsentList is the path in the image of the list of libraries that a stand-in takes the place of, one a line: the name, a
// space, the manifest's reason. There is no such file without them.
const AbsentList = "/etc/stubinit/absent"

// Absent is a library that was left out, with what only it needs.
type Absent struct {
	Name    string // as programs ask for it: libspice-server.so.1
	Reason  string // the manifest's
	Path    string // of the stand-in in the image
	Symbols int    // functions of the stand-in
	Files   []AbsentFile
}

// AbsentFile is a file of the tree that the image does not have.
type AbsentFile struct {
	Path  string // free of links
	Bytes int64
}

// absence is an absent line of the manifest, and who needs the library.
type absence struct {
	name, reason, why string
	// Filled in when the first one needs it.
	linker  *linker
	found   found
	real    *object
	needing []string // objects' paths
}

// leaveOut notes that o needs the library, which is at f in the tree.
func (b *builder) leaveOut(a *absence, l *linker, o *object, f found) error {
	if l.machine != elf.EM_X86_64 || l.class != elf.ELFCLASS64 {
		return fmt.Errorf("absent %s: stand-ins are for x86-64, %s is for %v", a.name, o.path, l.machine)
	}
	if o.class == elf.ELFCLASSNONE { // a library line's: no file
		return fmt.Errorf("library %s: the manifest says absent %s too", a.name, a.name)
	}
	if a.real == nil {
		real, _, err := b.root.regular(f.path)
		if err != nil {
			return err
		}
		if a.real, err = b.root.readObject(real); err != nil {
			return err
		}
		a.linker, a.found, a.real.loader = l, f, o
	}
	if a.found != f {
		return fmt.Errorf("absent %s: %s finds it at %s, %s at %s", a.name, a.needing[0], a.found.path, o.path, f.path)
	}
	if !slices.Contains(a.needing, o.path) {
		a.needing = append(a.needing, o.path)
	}
	return nil
}

// standIns adds what takes the place of the absent libraries, when all else is known.
func (b *builder) standIns() error {
	var list strings.Builder
	for _, name := range slices.Sorted(maps.Keys(b.absent)) {
		a := b.absent[name]
		if a.real == nil {
			continue
		}
		s, err := b.standIn(a)
		if err != nil {
			return fmt.Errorf("%s: %w", a.why, err)
		}
		content := s.bytes()
		dir, links, _, err := b.root.resolve(path.Dir(a.found.path))
		if err != nil {
			return err
		}
		for _, link := range links {
			if err := b.symlink(link.path, link.target, a.why); err != nil {
				return err
			}
		}
		at := path.Join(dir, path.Base(a.found.path))
		if err := b.generated(at, content, a.why); err != nil {
			return err
		}
		if a.found.conf {
			if err := b.libraryLink(a.linker, name, a.found.path, a.why); err != nil {
				return err
			}
		}
		files, err := b.onlyFor(a)
		if err != nil {
			return err
		}
		b.image.Absent = append(b.image.Absent, Absent{Name: name, Reason: a.reason, Path: at, Symbols: len(s.symbols), Files: files})
		fmt.Fprintf(&list, "%s %s\n", name, a.reason)
	}
	if list.Len() == 0 {
		return nil
	}
	return b.generated(AbsentList, []byte(list.String()), "libraries that are left out")
}

// onlyFor lists the library and what of its needs is not in the image, the biggest first.
func (b *builder) onlyFor(a *absence) ([]AbsentFile, error) {
	var files []AbsentFile
	seen := map[string]bool{}
	for queue := []*object{a.real}; len(queue) > 0; queue = queue[1:] {
		o := queue[0]
		if seen[o.path] || b.entries[o.path] != nil {
			continue
		}
		seen[o.path] = true
		info, err := os.Stat(b.root.host(o.path))
		if err != nil {
			return nil, err
		}
		files = append(files, AbsentFile{o.path, info.Size()})
		for _, name := range o.needed {
			f, err := a.linker.find(name, o)
			if errors.Is(err, fs.ErrNotExist) {
				continue // nobody misses it
			}
			if err != nil {
				return nil, fmt.Errorf("library %s, needed by %s: %w", name, o.path, err)
			}
			real, _, err := b.root.regular(f.path)
			if err != nil {
				return nil, err
			}
			next, err := b.root.readObject(real)
			if err != nil {
				return nil, err
			}
			next.loader = o
			queue = append(queue, next)
		}
	}
	slices.SortFunc(files, func(x, y AbsentFile) int {
		return cmp.Or(cmp.Compare(y.Bytes, x.Bytes), cmp.Compare(x.Path, y.Path))
	})
	return files, nil
}

// versioned is a symbol's name with its version; "" is none.
type versioned struct{ name, version string }

// standIn finds out what the library's stand-in must define: what the objects that need it take from it.
func (b *builder) standIn(a *absence) (*standIn, error) {
	s := &standIn{soname: a.name, message: fmt.Sprintf("QEMU called %s, which this image leaves out: %s\n", a.name, a.reason)}
	library, err := elf.Open(b.root.host(a.real.path))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", b.root.host(a.real.path), err)
	}
	defer library.Close()
	if names, err := library.DynString(elf.DT_SONAME); err == nil && len(names) > 0 {
		s.soname = names[0]
	}
	symbols, err := library.DynamicSymbols()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", b.root.host(a.real.path), err)
	}
	defined := map[versioned]elf.Symbol{}
	for _, sym := range symbols {
		if sym.Section == elf.SHN_UNDEF || elf.ST_BIND(sym.Info) == elf.STB_LOCAL {
			continue
		}
		defined[versioned{sym.Name, sym.Version}] = sym
		// An object that was linked without versions takes the default one.
		if unversioned := (versioned{sym.Name, ""}); sym.Version != "" && !sym.VersionIndex.IsHidden() {
			defined[unversioned] = sym
		}
	}
	imports := map[versioned]string{} // → an object that wants it
	for _, p := range a.needing {
		if err := b.imports(s, p, a.name, defined, imports); err != nil {
			return nil, err
		}
	}
	for _, want := range slices.SortedFunc(maps.Keys(imports), func(x, y versioned) int {
		return cmp.Or(strings.Compare(x.name, y.name), strings.Compare(x.version, y.version))
	}) {
		sym := defined[want]
		if kind := elf.ST_TYPE(sym.Info); kind != elf.STT_FUNC && kind != elf.STT_GNU_IFUNC {
			return nil, fmt.Errorf("%s takes %s from it, which is no function (%v): a stand-in has none", imports[want], want.name, kind)
		}
		s.symbols = append(s.symbols, standInSymbol{versioned: want, hidden: want.version != "" && sym.VersionIndex.IsHidden()})
	}
	slices.Sort(s.versions)
	return s, nil
}

// imports adds to into what the object at p takes from the library name, which defines what is in defined, and to s the
// versions that ld.so will look for.
func (b *builder) imports(s *standIn, p, name string, defined map[versioned]elf.Symbol, into map[versioned]string) error {
	host := b.root.host(p)
	f, err := elf.Open(host)
	if err != nil {
		return fmt.Errorf("%s: %w", host, err)
	}
	defer f.Close()
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return fmt.Errorf("%s: %w", host, err)
	}
	for _, sym := range symbols {
		if sym.Section != elf.SHN_UNDEF || elf.ST_BIND(sym.Info) == elf.STB_LOCAL || sym.Library != "" && sym.Library != name {
			continue
		}
		want := versioned{sym.Name, sym.Version}
		if _, ok := defined[want]; ok {
			into[want] = p
		} else if sym.Library == name && elf.ST_BIND(sym.Info) != elf.STB_WEAK {
			return fmt.Errorf("%s takes %s (version %s) from it, and it has none", p, sym.Name, sym.Version)
		}
	}
	needs, err := f.DynamicVersionNeeds()
	if err != nil && !errors.Is(err, elf.ErrNoSymbols) { // no versions at all
		return fmt.Errorf("%s: %w", host, err)
	}
	for _, need := range needs {
		if need.Name != name {
			continue
		}
		for _, dep := range need.Needs {
			if !slices.Contains(s.versions, dep.Dep) {
				s.versions = append(s.versions, dep.Dep)
			}
		}
	}
	return nil
}

// A standIn is a shared object for x86-64 Linux all of whose functions are the same one: it says message on descriptor 2 and
// ends the process with 127. It needs no other library, and ld.so has nothing to relocate in it.
//
// Sources: System V ABI (gABI), chapters 4 "Object Files" and 5 "Program Loading and Dynamic Linking"; Linux Standard Base
// 5.0, Core, "Symbol Versioning"; x86-64 psABI, A.2.1 for system calls.
type standIn struct {
	soname   string
	symbols  []standInSymbol
	versions []string // each symbol's is among them
	message  string
}

type standInSymbol struct {
	versioned
	hidden bool // not the default version of its name
}

// Sections of a stand-in, by index.
const (
	_ = iota
	dynsymSection
	dynstrSection
	hashSection
	versymSection
	verdefSection
	textSection
	dynamicSection
	shstrtabSection
	sectionCount
)

// Constants of symbol versioning that debug/elf has no names for.
const (
	verNdxGlobal  = 1      // VER_NDX_GLOBAL: of the object's base version
	verNdxHidden  = 0x8000 // only who asks for this version gets the symbol
	verdefSize    = 20     // Elfxx_Verdef
	verdauxSize   = 8      // Elfxx_Verdaux
	verdefCurrent = 1      // VER_DEF_CURRENT
)

// bytes is the object: one page of headers and tables for reading, one of code, one of dynamic data, each aligned, none both
// writable and executable.
func (s *standIn) bytes() []byte {
	order := binary.LittleEndian
	names := newStringTable()

	// Symbol 0 is undefined.
	symbols := make([]elf.Sym64, 1, 1+len(s.symbols))
	versym := make([]uint16, 1, 1+len(s.symbols))
	code := s.code()
	for _, sym := range s.symbols {
		symbols = append(symbols, elf.Sym64{
			Name: names.add(sym.name), Info: elf.ST_INFO(elf.STB_GLOBAL, elf.STT_FUNC), Shndx: textSection, Size: uint64(len(code)),
		})
		index := uint16(verNdxGlobal)
		if sym.version != "" {
			index = uint16(slices.Index(s.versions, sym.version)) + verNdxGlobal + 1
		}
		if sym.hidden {
			index |= verNdxHidden
		}
		versym = append(versym, index)
	}

	// The base version is the object's name; the others follow with the indices that versym has.
	soname := names.add(s.soname)
	var verdef bytes.Buffer
	verdefs := append([]string{s.soname}, s.versions...)
	for i, version := range verdefs {
		var flags elf.DynamicVersionFlag
		next := uint32(verdefSize + verdauxSize)
		if i == 0 {
			flags = elf.VER_FLG_BASE
		}
		if i == len(verdefs)-1 {
			next = 0
		}
		for _, half := range []uint16{verdefCurrent, uint16(flags), uint16(verNdxGlobal + i), 1} { // one name, itself
			verdef.Write(order.AppendUint16(nil, half))
		}
		for _, word := range []uint32{sysvHash(version), verdefSize, next, names.add(version), 0} {
			verdef.Write(order.AppendUint32(nil, word))
		}
	}

	tables := [][]byte{
		dynsymSection: nil, // when the addresses are known
		dynstrSection: names.content,
		hashSection:   encode(hashTable(s.symbols)),
		versymSection: encode(versym),
		verdefSection: verdef.Bytes(),
	}
	tables[dynsymSection] = make([]byte, len(symbols)*elf.Sym64Size)

	// Offsets in the file are addresses too.
	const headerSize, progSize, sectionSize, progs = 64, 56, 64, 5
	var at [sectionCount]uint64
	offset := uint64(headerSize + progs*progSize)
	for i := dynsymSection; i <= verdefSection; i++ {
		offset = align(offset, 8)
		at[i] = offset
		offset += uint64(len(tables[i]))
	}
	tablesEnd := offset
	at[textSection] = align(tablesEnd, page)
	text := append(code, s.message...)
	at[dynamicSection] = align(at[textSection]+uint64(len(text)), page)
	for i := range symbols[1:] {
		symbols[1+i].Value = at[textSection]
	}
	tables[dynsymSection] = encode(symbols)
	dynamic := encode([]elf.Dyn64{
		{Tag: int64(elf.DT_SONAME), Val: uint64(soname)},
		{Tag: int64(elf.DT_HASH), Val: at[hashSection]},
		{Tag: int64(elf.DT_STRTAB), Val: at[dynstrSection]},
		{Tag: int64(elf.DT_SYMTAB), Val: at[dynsymSection]},
		{Tag: int64(elf.DT_STRSZ), Val: uint64(len(names.content))},
		{Tag: int64(elf.DT_SYMENT), Val: elf.Sym64Size},
		{Tag: int64(elf.DT_VERSYM), Val: at[versymSection]},
		{Tag: int64(elf.DT_VERDEF), Val: at[verdefSection]},
		{Tag: int64(elf.DT_VERDEFNUM), Val: uint64(len(verdefs))},
		{Tag: int64(elf.DT_NULL)},
	})

	// Nothing loads sections; they are for those who look at the file.
	sectionNames := newStringTable()
	section := func(name string, kind elf.SectionType, flags elf.SectionFlag, size, link, info, entry int) elf.Section64 {
		return elf.Section64{Name: sectionNames.add(name), Type: uint32(kind), Flags: uint64(flags), Size: uint64(size),
			Link: uint32(link), Info: uint32(info), Entsize: uint64(entry), Addralign: 8}
	}
	sections := [sectionCount]elf.Section64{
		dynsymSection:   section(".dynsym", elf.SHT_DYNSYM, elf.SHF_ALLOC, len(tables[dynsymSection]), dynstrSection, 1, elf.Sym64Size),
		dynstrSection:   section(".dynstr", elf.SHT_STRTAB, elf.SHF_ALLOC, len(names.content), 0, 0, 0),
		hashSection:     section(".hash", elf.SHT_HASH, elf.SHF_ALLOC, len(tables[hashSection]), dynsymSection, 0, 4),
		versymSection:   section(".gnu.version", elf.SHT_GNU_VERSYM, elf.SHF_ALLOC, len(tables[versymSection]), dynsymSection, 0, 2),
		verdefSection:   section(".gnu.version_d", elf.SHT_GNU_VERDEF, elf.SHF_ALLOC, verdef.Len(), dynstrSection, len(verdefs), 0),
		textSection:     section(".text", elf.SHT_PROGBITS, elf.SHF_ALLOC|elf.SHF_EXECINSTR, len(text), 0, 0, 0),
		dynamicSection:  section(".dynamic", elf.SHT_DYNAMIC, elf.SHF_ALLOC|elf.SHF_WRITE, len(dynamic), dynstrSection, 0, 16),
		shstrtabSection: section(".shstrtab", elf.SHT_STRTAB, 0, 0, 0, 0, 0),
	}
	at[shstrtabSection] = at[dynamicSection] + uint64(len(dynamic))
	sections[shstrtabSection].Size = uint64(len(sectionNames.content))
	for i := range sections[1:] {
		s := &sections[1+i]
		s.Off = at[1+i]
		if s.Flags != 0 {
			s.Addr = s.Off
		}
	}
	sectionsAt := align(at[shstrtabSection]+uint64(len(sectionNames.content)), 8)

	header := elf.Header64{
		Type: uint16(elf.ET_DYN), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT),
		Phoff: headerSize, Shoff: sectionsAt, Ehsize: headerSize, Phentsize: progSize, Phnum: progs,
		Shentsize: sectionSize, Shnum: sectionCount, Shstrndx: shstrtabSection,
	}
	copy(header.Ident[:], elf.ELFMAG)
	header.Ident[elf.EI_CLASS] = byte(elf.ELFCLASS64)
	header.Ident[elf.EI_DATA] = byte(elf.ELFDATA2LSB)
	header.Ident[elf.EI_VERSION] = byte(elf.EV_CURRENT)
	segment := func(kind elf.ProgType, flags elf.ProgFlag, at, size, align uint64) elf.Prog64 {
		return elf.Prog64{Type: uint32(kind), Flags: uint32(flags), Off: at, Vaddr: at, Paddr: at, Filesz: size, Memsz: size, Align: align}
	}
	size := uint64(len(dynamic))
	file := make([]byte, sectionsAt+sectionCount*sectionSize)
	put := func(offset uint64, content []byte) { copy(file[offset:], content) }
	put(0, encode(header))
	put(headerSize, encode([progs]elf.Prog64{
		segment(elf.PT_LOAD, elf.PF_R, 0, tablesEnd, page),
		segment(elf.PT_LOAD, elf.PF_R|elf.PF_X, at[textSection], uint64(len(text)), page),
		// Writable: glibc before 2.35 adds the load address to the pointers in place.
		segment(elf.PT_LOAD, elf.PF_R|elf.PF_W, at[dynamicSection], size, page),
		segment(elf.PT_DYNAMIC, elf.PF_R|elf.PF_W, at[dynamicSection], size, 8),
		segment(elf.PT_GNU_STACK, elf.PF_R|elf.PF_W, 0, 0, 16),
	}))
	for i := dynsymSection; i <= verdefSection; i++ {
		put(at[i], tables[i])
	}
	put(at[textSection], text)
	put(at[dynamicSection], dynamic)
	put(at[shstrtabSection], sectionNames.content)
	put(sectionsAt, encode(sections))
	return file
}

// code is the one function; the message follows it.
func (s *standIn) code() []byte {
	const (
		movEAX, movEDX, movEDI = 0xb8, 0xba, 0xbf
		sysWrite, sysExitGroup = 1, 231
	)
	var code []byte
	mov := func(opcode byte, value int) {
		code = binary.LittleEndian.AppendUint32(append(code, opcode), uint32(value))
	}
	mov(movEDI, 2)
	code = append(code, 0x48, 0x8d, 0x35, 0, 0, 0, 0) // lea rsi, [rip+disp32]
	next := len(code)
	mov(movEDX, len(s.message))
	mov(movEAX, sysWrite)
	code = append(code, 0x0f, 0x05) // syscall
	mov(movEDI, 127)
	mov(movEAX, sysExitGroup)
	code = append(code, 0x0f, 0x05)
	code = append(code, 0x0f, 0x0b) // ud2: nobody comes here
	binary.LittleEndian.PutUint32(code[next-4:], uint32(len(code)-next))
	return code
}

// hashTable is DT_HASH for the symbols, of which the first has index 1 (gABI, "Hash Table").
func hashTable(symbols []standInSymbol) []uint32 {
	buckets := uint32(max(1, len(symbols)))
	table := make([]uint32, 2+buckets+uint32(1+len(symbols)))
	table[0], table[1] = buckets, uint32(1+len(symbols))
	bucket, chain := table[2:2+buckets], table[2+buckets:]
	for i, sym := range symbols {
		b := sysvHash(sym.name) % buckets
		chain[1+i] = bucket[b]
		bucket[b] = uint32(1 + i)
	}
	return table
}

// sysvHash is the hash of symbol and version names (gABI, "Hash Table").
func sysvHash(name string) uint32 {
	var h uint32
	for _, c := range []byte(name) {
		h = h<<4 + uint32(c)
		if g := h & 0xf0000000; g != 0 {
			h ^= g >> 24
			h ^= g
		}
	}
	return h
}

// stringTable is a string table section; offset 0 is the empty string.
type stringTable struct {
	content []byte
	offsets map[string]uint32
}

func newStringTable() *stringTable {
	return &stringTable{content: []byte{0}, offsets: map[string]uint32{"": 0}}
}

func (t *stringTable) add(s string) uint32 {
	offset, ok := t.offsets[s]
	if !ok {
		offset = uint32(len(t.content))
		t.offsets[s] = offset
		t.content = append(append(t.content, s...), 0)
	}
	return offset
}

// encode is a value of fixed size as the file has it.
func encode(v any) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, v)
	if err != nil {
		panic(err) // a type of another kind: a defect that the first test shows
	}
	return b
}

func align(n, to uint64) uint64 { return (n + to - 1) &^ (to - 1) }
