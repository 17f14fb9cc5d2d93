package initramfs

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Module is a kernel module of the image, in load order.
type Module struct {
	Name       string // with underscores, as the kernel calls it
	Path       string // in the image; always decompressed
	Parameters string // for finit_module(2), separated by spaces
}

// moduleSuffixes are the ways Linux's build leaves modules (CONFIG_MODULE_COMPRESS_*).
var moduleSuffixes = []string{".ko", ".ko.xz", ".ko.zst", ".ko.gz"}

// moduleName is the name that the kernel gives to the module in a file: dashes are underscores to it.
func moduleName(file string) (string, bool) {
	for _, suffix := range moduleSuffixes {
		if name, ok := strings.CutSuffix(path.Base(file), suffix); ok {
			return strings.ReplaceAll(name, "-", "_"), true
		}
	}
	return "", false
}

// moduleSet is the modules of one kernel. It reads the modules themselves, since the modules.dep that depmod makes is not in
// Debian's packages.
type moduleSet struct {
	root    root
	dir     string            // /usr/lib/modules/RELEASE, free of links
	files   map[string]string // name → path in the tree
	builtin map[string]bool
}

func (r root) modules(release string) (*moduleSet, error) {
	s := &moduleSet{root: r, files: map[string]string{}, builtin: map[string]bool{}}
	real, _, info, err := r.resolve("/lib/modules/" + release)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil // a kernel without modules
	}
	if err != nil {
		return nil, fmt.Errorf("modules of Linux %s: %w", release, err)
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("modules of Linux %s: %s is not a folder", release, r.host(real))
	}
	s.dir = real
	err = filepath.WalkDir(r.host(real), func(file string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if name, ok := moduleName(file); ok && entry.Type().IsRegular() {
			relative, err := filepath.Rel(string(r), file)
			if err != nil {
				return err
			}
			s.files[name] = "/" + filepath.ToSlash(relative)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("modules of Linux %s: %w", release, err)
	}
	builtin, err := r.read(path.Join(real, "modules.builtin"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("modules of Linux %s: %w", release, err)
	}
	for file := range strings.Lines(string(builtin)) {
		if name, ok := moduleName(strings.TrimSpace(file)); ok {
			s.builtin[name] = true
		}
	}
	return s, nil
}

// content returns the module in a file, decompressed. Left packed it would be unpacked twice: the modules of Debian's 6.12 as
// .ko.xz make a zstd archive 2 kB bigger, not smaller, and cost the kernel 20 ms of xz at each start, where it has
// CONFIG_MODULE_DECOMPRESS; older kernels cannot load them at all.
func (s *moduleSet) content(ctx context.Context, file string) ([]byte, error) {
	host := s.root.host(file)
	f, err := os.Open(host)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := decompress(ctx, f, path.Ext(file))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", host, err)
	}
	return data, nil
}

// decompress reads r to its end and unpacks it as a file's suffix says.
func decompress(ctx context.Context, r io.Reader, suffix string) ([]byte, error) {
	switch suffix {
	case ".xz":
		cmd := exec.CommandContext(ctx, "xz", "--decompress", "--stdout")
		var out, stderr bytes.Buffer
		cmd.Stdin, cmd.Stdout, cmd.Stderr = r, &out, &stderr
		if err := cmd.Run(); errors.Is(err, exec.ErrNotFound) {
			return nil, fmt.Errorf("%w: install xz-utils", err)
		} else if err != nil {
			return nil, fmt.Errorf("xz: %w: %s", err, strings.TrimSpace(stderr.String()))
		}
		return out.Bytes(), nil
	case ".zst":
		d, err := zstd.NewReader(r)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		r = d
	case ".gz":
		z, err := gzip.NewReader(r)
		if err != nil {
			return nil, err
		}
		r = z
	case ".lz4":
		r = lz4.NewReader(r)
	}
	return io.ReadAll(r)
}

// signatureMark ends a signed module. Before it is a struct module_signature (include/linux/module_signature.h: 12 bytes, the
// last four the signature's length, big-endian), before that the signature.
const signatureMark = "~Module signature appended~\n"

// withoutSignature returns a module as it was before it was signed. Checking a signature takes the kernel 0.13 s for each module
// (6.12, QEMU counting instructions with -icount shift=1), and shows nothing here: kernel and modules come in one file pair
// from dom0. A kernel that does not insist on signatures says once, at level notice, that it is tainted.
func withoutSignature(module []byte) []byte {
	const header = 12
	signed, ok := bytes.CutSuffix(module, []byte(signatureMark))
	if !ok || len(signed) < header {
		return module
	}
	length := int64(binary.BigEndian.Uint32(signed[len(signed)-4:]))
	rest := int64(len(signed)) - header - length
	if rest <= 0 {
		return module // the kernel says what is wrong with it
	}
	return module[:rest:rest]
}

// dependencies reads a module's .modinfo section: strings key=value, each ended by a zero byte. depends= are the modules whose
// symbols it uses, softdep= "pre:" those it wants before it, if they are there.
func dependencies(module []byte) (hard, soft []string, err error) {
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		return nil, nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil, errors.New("no section .modinfo: not a kernel module")
	}
	info, err := section.Data()
	if err != nil {
		return nil, nil, err
	}
	underscore := func(s string) string { return strings.ReplaceAll(s, "-", "_") }
	for entry := range bytes.SplitSeq(info, []byte{0}) {
		key, value, _ := strings.Cut(string(entry), "=")
		switch key {
		case "depends":
			for name := range strings.SplitSeq(value, ",") {
				if name != "" {
					hard = append(hard, underscore(name))
				}
			}
		case "softdep":
			pre := false
			for _, word := range strings.Fields(value) {
				switch {
				case strings.HasSuffix(word, ":"):
					pre = word == "pre:"
				case pre:
					soft = append(soft, underscore(word))
				}
			}
		}
	}
	slices.Sort(hard)
	return hard, soft, nil
}

// module adds a module after those it depends on. A name that is on its way already ends a circle of soft dependencies.
func (b *builder) module(ctx context.Context, name, why string, optional bool) error {
	name = strings.ReplaceAll(name, "-", "_")
	if b.moduleSeen[name] {
		return nil
	}
	if b.modules.builtin[name] {
		b.moduleSeen[name] = true
		b.image.BuiltIn = append(b.image.BuiltIn, name)
		return nil
	}
	file, ok := b.modules.files[name]
	if !ok {
		if !optional {
			b.missing = append(b.missing, Missing{"module " + name + " of Linux " + b.image.Kernel.Release, why})
		}
		return nil
	}
	b.moduleSeen[name] = true
	content, err := b.modules.content(ctx, file)
	if err != nil {
		return fmt.Errorf("module %s: %w", name, err)
	}
	// A kernel of which nobody knows whether it insists on signatures gets them.
	if k := b.image.Kernel; k.config != nil && k.option("MODULE_SIG_FORCE") != "y" {
		content = withoutSignature(content)
	}
	hard, soft, err := dependencies(content)
	if err != nil {
		return fmt.Errorf("module %s: %s: %w", name, b.root.host(file), err)
	}
	for _, dep := range soft {
		if err := b.module(ctx, dep, "wanted before "+name, true); err != nil {
			return err
		}
	}
	for _, dep := range hard {
		if err := b.module(ctx, dep, "needed by module "+name, false); err != nil {
			return err
		}
	}
	for _, suffix := range moduleSuffixes[1:] {
		file = strings.TrimSuffix(file, strings.TrimPrefix(suffix, ".ko"))
	}
	b.image.Modules = append(b.image.Modules, Module{Name: name, Path: file, Parameters: b.parameters[name]})
	return b.add(Entry{Path: file, Mode: 0o644, Data: content, Size: int64(len(content))}, why)
}
