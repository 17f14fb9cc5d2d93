package initramfs

import (
	"bytes"
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

	// InitSize is the memory that the unpacked kernel with its bss takes, in bytes: init_size of the boot header
	// (Documentation/arch/x86/boot.rst). It is a few MiB more than the kernel itself.
	InitSize int64

	config map[string]string
}

// option is an option's value (y, m, a number, a string in quotes), or "" if it is not set.
func (k *Kernel) option(name string) string { return k.config[name] }

// kernel finds the kernel in /boot of the tree. release may be empty if there is only one.
func (r root) kernel(release string) (*Kernel, error) {
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
	// Offsets of boot.rst: magic "HdrS" at 0x202, protocol version at 0x206, init_size at 0x260 since version 2.10.
	if len(image) < 0x264 || !bytes.Equal(image[0x202:0x206], []byte("HdrS")) || binary.LittleEndian.Uint16(image[0x206:]) < 0x20a {
		return nil, fmt.Errorf("kernel: %s is not an x86 bzImage of boot protocol 2.10 or later", k.Path)
	}
	k.InitSize = int64(binary.LittleEndian.Uint32(image[0x260:]))

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

// Unpacks lists the compressions of an initramfs that the kernel can undo, the best first, None last. Without a configuration
// beside the kernel it is gzip, which every distribution's kernel has.
func (k *Kernel) Unpacks() []Compression {
	var list []Compression
	for c, option := range map[Compression]string{Zstd: "RD_ZSTD", Gzip: "RD_GZIP"} {
		if k.option(option) == "y" || k.config == nil && c == Gzip {
			list = append(list, c)
		}
	}
	slices.Sort(list)
	return append(list, None)
}
