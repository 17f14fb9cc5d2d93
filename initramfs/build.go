// Package initramfs builds the archive that a Linux stubdomain starts from: stubinit as /init, QEMU with all it needs, and
// kernel modules in load order, out of an unpacked Debian package tree and a manifest.
//
// A tree is only read, never run, and its symbolic links are followed inside it, so that it may be of another release or
// machine. The same tree, manifest and init give the same bytes.
package initramfs

import (
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// ModulesList is the path in the image of the list of modules, one a line in load order: the path, then the parameters.
const ModulesList = "/etc/stubinit/modules"

// Unpacked is the path of an empty file that comes last in the archive. The kernel starts /init of an archive that did not fit
// all the same, with the rest of the files not there: if this one is not, it needs more stubdomain_memory.
const Unpacked = "/~unpacked"

// QEMUAbilities is the path in the image of what Config.ProbeQEMU found.
const QEMUAbilities = "/etc/stubinit/qemu.json"

// Config says what Build builds from.
type Config struct {
	Root     string    // the unpacked package tree
	Manifest *Manifest // what of it goes in
	Init     string    // stubinit, a static program; /init in the image. May be a script for an interpreter in the image
	Kernel   string    // release; may be empty if the tree has only one kernel

	// ProbeQEMU returns the content of QEMUAbilities. command is what runs the tree's QEMU on this machine; arguments follow
	// it. May be nil; if it fails, as for another machine's QEMU, the image has no such file, and the agent does without what QEMU
	// may not be able to do. A context.DeadlineExceeded fails the build: the same tree gives the same image on a busy machine.
	ProbeQEMU func(ctx context.Context, command []string) ([]byte, error)

	// Progress is told what is done, a line each; may be nil.
	Progress func(string)
}

// Entry is a file, folder, link or node of the image.
type Entry struct {
	Path   string // absolute
	Mode   fs.FileMode
	Size   int64  // bytes of a file, length of a link's target
	Source string // where a file's content is; if empty it is Data
	Data   []byte
	Target string // of a link
	Major  uint32 // of a node
	Minor  uint32
	Why    []string // who asked for it, first one first
}

// Image is what goes into an archive.
type Image struct {
	Kernel  *Kernel
	Entries []*Entry // by path: a folder comes before what is in it
	Modules []Module // in load order
	BuiltIn []string // modules of the manifest that the kernel has built in
	Absent  []Absent // by name
	root    root
}

// Missing is something that the tree does not have.
type Missing struct {
	What     string // a path or a name
	NeededBy string
}

// MissingError names all that a tree lacks. It is fs.ErrNotExist to errors.Is.
type MissingError struct {
	Root    string
	Missing []Missing
}

func (e *MissingError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s lacks %d of what the image needs:", e.Root, len(e.Missing))
	for _, m := range e.Missing {
		fmt.Fprintf(&b, "\n  %s (%s)", m.What, m.NeededBy)
	}
	return b.String()
}

func (e *MissingError) Unwrap() error { return fs.ErrNotExist }

type builder struct {
	root       root
	image      *Image
	entries    map[string]*Entry
	missing    []Missing
	modules    *moduleSet
	moduleSeen map[string]bool
	parameters map[string]string // of modules
	firmware   []string          // folders
	linker     *linker           // of the first program that is not static
	absent     map[string]*absence
	qemu       *object
}

// Build collects what the manifest asks for. If the tree lacks something the error is a *MissingError that names all of it.
func Build(ctx context.Context, c Config) (*Image, error) {
	r := root(c.Root)
	kernel, err := r.kernel(ctx, c.Kernel)
	if err != nil {
		return nil, err
	}
	modules, err := r.modules(kernel.Release)
	if err != nil {
		return nil, err
	}
	b := &builder{
		root:       r,
		image:      &Image{Kernel: kernel, root: r},
		entries:    map[string]*Entry{},
		modules:    modules,
		moduleSeen: map[string]bool{},
		parameters: map[string]string{},
		absent:     map[string]*absence{},
	}
	progress := c.Progress
	if progress == nil {
		progress = func(string) {}
	}
	progress(fmt.Sprintf("collecting for Linux %s from %s", kernel.Release, c.Root))
	for _, l := range c.Manifest.lines {
		switch l.directive { // what must be known before a line can use it
		case "module":
			b.parameters[strings.ReplaceAll(l.args[0], "-", "_")] = strings.Join(l.args[1:], " ")
		case "firmware-path":
			b.firmware = append(b.firmware, l.args...)
		case "absent":
			b.absent[l.args[0]] = &absence{name: l.args[0], reason: strings.Join(l.args[1:], " "), why: c.Manifest.why(l)}
		}
	}
	for _, l := range c.Manifest.lines {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if err := b.line(ctx, l, c.Manifest.why(l)); err != nil {
			return nil, fmt.Errorf("%s: %w", c.Manifest.why(l), err)
		}
	}
	if len(b.missing) > 0 {
		return nil, &MissingError{Root: c.Root, Missing: b.missing}
	}
	if err := b.init(c.Init); err != nil {
		return nil, err
	}
	if err := b.modulesList(); err != nil {
		return nil, err
	}
	if err := b.standIns(); err != nil {
		return nil, err
	}
	for _, a := range b.image.Absent {
		var bytes int64
		for _, f := range a.Files {
			bytes += f.Bytes
		}
		progress(fmt.Sprintf("left out %s and what only it needs: %d files, %.1f MB", a.Name, len(a.Files), float64(bytes)/1e6))
	}
	if b.qemu != nil && c.ProbeQEMU != nil {
		progress("asking QEMU what it can do")
		abilities, err := b.probe(ctx, c.ProbeQEMU)
		var refused *standInError
		if errors.As(err, &refused) || errors.Is(err, context.DeadlineExceeded) {
			return nil, err
		}
		if err != nil {
			progress(fmt.Sprintf("%s left out: %v", QEMUAbilities, err))
		} else if err := b.generated(QEMUAbilities, abilities, "what "+b.qemu.path+" can do"); err != nil {
			return nil, err
		}
	}
	if err := b.generated(Unpacked, nil, "comes last"); err != nil {
		return nil, err
	}
	b.image.Entries = slices.SortedFunc(maps.Values(b.entries), func(x, y *Entry) int { return cmp.Compare(x.Path, y.Path) })
	progress(fmt.Sprintf("collected %d entries, %d kernel modules", len(b.image.Entries), len(b.image.Modules)))
	return b.image, nil
}

func (b *builder) line(ctx context.Context, l line, why string) error {
	switch l.directive {
	case "qemu", "program":
		o, err := b.program(l.args[0], why, l.optional)
		if l.directive == "qemu" && o != nil {
			b.qemu = o
		}
		return err
	case "library":
		return b.library(l.args[0], why, l.optional)
	case "firmware":
		for _, dir := range b.firmware {
			real, err := b.file(path.Join(dir, l.args[0]), why, true)
			if err != nil || real != "" {
				return err
			}
		}
		if !l.optional {
			b.missing = append(b.missing, Missing{"firmware " + l.args[0] + " in " + strings.Join(b.firmware, ", "), why})
		}
		return nil
	case "file":
		_, err := b.file(l.args[0], why, l.optional)
		return err
	case "module":
		return b.module(ctx, l.args[0], why, l.optional)
	case "dir":
		mode, err := parseMode(l.args[1])
		if err != nil {
			return err
		}
		return b.add(Entry{Path: l.args[0], Mode: fs.ModeDir | mode}, why)
	case "node":
		node, err := l.node()
		if err != nil {
			return err
		}
		return b.add(node, why)
	case "link":
		return b.symlink(l.args[0], l.args[1], why)
	}
	return nil
}

// add puts an entry in the image, and the folders above it. The same thing asked for twice is there once, with both reasons.
func (b *builder) add(e Entry, why string) error {
	if e.Path == "/" {
		return nil
	}
	if dir := path.Dir(e.Path); b.entries[dir] == nil {
		if err := b.add(Entry{Path: dir, Mode: fs.ModeDir | 0o755}, "holds "+e.Path); err != nil {
			return err
		}
	} else if !b.entries[dir].Mode.IsDir() {
		return fmt.Errorf("%s cannot be in %s, which is no folder (%s)", e.Path, dir, b.entries[dir].Why[0])
	}
	old := b.entries[e.Path]
	if old == nil {
		e.Why = []string{why}
		b.entries[e.Path] = &e
		return nil
	}
	implied := strings.HasPrefix(old.Why[0], "holds ") // then the mode is a guess
	switch {
	case old.Mode.IsDir() && e.Mode.IsDir():
		if implied {
			old.Mode = e.Mode
		}
	case old.Mode != e.Mode || old.Target != e.Target || old.Source != e.Source || old.Major != e.Major || old.Minor != e.Minor:
		return fmt.Errorf("%s (%s) is there already as another thing (%s)", e.Path, why, old.Why[0])
	}
	if !slices.Contains(old.Why, why) {
		old.Why = append(old.Why, why)
	}
	return nil
}

func (b *builder) generated(p string, content []byte, why string) error {
	return b.add(Entry{Path: p, Mode: 0o644, Data: content, Size: int64(len(content))}, why)
}

func (b *builder) symlink(p, target, why string) error {
	return b.add(Entry{Path: p, Mode: fs.ModeSymlink | 0o777, Target: target, Size: int64(len(target))}, why)
}

// file adds the file that p means in the tree, and the links on the way to it. It returns the file's path without links, or ""
// if there is no such file, which is noted as missing unless it is optional.
func (b *builder) file(p, why string, optional bool) (string, error) {
	real, links, err := b.root.regular(p)
	if errors.Is(err, fs.ErrNotExist) {
		if !optional {
			b.missing = append(b.missing, Missing{p, why})
		}
		return "", nil
	}
	if err != nil {
		return "", err
	}
	for _, l := range links {
		if err := b.symlink(l.path, l.target, why); err != nil {
			return "", err
		}
	}
	return real, b.copy(real, b.root.host(real), why)
}

// copy adds the file source of this machine as p. Only the execute bit of its mode counts: the rest is the umask's of whoever
// unpacked it.
func (b *builder) copy(p, source, why string) error {
	info, err := os.Stat(source)
	if err != nil {
		return err
	}
	f, err := os.Open(source) // now, while it is known who wants it
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	mode := fs.FileMode(0o644)
	if info.Mode()&0o111 != 0 {
		mode = 0o755
	}
	return b.add(Entry{Path: p, Mode: mode, Size: info.Size(), Source: source}, why)
}

func (b *builder) init(source string) error {
	machine := elf.EM_NONE
	if b.qemu != nil {
		machine = b.qemu.machine
	}
	if err := b.checkInit(source, machine); err != nil {
		return err
	}
	if err := b.copy("/init", source, "init"); err != nil {
		return fmt.Errorf("init: %w", err)
	}
	b.entries["/init"].Mode = 0o755
	return nil
}

func (b *builder) modulesList() error {
	var list strings.Builder
	for _, m := range b.image.Modules {
		list.WriteString(strings.TrimSpace(m.Path+" "+m.Parameters) + "\n")
	}
	return b.generated(ModulesList, []byte(list.String()), "load order")
}

// standInError is the failure of a QEMU that runs with the libraries for which the image has stand-ins.
type standInError struct{ err error }

func (e *standInError) Error() string {
	return fmt.Sprintf("QEMU does not start without the libraries that the manifest says are absent: %v", e.err)
}

func (e *standInError) Unwrap() error { return e.err }

// probe asks QEMU as it will run in the image: with the stand-ins.
func (b *builder) probe(ctx context.Context, ask func(context.Context, []string) ([]byte, error)) ([]byte, error) {
	if len(b.image.Absent) == 0 {
		return ask(ctx, b.qemuCommand(""))
	}
	dir, err := os.MkdirTemp("", "stubinit-absent-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	for _, a := range b.image.Absent {
		if err := os.WriteFile(filepath.Join(dir, a.Name), b.entries[a.Path].Data, 0o644); err != nil {
			return nil, err
		}
	}
	abilities, err := ask(ctx, b.qemuCommand(dir))
	if err != nil {
		if _, without := ask(ctx, b.qemuCommand("")); without == nil {
			return nil, &standInError{err}
		}
	}
	return abilities, err
}

// qemuCommand runs the tree's QEMU on this machine, with the tree's own ld.so and libraries; those in the folder first come
// before them.
func (b *builder) qemuCommand(first string) []string {
	qemu := b.root.host(b.qemu.path)
	if b.qemu.interp == "" {
		return []string{qemu}
	}
	var dirs []string
	for _, e := range b.entries {
		if dir := b.root.host(path.Dir(e.Path)); strings.Contains(path.Base(e.Path), ".so") && e.Source != "" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	slices.Sort(dirs)
	if first != "" {
		dirs = append([]string{first}, dirs...)
	}
	interp, _, _, err := b.root.resolve(b.qemu.interp)
	if err != nil { // it was added, so it is there
		interp = b.qemu.interp
	}
	return []string{b.root.host(interp), "--library-path", strings.Join(dirs, ":"), qemu}
}
