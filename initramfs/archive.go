package initramfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/bits"
	"os"
	"os/exec"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"
)

// Compression is how the archive is packed. The values are ordered by preference. With Debian trixie's kernel and QEMU (39 MB
// unpacked), QEMU counting instructions (-icount shift=1), seconds from the kernel's start to PID 1 and of xl create in all:
//
//	lz4     12.0 MB   7.45  12.76
//	zstd     9.3 MB   8.02  13.38
//	zstd-19  8.3 MB   8.22  13.53
//	xz -9    7.3 MB  13.50  18.83  so there is none
//	none    39.3 MB   7.27  12.75
//
// The small image is to be small, and takes zstd-19: 4.7 MB, for 6.4 with LZ4.
type Compression int

const (
	LZ4 Compression = iota
	Zstd
	Gzip
	None
	// Zstd19 is by the zstd program, level 19: a tenth smaller than Zstd, and 13 s of work for 39 MB instead of 3 s.
	Zstd19
)

func (c Compression) String() string { return [...]string{"lz4", "zstd", "gzip", "none", "zstd-19"}[c] }

// ParseCompression is the inverse of String.
func ParseCompression(s string) (Compression, error) {
	for _, c := range []Compression{LZ4, Zstd, Gzip, None, Zstd19} {
		if s == c.String() {
			return c, nil
		}
	}
	return 0, fmt.Errorf("compression %q: want lz4, zstd, zstd-19, gzip or none", s)
}

const (
	// window is how far back zstd refers, and so what the kernel allocates to unpack. With 8 MiB the small image's archive is 0.2 % smaller, and
	// what it takes to unpack it, whose lack nothing can log, is more than what it takes to serve: 47 MiB or 48 were too little now and then.
	window = 2 << 20
	// block is LZ4's; the kernel knows no other for it.
	block = 8 << 20
)

// WriteArchive writes the image as a newc archive (Documentation/driver-api/early-userspace/buffer-format.rst), packed as c
// says. The bytes depend on nothing but the entries: owner 0, time 0, inodes counted from 1, names in order.
func (im *Image) WriteArchive(ctx context.Context, w io.Writer, c Compression) (err error) {
	var packed io.WriteCloser
	switch c {
	case LZ4:
		// The legacy frame is what the kernel knows (lib/decompress_unlz4.c). Level 9 is the library's best.
		legacy := lz4.NewWriter(w)
		packed, err = legacy, legacy.Apply(lz4.LegacyOption(true), lz4.CompressionLevelOption(lz4.Level9))
	case Zstd:
		// One goroutine: with more, blocks depend on how they were cut.
		packed, err = zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBestCompression), zstd.WithWindowSize(window),
			zstd.WithEncoderConcurrency(1))
	case Zstd19:
		packed, err = startZstd(ctx, w)
	case Gzip:
		packed, err = gzip.NewWriterLevel(w, gzip.BestCompression)
	default:
		packed = nopCloser{w}
	}
	if err != nil {
		return fmt.Errorf("compress with %v: %w", c, err)
	}
	if err := im.writeNewc(ctx, packed); err != nil {
		packed.Close()
		return err
	}
	if err := packed.Close(); err != nil {
		return fmt.Errorf("compress with %v: %w", c, err)
	}
	return nil
}

// zstdProgram is a running zstd; what is written to it comes out packed at the writer it was started with.
type zstdProgram struct {
	io.WriteCloser
	cmd    *exec.Cmd
	stderr bytes.Buffer
}

func startZstd(ctx context.Context, w io.Writer) (*zstdProgram, error) {
	// The number of threads does not change the bytes, as long as there is one.
	z := &zstdProgram{cmd: exec.CommandContext(ctx, "zstd", "-19", fmt.Sprintf("--zstd=wlog=%d", bits.Len(window)-1), "-T0", "-q", "-c")}
	z.cmd.Stdout, z.cmd.Stderr = w, &z.stderr
	var err error
	if z.WriteCloser, err = z.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := z.cmd.Start(); errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("%w: install zstd", err)
	} else if err != nil {
		return nil, err
	}
	return z, nil
}

// Close waits until all is packed.
func (z *zstdProgram) Close() error {
	err := z.WriteCloser.Close()
	if waited := z.cmd.Wait(); waited != nil {
		return fmt.Errorf("zstd: %w: %s", waited, bytes.TrimSpace(z.stderr.Bytes()))
	}
	return err
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func (im *Image) writeNewc(ctx context.Context, w io.Writer) error {
	archive := cpio.Newc.Writer(w)
	for i, e := range im.Entries {
		if err := ctx.Err(); err != nil {
			return err
		}
		record, err := e.record(uint64(i + 1))
		if err != nil {
			return fmt.Errorf("archive: %w", err)
		}
		if err := archive.WriteRecord(record); err != nil { // closes the file
			return fmt.Errorf("archive: %s: %w", e.Path, err)
		}
	}
	if err := cpio.WriteTrailer(archive); err != nil {
		return fmt.Errorf("archive: %w", err)
	}
	return nil
}

// record is the entry as cpio has it.
func (e *Entry) record(inode uint64) (cpio.Record, error) {
	info := cpio.Info{Name: e.Path[1:], Ino: inode, NLink: 1, Mode: uint64(e.Mode.Perm())}
	for flag, bit := range map[fs.FileMode]uint64{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if e.Mode&flag != 0 {
			info.Mode |= bit
		}
	}
	switch e.Mode.Type() {
	case fs.ModeDir:
		info.Mode |= cpio.S_IFDIR
		return cpio.Record{Info: info}, nil
	case fs.ModeDevice | fs.ModeCharDevice:
		info.Mode |= cpio.S_IFCHR
	case fs.ModeDevice:
		info.Mode |= cpio.S_IFBLK
	case fs.ModeSymlink:
		info.Mode |= cpio.S_IFLNK
		return cpio.StaticRecord([]byte(e.Target), info), nil
	default:
		info.Mode |= cpio.S_IFREG
		if e.Source == "" {
			return cpio.StaticRecord(e.Data, info), nil
		}
		f, err := os.Open(e.Source)
		if err != nil {
			return cpio.Record{}, err
		}
		info.FileSize = uint64(e.Size)
		return cpio.Record{ReaderAt: f, Info: info}, nil
	}
	info.Rmajor, info.Rminor = uint64(e.Major), uint64(e.Minor)
	return cpio.Record{Info: info}, nil
}

// ArchiveSize is the size in bytes of the archive before it is packed.
func (im *Image) ArchiveSize() int64 {
	const header, trailer = 110, 124
	pad := func(n int64) int64 { return (n + 3) &^ 3 }
	size := int64(trailer)
	for _, e := range im.Entries {
		size += pad(header+int64(len(e.Path))) + pad(e.Size) // the name has no leading slash, but a zero byte
	}
	return size
}
