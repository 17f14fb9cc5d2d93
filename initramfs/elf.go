package initramfs

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// object is what the dynamic linker reads of an ELF file.
type object struct {
	path           string // in the tree, free of links
	interp         string // PT_INTERP; empty for libraries and static programs
	needed         []string
	rpath, runpath []string // folders, $ORIGIN and the like not yet replaced
	class          elf.Class
	machine        elf.Machine
	loader         *object // who asked for it first: its DT_RPATH counts here too
}

// readObject parses the ELF file at real, a path in the tree that is free of links.
func (r root) readObject(real string) (*object, error) {
	f, err := elf.Open(r.host(real))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.host(real), err)
	}
	defer f.Close()
	o := &object{path: real, class: f.Class, machine: f.Machine}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			if p.Filesz > 4096 {
				return nil, fmt.Errorf("%s: the interpreter's path has %d bytes", r.host(real), p.Filesz)
			}
			interp, err := io.ReadAll(p.Open())
			if err != nil {
				return nil, fmt.Errorf("%s: interpreter: %w", r.host(real), err)
			}
			o.interp, _, _ = strings.Cut(string(interp), "\x00")
		}
	}
	for tag, into := range map[elf.DynTag]*[]string{elf.DT_NEEDED: &o.needed, elf.DT_RPATH: &o.rpath, elf.DT_RUNPATH: &o.runpath} {
		values, err := f.DynString(tag)
		if err != nil {
			return nil, fmt.Errorf("%s: %v: %w", r.host(real), tag, err)
		}
		for _, value := range values {
			if tag == elf.DT_NEEDED {
				*into = append(*into, value)
			} else {
				*into = append(*into, strings.Split(value, ":")...)
			}
		}
	}
	return o, nil
}

// multiarch is Debian's name for the folder of a machine's libraries, and what glibc there puts in place of $LIB.
var multiarch = map[elf.Machine]string{
	elf.EM_X86_64:  "x86_64-linux-gnu",
	elf.EM_AARCH64: "aarch64-linux-gnu",
	elf.EM_386:     "i386-linux-gnu",
}

// linker finds libraries as ld.so would: ld.so(8), "the dependencies are searched in the following order". There is no
// ld.so.cache and no LD_LIBRARY_PATH in an image.
type linker struct {
	root    root
	machine elf.Machine
	class   elf.Class
	builtin []string // folders that this ld.so knows by itself
	conf    []string // folders of ld.so.conf: ld.so knows them from its cache only
}

func (r root) newLinker(program *object) (*linker, error) {
	l := &linker{root: r, machine: program.machine, class: program.class}
	for _, dir := range []string{"/lib", "/usr/lib"} {
		if triplet := multiarch[program.machine]; triplet != "" {
			l.builtin = append(l.builtin, dir+"/"+triplet)
		}
	}
	l.builtin = append(l.builtin, "/lib64", "/usr/lib64", "/lib", "/usr/lib")
	// glibc holds its folders as strings that end in a slash; which ones differs between distributions.
	if ldso, err := r.read(program.interp); err == nil {
		if known := slices.DeleteFunc(slices.Clone(l.builtin), func(dir string) bool {
			return !bytes.Contains(ldso, []byte("\x00"+dir+"/\x00"))
		}); len(known) > 0 {
			l.builtin = known
		}
	}
	var err error
	l.conf, err = r.ldConf("/etc/ld.so.conf", 0)
	return l, err
}

// ldConf reads the folders that ld.so.conf and the files it includes name. A tree without one has none.
func (r root) ldConf(p string, depth int) ([]string, error) {
	text, err := r.read(p)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if depth > 8 {
		return nil, fmt.Errorf("%s: includes itself", r.host(p))
	}
	var dirs []string
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		words := strings.Fields(line)
		switch {
		case len(words) == 0:
		case words[0] == "include":
			for _, pattern := range words[1:] {
				if !path.IsAbs(pattern) {
					pattern = path.Join(path.Dir(p), pattern)
				}
				files, err := filepath.Glob(r.host(pattern))
				if err != nil {
					return nil, fmt.Errorf("%s: include %s: %w", r.host(p), pattern, err)
				}
				for _, file := range files { // sorted by Glob
					more, err := r.ldConf(path.Join(path.Dir(pattern), filepath.Base(file)), depth+1)
					if err != nil {
						return nil, err
					}
					dirs = append(dirs, more...)
				}
			}
		case path.IsAbs(words[0]):
			dirs = append(dirs, path.Clean(words[0]))
		}
	}
	return dirs, nil
}

// found is a library and the path under which ld.so asks for it.
type found struct {
	path string
	// conf: only ld.so.conf names the folder, so that a link in a folder that ld.so knows by itself must lead there.
	conf bool
}

// find looks for the library name that o needs.
func (l *linker) find(name string, o *object) (found, error) {
	if strings.Contains(name, "/") {
		return l.try(name)
	}
	var dirs []string
	if len(o.runpath) == 0 {
		for by := o; by != nil; by = by.loader {
			if len(by.runpath) == 0 { // it makes an object's own DT_RPATH void
				dirs = append(dirs, l.expand(by.rpath, by)...)
			}
		}
	}
	dirs = append(dirs, l.expand(o.runpath, o)...)
	for _, dir := range append(dirs, l.builtin...) {
		if f, err := l.try(path.Join(dir, name)); err == nil || !errors.Is(err, fs.ErrNotExist) {
			return f, err
		}
	}
	for _, dir := range l.conf {
		if f, err := l.try(path.Join(dir, name)); err == nil || !errors.Is(err, fs.ErrNotExist) {
			f.conf = true
			return f, err
		}
	}
	return found{}, fs.ErrNotExist
}

// try says whether p is a library for this machine. ld.so passes over those of another one.
func (l *linker) try(p string) (found, error) {
	real, _, err := l.root.regular(p)
	if err != nil {
		return found{}, err
	}
	f, err := elf.Open(l.root.host(real))
	if err != nil {
		return found{}, fmt.Errorf("%s: %w", l.root.host(real), err)
	}
	defer f.Close()
	if f.Machine != l.machine || f.Class != l.class {
		return found{}, fs.ErrNotExist
	}
	return found{path: p}, nil
}

func (l *linker) expand(dirs []string, o *object) []string {
	tokens := strings.NewReplacer("$ORIGIN", path.Dir(o.path), "${ORIGIN}", path.Dir(o.path),
		"$LIB", "lib/"+multiarch[l.machine], "${LIB}", "lib/"+multiarch[l.machine])
	var expanded []string
	for _, dir := range dirs {
		if dir = tokens.Replace(dir); path.IsAbs(dir) && !strings.Contains(dir, "$") { // $PLATFORM differs between machines
			expanded = append(expanded, path.Clean(dir))
		}
	}
	return expanded
}

// program adds the ELF file at p, its interpreter and all libraries it needs.
func (b *builder) program(p, why string, optional bool) (*object, error) {
	real, err := b.file(p, why, optional)
	if real == "" {
		return nil, err
	}
	o, err := b.root.readObject(real)
	if err != nil {
		return nil, err
	}
	if o.interp == "" {
		return o, nil
	}
	if _, err := b.file(o.interp, "interpreter of "+o.path, false); err != nil {
		return nil, err
	}
	l, err := b.root.newLinker(o)
	if err != nil {
		return nil, err
	}
	if b.linker == nil {
		b.linker = l
	}
	return o, b.libraries(l, o)
}

// library adds a library that a program opens by itself, found as the first program's libraries are.
func (b *builder) library(name, why string, optional bool) error {
	if b.linker == nil {
		return fmt.Errorf("library %s: no program before it that is not static", name)
	}
	if _, err := b.linker.find(name, &object{}); optional && errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return b.libraries(b.linker, &object{path: why, needed: []string{name}})
}

// libraries adds what o needs, breadth first as ld.so does: a name that was found once is not searched again.
func (b *builder) libraries(l *linker, first *object) error {
	loaded := map[string]bool{}
	for queue := []*object{first}; len(queue) > 0; queue = queue[1:] {
		o := queue[0]
		for _, name := range o.needed {
			if loaded[name] {
				continue
			}
			loaded[name] = true
			f, err := l.find(name, o)
			if errors.Is(err, fs.ErrNotExist) {
				b.missing = append(b.missing, Missing{"library " + name, o.path})
				continue
			}
			if err != nil {
				return fmt.Errorf("library %s, needed by %s: %w", name, o.path, err)
			}
			if a := b.absent[name]; a != nil {
				if err := b.leaveOut(a, l, o, f); err != nil {
					return err
				}
				continue
			}
			real, err := b.file(f.path, "needed by "+o.path, false)
			if err != nil {
				return err
			}
			if f.conf {
				if err := b.libraryLink(l, name, f.path, "needed by "+o.path); err != nil {
					return err
				}
			}
			next, err := b.root.readObject(real)
			if err != nil {
				return err
			}
			next.loader = o
			queue = append(queue, next)
		}
	}
	return nil
}

// libraryLink leads ld.so from the first folder that it knows by itself and the tree has to the library at p.
func (b *builder) libraryLink(l *linker, name, p, why string) error {
	for _, dir := range l.builtin {
		real, links, info, err := b.root.resolve(dir)
		if err != nil || !info.IsDir() {
			continue
		}
		for _, link := range links {
			if err := b.symlink(link.path, link.target, why); err != nil {
				return err
			}
		}
		return b.symlink(path.Join(real, name), p, why)
	}
	return fmt.Errorf("%s: the tree has none of %s", name, strings.Join(l.builtin, ", "))
}

// checkInit refuses what the kernel could not start, or what needs files that the image does not have. An init is a static
// program, or a script whose interpreter is in the image.
func (b *builder) checkInit(name string, machine elf.Machine) error {
	interpreter, err := scriptInterpreter(name)
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	if interpreter != "" {
		if b.entries[interpreter] == nil {
			return fmt.Errorf("init %s is a script for %s, which is not in the image", name, interpreter)
		}
		return nil
	}
	f, err := elf.Open(name)
	if err != nil {
		var format *elf.FormatError
		if errors.As(err, &format) {
			return fmt.Errorf("init %s is not an ELF file: %w", name, err)
		}
		return fmt.Errorf("init: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("init %s is not static: build it with CGO_ENABLED=0", name)
		}
	}
	if machine != elf.EM_NONE && f.Machine != machine {
		return fmt.Errorf("init %s is for %v, the programs in the image are for %v", name, f.Machine, machine)
	}
	return nil
}

// scriptInterpreter is the path behind the #! of a script, or "" if the file is none.
func scriptInterpreter(name string) (string, error) {
	f, err := os.Open(name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, 256) // BINPRM_BUF_SIZE: all that the kernel looks at
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, io.EOF) {
		return "", err
	}
	line, ok := bytes.CutPrefix(head[:n], []byte("#!"))
	if !ok {
		return "", nil
	}
	line, _, _ = bytes.Cut(line, []byte("\n"))
	words := bytes.Fields(line)
	if len(words) == 0 {
		return "", fmt.Errorf("%s begins with #! and names no interpreter", name)
	}
	return string(words[0]), nil
}
