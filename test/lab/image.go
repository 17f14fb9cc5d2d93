package lab

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/u-root/u-root/pkg/cpio"
)

// imageFormat is part of the image's key: raise it when buildImage changes what it makes.
const imageFormat = 1

// image is what the outer QEMU boots, in files under build/lab/SUITE.
type image struct {
	xen, kernel, initramfs string
}

// Top returns the project's folder.
func Top() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Join(filepath.Dir(file), "..", "..")
}

// suiteDir is where a suite's images and runs are kept.
func suiteDir(s Suite) string { return filepath.Join(Top(), "build", "lab", s.Name) }

// buildImage makes the suite's image from Debian's packages, or finds that it is there.
func buildImage(ctx context.Context, s Suite, progress io.Writer) (image, error) {
	dir := suiteDir(s)
	root := filepath.Join(dir, "root")
	img := image{filepath.Join(dir, "xen"), filepath.Join(dir, "vmlinuz"), filepath.Join(dir, "dom0.cpio")}
	lock, err := lockFile(ctx, dir+".lock", progress)
	if err != nil {
		return img, err
	}
	defer lock.Close()

	fetch := exec.CommandContext(ctx, filepath.Join(Top(), "scripts", "fetch-packages"), append([]string{s.Name, root}, s.packages()...)...)
	fetch.Stdout, fetch.Stderr = progress, progress
	if err := fetch.Run(); err != nil {
		return img, fmt.Errorf("scripts/fetch-packages %s: %w", s.Name, err)
	}
	stamp, err := os.ReadFile(root + ".stamp")
	if err != nil {
		return img, fmt.Errorf("what scripts/fetch-packages unpacked: %w", err)
	}
	h := sha256.New()
	fmt.Fprintln(h, imageFormat, string(stamp), bootModules, extraModules, pruned)
	key := hex.EncodeToString(h.Sum(nil))
	keyFile := filepath.Join(dir, "dom0.key")
	if old, err := os.ReadFile(keyFile); err == nil && string(old) == key {
		return img, nil
	}
	fmt.Fprintf(progress, "lab: packing dom0's initramfs %s\n", img.initramfs)
	if err := os.Remove(keyFile); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return img, err
	}
	if err := gunzip(img.xen, filepath.Join(root, "boot", "xen-"+s.Xen+"-amd64.gz")); err != nil {
		return img, err
	}
	kernels, err := filepath.Glob(filepath.Join(root, "boot", "vmlinuz-*"))
	if err != nil || len(kernels) != 1 {
		return img, fmt.Errorf("%s/boot: want one vmlinuz, have %q", root, kernels)
	}
	version := strings.TrimPrefix(filepath.Base(kernels[0]), "vmlinuz-")
	data, err := os.ReadFile(kernels[0])
	if err != nil {
		return img, err
	}
	if err := os.WriteFile(img.kernel, data, 0o644); err != nil {
		return img, err
	}
	if err := pack(ctx, img.initramfs, root, version); err != nil {
		return img, err
	}
	return img, os.WriteFile(keyFile, []byte(key), 0o644)
}

func gunzip(dst, src string) error {
	f, err := os.Open(src)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return fmt.Errorf("%s: %w", src, err)
	}
	data, err := io.ReadAll(z)
	if err != nil {
		return fmt.Errorf("%s: %w", src, err)
	}
	return os.WriteFile(dst, data, 0o644)
}

// pruned are the folders and files that dom0 does not need: every MB costs boot time.
var pruned = []string{
	"boot",
	"usr/bin/perl", "usr/bin/perl5.36.0", "usr/bin/perl5.40.1", "usr/bin/python3.11", "usr/bin/python3.13",
	"usr/lib/xen-4.17/boot/xen-shim", "usr/lib/xen-4.20/boot/xen-shim", "usr/share/qemu/skiboot.lid", "usr/share/perl",
	"usr/lib/x86_64-linux-gnu/perl", "usr/lib/x86_64-linux-gnu/gio",
	"usr/include", "usr/lib/debug", "usr/lib/dracut", "usr/lib/klibc", "usr/lib/modules", "usr/lib/python3", "usr/lib/python3.11",
	"usr/lib/python3.13", "usr/lib/systemd", "usr/lib/udev", "usr/lib/valgrind",
	"usr/lib/x86_64-linux-gnu/gconv", "usr/lib/x86_64-linux-gnu/gstreamer-1.0", "usr/lib/x86_64-linux-gnu/gstreamer1.0",
	"usr/lib/x86_64-linux-gnu/perl-base", "usr/lib/x86_64-linux-gnu/security", "usr/lib/x86_64-linux-gnu/systemd",
	"usr/share/bash-completion", "usr/share/bug", "usr/share/common-licenses", "usr/share/doc", "usr/share/gcc", "usr/share/gdb",
	"usr/share/icons", "usr/share/info", "usr/share/initramfs-tools", "usr/share/iso-codes", "usr/share/lintian", "usr/share/locale",
	"usr/share/man", "usr/share/perl5", "usr/share/python3", "usr/share/xml", "usr/share/zoneinfo", "usr/share/zsh",
	"var/cache", "var/lib/dpkg",
}

// pack writes root as an uncompressed newc archive, with only the modules of this kernel version that the lab uses.
func pack(ctx context.Context, dst, root, version string) error {
	modules, err := moduleClosure(ctx, root, version)
	if err != nil {
		return err
	}
	out, err := os.Create(dst)
	if err != nil {
		return err
	}
	defer out.Close()
	w := cpio.Newc.Writer(out)
	rec := cpio.NewRecorder()
	add := func(path, name string) error {
		r, err := rec.GetRecord(path)
		if err != nil {
			return err
		}
		r.Name, r.UID, r.GID = name, 0, 0
		return w.WriteRecord(r)
	}
	err = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil || name == "." {
			return err
		}
		if slices.Contains(pruned, name) {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		return add(path, name)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", dst, err)
	}
	// Modules go to a tree of their own, so that depmod lists only what is there.
	tree, err := os.MkdirTemp(filepath.Dir(dst), "modules-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	base := filepath.Join("lib/modules", version)
	for _, m := range append(modules, "modules.order", "modules.builtin", "modules.builtin.modinfo") {
		to := filepath.Join(tree, base, m)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		data, err := os.ReadFile(filepath.Join(root, base, m))
		if err != nil {
			return err
		}
		if err := os.WriteFile(to, data, 0o644); err != nil {
			return err
		}
	}
	if err := depmod(ctx, tree, version); err != nil {
		return err
	}
	err = filepath.WalkDir(filepath.Join(tree, "lib/modules"), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(tree, path)
		if err != nil {
			return err
		}
		return add(path, filepath.Join("usr", name))
	})
	if err != nil {
		return fmt.Errorf("%s: %w", dst, err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return fmt.Errorf("%s: %w", dst, err)
	}
	return out.Close()
}

func depmod(ctx context.Context, root, version string) error {
	path, err := exec.LookPath("depmod")
	if err != nil {
		path = "/usr/sbin/depmod" // not in a plain user's PATH
	}
	out, err := exec.CommandContext(ctx, path, "-b", root, version).CombinedOutput()
	if err != nil {
		return fmt.Errorf("depmod -b %s %s (install kmod if it is missing): %w: %s", root, version, err, bytes.TrimSpace(out))
	}
	return nil
}

// moduleClosure returns the files, relative to the version's folder, of the lab's modules and all that they depend on.
func moduleClosure(ctx context.Context, root, version string) ([]string, error) {
	if err := depmod(ctx, root, version); err != nil {
		return nil, err
	}
	file := filepath.Join(root, "lib/modules", version, "modules.dep")
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	builtin, err := os.ReadFile(filepath.Join(root, "lib/modules", version, "modules.builtin"))
	if err != nil {
		return nil, err
	}
	byName := map[string][]string{} // module name → its file and those it needs
	for line := range strings.Lines(string(data)) {
		path, deps, _ := strings.Cut(strings.TrimSpace(line), ":")
		byName[moduleName(path)] = append([]string{path}, strings.Fields(deps)...)
	}
	var files []string
	for _, m := range slices.Concat(bootModules, extraModules) {
		found := byName[moduleName(m)]
		if found == nil && !strings.Contains(strings.ReplaceAll(string(builtin), "-", "_"), "/"+moduleName(m)+".ko") {
			return nil, fmt.Errorf("%s: no module %s", file, m)
		}
		files = append(files, found...)
	}
	slices.Sort(files)
	return slices.Compact(files), nil
}

// moduleName is a module's name as the kernel knows it.
func moduleName(path string) string {
	name, _, _ := strings.Cut(filepath.Base(path), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}
