package gntalloc

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fakeDevice notes each call in order; ALLOC answers with index and references.
type fakeDevice struct {
	calls []string
	index uint64
	fail  map[string]error // by the call's first word
}

func (d *fakeDevice) note(name, rest string) error {
	d.calls = append(d.calls, strings.TrimSpace(name+" "+rest))
	return d.fail[name]
}

func (d *fakeDevice) ioctl(req uint, arg []byte) error {
	if err := d.note(fmt.Sprintf("%#x", req), fmt.Sprintf("%x", arg)); err != nil {
		return err
	}
	if req == 0x184705 {
		binary.LittleEndian.PutUint64(arg[8:], d.index)
		for i := range int(binary.LittleEndian.Uint32(arg[4:])) {
			binary.LittleEndian.PutUint32(arg[16+4*i:], uint32(100+i))
		}
	}
	return nil
}

func (d *fakeDevice) mmap(offset int64, size int) ([]byte, error) {
	if err := d.note("mmap", fmt.Sprintf("%#x %d", offset, size)); err != nil {
		return nil, err
	}
	return make([]byte, size), nil
}

func (d *fakeDevice) munmap(mem []byte) error { return d.note("munmap", fmt.Sprint(len(mem))) }
func (d *fakeDevice) Close() error            { return d.note("close", "") }

// The whole life of shared pages: numbers, layouts and order as in sys/gntalloc.h.
func TestLife(t *testing.T) {
	dev := &fakeDevice{index: 0x12345000}
	p, err := alloc(dev, 0x0102, 3, true)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]uint32{100, 101, 102}, p.Refs); diff != "" || len(p.Mem) != 3*4096 {
		t.Errorf("%d bytes, references: %s", len(p.Mem), diff)
	}
	if err := errors.Join(
		p.SetUnmapNotify(21, ClearByte|SendEvent, 9),
		p.Detach(),
		p.Detach(),
		p.Close(),
		p.Close(),
	); err != nil {
		t.Error(err)
	}
	want := []string{
		"0x184705 " + "0201" + "0100" + "03000000" + "0000000000000000" + "00000000" + "00000000" + "00000000",
		"mmap 0x12345000 12288",
		"0x104707 " + "1550341200000000" + "03000000" + "09000000",
		"0x104706 " + "0050341200000000" + "03000000" + "00000000",
		"close",
		"munmap 12288",
	}
	if diff := cmp.Diff(want, dev.calls); diff != "" {
		t.Error(diff)
	}
	if p.Mem != nil {
		t.Error("Mem is left after Close")
	}
}

// One read-only page: the struct's least size, and Close without Detach.
func TestReadOnlyPage(t *testing.T) {
	dev := &fakeDevice{}
	p, err := alloc(dev, 0, 1, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
	want := []string{
		"0x184705 " + "0000" + "0000" + "01000000" + "0000000000000000" + "00000000" + "00000000",
		"mmap 0x0 4096",
		"0x104706 " + "0000000000000000" + "01000000" + "00000000",
		"close",
		"munmap 4096",
	}
	if diff := cmp.Diff(want, dev.calls); diff != "" {
		t.Error(diff)
	}
}

func TestMostPages(t *testing.T) {
	p, err := alloc(&fakeDevice{}, 0, 1024, true)
	if err != nil || len(p.Refs) != 1024 || p.Refs[1023] != 1123 || len(p.Mem) != 4<<20 {
		t.Errorf("%d references, %d bytes, %v", len(p.Refs), len(p.Mem), err)
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		count int
		fail  map[string]error
		is    error
		text  string
	}{
		{0, nil, syscall.EINVAL, "/dev/xen/gntalloc: grant 0 pages to domain 4: not 1 to 1024"},
		{1025, nil, syscall.EINVAL, "not 1 to 1024"},
		{2, map[string]error{"0x184705": syscall.ENOSPC}, syscall.ENOSPC, "raise kernel parameter xen_gntalloc.limit (default 1024)"},
		{2, map[string]error{"0x184705": syscall.ENOMEM}, syscall.ENOMEM, "grant 2 pages to domain 4: cannot allocate memory"},
		{2, map[string]error{"mmap": syscall.ENOENT}, syscall.ENOENT, "grant 2 pages to domain 4: map: no such file"},
	} {
		dev := &fakeDevice{fail: tt.fail}
		_, err := alloc(dev, 4, tt.count, true)
		var e *Error
		if !errors.As(err, &e) || !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("err = %v, want %s", err, tt.text)
		}
		if last := dev.calls[len(dev.calls)-1]; last != "close" {
			t.Errorf("%v: the device is left open: %s", err, dev.calls)
		}
	}

	dev := &fakeDevice{fail: map[string]error{"0x104707": syscall.EINVAL, "0x104706": syscall.ENOENT, "munmap": syscall.EIO}}
	p, err := alloc(dev, 4, 1, true)
	if err != nil {
		t.Fatal(err)
	}
	for _, offset := range []int{-1, 4096} {
		if err := p.SetUnmapNotify(offset, ClearByte, 0); !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "outside of 4096 bytes") {
			t.Errorf("offset %d: %v", offset, err)
		}
	}
	if err := p.SetUnmapNotify(4095, ClearByte, 0); !errors.Is(err, syscall.EINVAL) || strings.Contains(err.Error(), "outside") {
		t.Errorf("err = %v", err)
	}
	err = p.Close()
	if !errors.Is(err, syscall.ENOENT) || !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "give up 1 grants") || !strings.Contains(err.Error(), "unmap: input/output error") {
		t.Errorf("Close: %v", err)
	}
	if err := p.SetUnmapNotify(0, ClearByte, 0); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// The system calls themselves, on a file that is no grant device.
func TestKernelDevice(t *testing.T) {
	if _, err := os.Stat(Device); errors.Is(err, fs.ErrNotExist) {
		_, err := Alloc(0, 1, true)
		if !errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(err.Error(), "/dev/xen/gntalloc: open: no such file") {
			t.Errorf("Alloc: %v", err)
		}
	}
	path := filepath.Join(t.TempDir(), "pages")
	content := strings.Repeat("a", PageSize) + strings.Repeat("b", PageSize)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := openDevice(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.ioctl(ioctlDealloc, deallocArg(0, 1)); !errors.Is(err, syscall.ENOTTY) {
		t.Errorf("ioctl: %v", err)
	}
	mem, err := dev.mmap(PageSize, PageSize)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Error(err)
	}
	// The mapping is shared, writable and outlives the descriptor.
	mem[0] = 'c'
	if got, err := os.ReadFile(path); err != nil || got[PageSize-1] != 'a' || got[PageSize] != 'c' {
		t.Errorf("the file has %q, %v", got[PageSize-1:PageSize+1], err)
	}
	if err := dev.munmap(mem); err != nil {
		t.Error(err)
	}
}
