package initramfs

import (
	"bytes"
	"cmp"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Kernel is the Linux that an image is made for.
type Kernel struct {
	Release string
	Path    string // of the bzImage, on this machine
	Size    int64  // of the bzImage, bytes

	// Loaded is the memory that the kernel itself takes while it starts, in bytes: code, data and bss. Kept is what of it
	// stays in use after that.
	Loaded, Kept int64

	config map[string]string
}

// option is an option's value (y, m, a number, a string in quotes), or "" if it is not set.
func (k *Kernel) option(name string) string { return k.config[name] }

// before says whether the kernel is older than Linux major.minor. One whose release is not a number is taken for a new one.
func (k *Kernel) before(major, minor int) bool {
	var m, n int
	if _, err := fmt.Sscanf(k.Release, "%d.%d", &m, &n); err != nil {
		return false
	}
	return m < major || m == major && n < minor
}

// kernel finds the kernel in /boot of the tree. release may be empty if there is only one.
func (r root) kernel(ctx context.Context, release string) (*Kernel, error) {
	if release == "" {
		files, err := filepath.Glob(r.host("/boot/vmlinuz-*"))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", string(r), err)
		}
		var releases []string
		for _, file := range files {
			releases = append(releases, strings.TrimPrefix(filepath.Base(file), "vmlinuz-"))
		}
		switch len(releases) {
		case 0:
			return nil, fmt.Errorf("%s: no kernel: %w", r.host("/boot/vmlinuz-*"), fs.ErrNotExist)
		case 1:
			release = releases[0]
		default:
			return nil, fmt.Errorf("%s has %d kernels, choose one: %s", r.host("/boot"), len(releases), strings.Join(releases, " "))
		}
	}
	real, _, err := r.regular("/boot/vmlinuz-" + release)
	if err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	k := &Kernel{Release: release, Path: r.host(real)}
	image, err := os.ReadFile(k.Path)
	if err != nil {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	k.Size = int64(len(image))
	// Offsets of boot.rst: magic "HdrS" at 0x202, protocol version at 0x206.
	if len(image) < 0x264 || !bytes.Equal(image[0x202:0x206], []byte("HdrS")) || binary.LittleEndian.Uint16(image[0x206:]) < 0x20a {
		return nil, fmt.Errorf("kernel: %s is not an x86 bzImage of boot protocol 2.10 or later", k.Path)
	}
	if k.Loaded, k.Kept, err = kernelMemory(ctx, image); err != nil {
		return nil, fmt.Errorf("kernel: %s: %w", k.Path, err)
	}

	config, err := r.read("/boot/config-" + release)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("kernel: %w", err)
	}
	if err == nil {
		k.config = map[string]string{}
	}
	for line := range strings.Lines(string(config)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok && strings.HasPrefix(name, "CONFIG_") {
			k.config[strings.TrimPrefix(name, "CONFIG_")] = value
		}
	}
	return k, nil
}

// payloadFormats are how a bzImage may be packed, by how it begins, and the suffix that names it to decompress.
var payloadFormats = []struct{ magic, suffix string }{
	{"\x1f\x8b", ".gz"},
	{"\xfd7zXZ\x00", ".xz"},
	{"\x28\xb5\x2f\xfd", ".zst"},
	{"\x02\x21\x4c\x18", ".lz4"},
}

// kernelMemory reads out of a bzImage how much memory its kernel takes, as it says in Kernel. Of one that is packed in another
// way it is init_size, which is 4 to 18 MiB more: it counts what the kernel frees, and room for a decompressor, which
// a toolstack does not use.
func kernelMemory(ctx context.Context, image []byte) (loaded, kept int64, err error) {
	// Offsets of boot.rst: the number of 512-byte sectors before the payload's segment at 0x1f1 (0 means 4), payload_offset in it
	// at 0x248, payload_length at 0x24c, init_size at 0x260.
	sectors := cmp.Or(int64(image[0x1f1]), 4)
	start := (sectors+1)*512 + int64(binary.LittleEndian.Uint32(image[0x248:]))
	end := start + int64(binary.LittleEndian.Uint32(image[0x24c:]))
	if end > int64(len(image)) {
		return 0, 0, fmt.Errorf("ends at byte %d, before its payload does: %d", len(image), end)
	}
	payload := image[start:end]
	for _, format := range payloadFormats {
		if !bytes.HasPrefix(payload, []byte(format.magic)) {
			continue
		}
		if format.suffix != ".gz" { // all but gzip are followed by the unpacked size, which gzip ends with
			payload = payload[:len(payload)-4]
		}
		vmlinux, err := decompress(ctx, bytes.NewReader(payload), format.suffix)
		if err != nil {
			return 0, 0, err
		}
		f, err := elf.NewFile(bytes.NewReader(vmlinux))
		if err != nil {
			return 0, 0, err
		}
		return sectionsMemory(f.Sections)
	}
	size := int64(binary.LittleEndian.Uint32(image[0x260:]))
	return size, size, nil
}

// sectionsMemory is kernelMemory of a vmlinux's sections. Linux frees what lies from .init.text to .bss, and the rest of 2 MiB
// after code and after constants (free_initmem and mark_rodata_ro of arch/x86/mm). It never takes .init.scratch, which lies
// after _end, nor .data..percpu of a kernel for many processors: that has addresses of its own and is copied.
func sectionsMemory(sections []*elf.Section) (loaded, kept int64, err error) {
	address := map[string]uint64{}
	for _, s := range sections {
		address[s.Name] = s.Addr
	}
	text, initText, bss := address[".text"], address[".init.text"], address[".bss"]
	if text == 0 || initText < text || bss < initText {
		return 0, 0, fmt.Errorf("sections .text, .init.text and .bss at %#x, %#x and %#x: not a kernel for x86", text, initText, bss)
	}
	sections = slices.SortedFunc(slices.Values(sections), func(a, b *elf.Section) int { return cmp.Compare(a.Addr, b.Addr) })
	end := text // of what is counted
	for _, s := range sections {
		if s.Flags&elf.SHF_ALLOC == 0 || s.Addr < text || s.Name == ".init.scratch" {
			continue
		}
		from, to := max(end, s.Addr/page*page), (s.Addr+s.Size+page-1)/page*page
		if to <= end {
			continue
		}
		if s.Addr < initText || s.Addr >= bss {
			kept += int64(to - from)
		}
		end = to
	}
	return int64(end - text), kept, nil
}

// Unpacks lists the compressions of an initramfs that the kernel can undo, the best first, None last. Without a configuration
// beside the kernel it is gzip, which every distribution's kernel has.
func (k *Kernel) Unpacks() []Compression {
	var list []Compression
	for c, option := range map[Compression]string{LZ4: "RD_LZ4", Zstd: "RD_ZSTD", Gzip: "RD_GZIP"} {
		if k.option(option) == "y" || k.config == nil && c == Gzip {
			list = append(list, c)
		}
	}
	slices.Sort(list)
	return append(list, None)
}
