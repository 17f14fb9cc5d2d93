// Mkinitramfs builds the kernel and initrd pair that a Linux stubdomain starts from.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/initramfs"
	"github.com/stubinit/stubinit/internal/qemu"
)

const usage = `usage: mkinitramfs [flags] -o DIR      write qemu-stubdom-linux-kernel, qemu-stubdom-linux-rootfs, stubdom-image.txt
       mkinitramfs [flags] -list      print what the archive would hold, and who asked for it

With -root the image is made from an unpacked package tree. Without it the packages that the manifest names are fetched
for -suite first, which works in a checkout of the project: build/root/SUITE is the tree then.

`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := mkinitramfs(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// mkinitramfs returns the exit code: 2 for a bad command line, 1 for a failure.
func mkinitramfs(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("mkinitramfs", flag.ContinueOnError)
	flags.SetOutput(stderr)
	var o options
	flags.StringVar(&o.root, "root", "", "unpacked package `tree`")
	flags.StringVar(&o.suite, "suite", "trixie", "Debian `suite` to fetch if there is no -root")
	flags.StringVar(&o.manifest, "manifest", "configs/initramfs-debian.manifest", "`file` that says what goes in")
	flags.StringVar(&o.init, "init", "build/stubinit", "stubinit, a static `program`: /init")
	flags.StringVar(&o.kernel, "kernel", "", "`release` of the kernel, if the tree has several")
	flags.StringVar(&o.compress, "compress", "auto", "auto, lz4, zstd, zstd-19, gzip or none; auto is the best that the kernel can unpack and that takes seconds")
	flags.StringVar(&o.out, "o", "", "`folder` for the result")
	flags.BoolVar(&o.list, "list", false, "print files, sizes and reasons")
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	if flags.NArg() > 0 || o.out == "" && !o.list {
		flags.Usage()
		return 2
	}
	if err := run(ctx, o, stdout, stderr); err != nil {
		fmt.Fprintf(stderr, "mkinitramfs: %v\n", err)
		return 1
	}
	return 0
}

type options struct {
	root, suite, manifest, init, kernel, compress, out string
	list                                               bool
}

func run(ctx context.Context, o options, stdout, stderr io.Writer) error {
	start := time.Now()
	progress := func(s string) { fmt.Fprintf(stderr, "mkinitramfs: %5.1fs %s\n", time.Since(start).Seconds(), s) }

	var compression initramfs.Compression
	if o.compress != "auto" {
		var err error
		if compression, err = initramfs.ParseCompression(o.compress); err != nil {
			return err
		}
	}
	manifest, err := readManifest(o.manifest)
	if err != nil {
		return err
	}
	if o.root == "" {
		o.root = filepath.Join("build", "root", o.suite)
		progress("fetching packages of " + o.suite)
		if err := fetch(ctx, o.suite, o.root, manifest.Packages(), stderr); err != nil {
			return err
		}
	}
	image, err := initramfs.Build(ctx, initramfs.Config{
		Root: o.root, Manifest: manifest, Init: o.init, Kernel: o.kernel, ProbeQEMU: probe, Progress: progress,
	})
	if err != nil {
		return err
	}
	if o.list {
		if err := image.List(stdout); err != nil {
			return err
		}
	}
	if o.out == "" {
		return nil
	}
	if o.compress == "auto" {
		compression = image.Kernel.Unpacks()[0]
	}
	progress(fmt.Sprintf("packing with %v", compression))
	out, err := image.Write(ctx, o.out, compression)
	if err != nil {
		return err
	}
	progress(fmt.Sprintf("wrote %s: %.1f MB packed, %.1f MB unpacked, kernel %.1f MB", filepath.Join(o.out, initramfs.ArchiveFile),
		float64(out.Packed)/1e6, float64(out.Unpacked)/1e6, float64(image.Kernel.Size)/1e6))
	_, err = fmt.Fprintf(stdout, "least stubdomain_memory: %d (%d with rootfstype=ramfs in stubdomain_cmdline)\n%s",
		out.Memory.Least(), out.Memory.LeastRamfs(), out.Memory)
	return err
}

func readManifest(name string) (*initramfs.Manifest, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	defer f.Close()
	return initramfs.ParseManifest(f, name)
}

// probeLimit is for three starts of QEMU, which take a tenth of a second each where nothing else runs.
const probeLimit = time.Minute

// probe runs the image's QEMU for what the agent would else have to find out at each start.
func probe(ctx context.Context, command []string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	features, err := qemu.ProbeBinary(ctx, func(ctx context.Context, args ...string) ([]byte, error) {
		return exec.CommandContext(ctx, command[0], append(command[1:len(command):len(command)], args...)...).CombinedOutput()
	})
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, fmt.Errorf("QEMU could not be asked what it can do within %v, is this machine too busy? Run it again: %w", probeLimit, ctx.Err())
	}
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(features)
	return append(text, '\n'), err
}

// fetch runs the project's script that unpacks Debian packages.
func fetch(ctx context.Context, suite, root string, packages []string, stderr io.Writer) error {
	const script = "scripts/fetch-packages"
	if len(packages) == 0 {
		return errors.New("the manifest names no package: give an unpacked tree with -root")
	}
	if _, err := os.Stat(script); err != nil {
		return fmt.Errorf("%w: run mkinitramfs in a checkout of the project, or give an unpacked tree with -root", err)
	}
	cmd := exec.CommandContext(ctx, script, append([]string{suite, root}, packages...)...)
	cmd.Stdout, cmd.Stderr = stderr, stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w", script, err)
	}
	return nil
}
