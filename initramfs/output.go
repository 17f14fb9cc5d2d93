package initramfs

import (
	"bufio"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// The names in an output folder: the first two are where libxl looks if xl.cfg names no files.
const (
	KernelFile  = "qemu-stubdom-linux-kernel"
	ArchiveFile = "qemu-stubdom-linux-rootfs"
	ReportFile  = "stubdom-image.txt"
)

// Output is what Write wrote.
type Output struct {
	Compression      Compression
	Packed, Unpacked int64 // the archive's size in bytes
	Memory           Memory
}

// Write puts kernel, archive and report into the folder dir. A file is replaced when its successor is whole.
func (im *Image) Write(ctx context.Context, dir string, c Compression) (*Output, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	archiveSum, packed, err := writeFile(filepath.Join(dir, ArchiveFile), func(w io.Writer) error { return im.WriteArchive(ctx, w, c) })
	if err != nil {
		return nil, err
	}
	kernelSum, _, err := writeFile(filepath.Join(dir, KernelFile), func(w io.Writer) error {
		f, err := os.Open(im.Kernel.Path)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(w, f)
		return err
	})
	if err != nil {
		return nil, err
	}
	out := &Output{Compression: c, Packed: packed, Unpacked: im.ArchiveSize(), Memory: im.Memory(packed)}
	_, _, err = writeFile(filepath.Join(dir, ReportFile), func(w io.Writer) error {
		fmt.Fprintf(w, "%s  %s  Linux %s, %d bytes\n", kernelSum, KernelFile, im.Kernel.Release, im.Kernel.Size)
		fmt.Fprintf(w, "%s  %s  %v, %d bytes, unpacked %d\n", archiveSum, ArchiveFile, c, packed, out.Unpacked)
		fmt.Fprintf(w, "\n"+leastFormat+"%s", out.Memory.Least(), out.Memory.LeastRamfs(), out.Memory)
		return im.report(w)
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// leastFormat is the report's line with Memory's Least and LeastRamfs.
const leastFormat = "stubdomain_memory %d at least, %d with rootfstype=ramfs on the kernel's command line:\n"

// ReportedLeast gives Memory's Least and LeastRamfs, in MiB, from the report that Write put into the folder dir.
func ReportedLeast(dir string) (least, ramfs int, err error) {
	name := filepath.Join(dir, ReportFile)
	text, err := os.ReadFile(name)
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(text)) {
		if _, err := fmt.Sscanf(line, leastFormat, &least, &ramfs); err == nil {
			return least, ramfs, nil
		}
	}
	return 0, 0, fmt.Errorf("%s: no line %q", name, strings.TrimSpace(leastFormat))
}

// writeFile writes a file by way of one beside it, and returns its SHA-256 and size.
func writeFile(name string, write func(io.Writer) error) (sum string, size int64, err error) {
	f, err := os.CreateTemp(filepath.Dir(name), filepath.Base(name)+".new-*")
	if err != nil {
		return "", 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	hash := sha256.New()
	w := bufio.NewWriterSize(io.MultiWriter(f, hash), 1<<20)
	if err := write(w); err != nil {
		return "", 0, fmt.Errorf("%s: %w", name, err)
	}
	if err := w.Flush(); err != nil {
		return "", 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	if err := f.Chmod(0o644); err != nil {
		return "", 0, err
	}
	if err := f.Close(); err != nil {
		return "", 0, err
	}
	return fmt.Sprintf("%x", hash.Sum(nil)), info.Size(), os.Rename(f.Name(), name)
}

// List prints every entry with its mode, size in bytes and who asked for it: three at most, the first one first.
func (im *Image) List(w io.Writer) error {
	bw := bufio.NewWriter(w)
	for _, e := range im.Entries {
		name := e.Path
		switch e.Mode.Type() {
		case fs.ModeSymlink:
			name += " -> " + e.Target
		case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
			name += fmt.Sprintf(" (%d, %d)", e.Major, e.Minor)
		}
		why := strings.Join(e.Why[:min(3, len(e.Why))], "; ")
		if more := len(e.Why) - 3; more > 0 {
			why += fmt.Sprintf("; and %d more", more)
		}
		fmt.Fprintf(bw, "%s %9d %s  [%s]\n", e.Mode, e.Size, name, why)
	}
	for _, name := range im.BuiltIn {
		fmt.Fprintf(bw, "# module %s is built into Linux %s\n", name, im.Kernel.Release)
	}
	return bw.Flush()
}

// Package is a Debian package that files of the image came from.
type Package struct {
	Name, Version, Source string // Source with its version, if they differ
	BuiltUsing            string // sources of what was linked into it, as in Debian's field
	Bytes                 int64  // of its files in the image
}

// packages reads the package database of the tree (/var/lib/dpkg); a tree without one has none.
func (im *Image) packages() ([]Package, error) {
	owner := map[string]string{} // path → package
	lists, err := filepath.Glob(im.root.host("/var/lib/dpkg/info/*.list"))
	if err != nil {
		return nil, err
	}
	for _, list := range lists {
		text, err := os.ReadFile(list)
		if err != nil {
			return nil, err
		}
		name, _, _ := strings.Cut(strings.TrimSuffix(filepath.Base(list), ".list"), ":") // NAME:ARCH where several may be installed
		for p := range strings.Lines(string(text)) {
			owner[strings.TrimSuffix(p, "\n")] = name
		}
	}
	status, err := im.root.read("/var/lib/dpkg/status")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	known := map[string]*Package{}
	for paragraph := range strings.SplitSeq(string(status), "\n\n") {
		p := &Package{}
		for line := range strings.Lines(paragraph) {
			key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
			switch key {
			case "Package":
				p.Name = value
			case "Version":
				p.Version = value
			case "Source":
				p.Source = value
			case "Built-Using":
				p.BuiltUsing = value
			}
		}
		if p.Name != "" { // else lines between paragraphs
			known[p.Name] = p
		}
	}
	used := map[string]*Package{}
	for _, e := range im.Entries {
		if !e.Mode.IsRegular() {
			continue
		}
		name := ""
		for _, suffix := range append([]string{""}, moduleSuffixes[1:]...) { // modules were packed in their package
			p := e.Path
			if suffix != "" {
				p = strings.TrimSuffix(p, ".ko") + suffix
			}
			// Packages may still name /lib/x what is in /usr/lib/x.
			if name = cmp.Or(owner[p], owner[strings.TrimPrefix(p, "/usr")]); name != "" {
				break
			}
		}
		if p := known[name]; p != nil {
			p.Bytes += e.Size
			used[name] = p
		}
	}
	var packages []Package
	for _, name := range slices.Sorted(maps.Keys(used)) {
		packages = append(packages, *used[name])
	}
	return packages, nil
}

// report prints packages, modules and files, the biggest files first.
func (im *Image) report(w io.Writer) error {
	packages, err := im.packages()
	if err != nil {
		return fmt.Errorf("package versions: %w", err)
	}
	fmt.Fprintf(w, "\nPackages (bytes in the image, name, version, source):\n")
	for _, p := range packages {
		fmt.Fprintf(w, "  %9d %s %s %s\n", p.Bytes, p.Name, p.Version, cmp.Or(p.Source, p.Name))
		if p.BuiltUsing != "" {
			fmt.Fprintf(w, "            with %s\n", p.BuiltUsing)
		}
	}
	for _, a := range im.Absent {
		fmt.Fprintf(w, "\nLeft out, as nothing calls it: %s (%s).\nIn its place is %s, whose %d functions say so and end QEMU. Not in the image are (bytes, path):\n",
			a.Name, a.Reason, a.Path, a.Symbols)
		for _, f := range a.Files {
			fmt.Fprintf(w, "  %9d %s\n", f.Bytes, f.Path)
		}
	}
	fmt.Fprintf(w, "\nKernel modules in load order:\n")
	for _, m := range im.Modules {
		fmt.Fprintf(w, "  %s\n", strings.TrimSpace(m.Name+" "+m.Parameters))
	}
	fmt.Fprintf(w, "\nFiles (bytes, path):\n")
	files := slices.DeleteFunc(slices.Clone(im.Entries), func(e *Entry) bool { return !e.Mode.IsRegular() })
	slices.SortStableFunc(files, func(x, y *Entry) int { return cmp.Compare(y.Size, x.Size) })
	for _, e := range files {
		if _, err := fmt.Fprintf(w, "  %9d %s\n", e.Size, e.Path); err != nil {
			return err
		}
	}
	return nil
}
