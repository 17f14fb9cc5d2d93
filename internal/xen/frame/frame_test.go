package frame

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"unsafe"

	"github.com/stubinit/stubinit/internal/xen/privcmd"
)

// fakeMapper is a domain's memory by frame number.
type fakeMapper struct {
	frames map[uint64][]byte
	table  []uint64
	err    error
	mapped int
	write  bool // the last time
}

func (f *fakeMapper) mapFrame(mfn uint64, write bool) ([]byte, error) {
	f.write = write
	mem, ok := f.frames[mfn]
	if !ok {
		return nil, errors.New("EINVAL")
	}
	f.mapped++
	return mem, nil
}

func (f *fakeMapper) unmap([]byte) error { f.mapped--; return nil }

func (f *fakeMapper) grantTable(n uint32) ([]uint64, error) { return f.table[:n], f.err }

func TestMapGranted(t *testing.T) {
	table := make([]byte, Size)
	entry := func(ref int, flags, domid uint16, mfn uint32) {
		b := table[ref%512*8:]
		binary.LittleEndian.PutUint16(b, flags)
		binary.LittleEndian.PutUint16(b[2:], domid)
		binary.LittleEndian.PutUint32(b[4:], mfn)
	}
	entry(9, 1, 0, 0x1234)       // in the first frame's place too, but the second is asked for
	entry(10, 1|8|16, 0, 0x1234) // read and written by the backend
	entry(11, 1, 3, 0x1234)
	entry(12, 0, 0, 0)
	entry(13, 1, 0, 0x999)
	ring := make([]byte, Size)
	binary.LittleEndian.PutUint32(ring[3080:], 0xdeadbeef)
	m := &fakeMapper{frames: map[uint64][]byte{0x50: make([]byte, Size), 0x51: table, 0x1234: ring}, table: []uint64{0x50, 0x51}}
	for _, tt := range []struct {
		ref  uint32
		fail string
	}{
		{512 + 9, ""}, {512 + 10, ""},
		{9, "not a frame given"},
		{512 + 11, "domain 3: not a frame given to domain 0"},
		{512 + 12, "flags 0x0"},
		{512 + 13, "map own frame 0x999"},
		{1 << 20, "beyond the grant table"},
	} {
		f, err := mapGrantedWith(m, tt.ref, 0)
		if tt.fail != "" {
			if err == nil || !strings.Contains(err.Error(), tt.fail) {
				t.Errorf("reference %d: %v, want %q", tt.ref, err, tt.fail)
			}
			continue
		}
		if err != nil {
			t.Errorf("reference %d: %v", tt.ref, err)
			continue
		}
		if got := f.Uint32(3080); got != 0xdeadbeef {
			t.Errorf("reference %d: %#x at 3080", tt.ref, got)
		}
		f.SetUint32(3084, 0xcafe)
		if got := binary.LittleEndian.Uint32(ring[3084:]); got != 0xcafe || !m.write || &f.Bytes()[0] != &ring[0] {
			t.Errorf("reference %d: wrote %#x, mapped for writing: %t", tt.ref, got, m.write)
		}
		f.Close()
		f.Close() // once is enough
	}
	if m.mapped != 0 {
		t.Errorf("%d mappings left", m.mapped)
	}
	m.err = errors.New("EPERM")
	if _, err := mapGrantedWith(m, 9, 0); !errors.Is(err, m.err) {
		t.Errorf("no grant table: %v", err)
	}
}

// Sizes and offsets are the C structures': privcmd.h, grant_table.h (x86-64 and arm64 alike).
func TestLayout(t *testing.T) {
	for _, tt := range []struct {
		name      string
		got, want uintptr
	}{
		{"mmap", unsafe.Sizeof(privcmdMmap{}), 0x10},
		{"mmap.dom", unsafe.Offsetof(privcmdMmap{}.dom), 4},
		{"mmap.entry", unsafe.Offsetof(privcmdMmap{}.entry), 8},
		{"entry", unsafe.Sizeof(privcmdMmapEntry{}), 24},
		{"setup_table", unsafe.Sizeof(setupTable{}), 24},
		{"setup_table.nr_frames", unsafe.Offsetof(setupTable{}.nrFrames), 4},
		{"setup_table.status", unsafe.Offsetof(setupTable{}.status), 8},
		{"setup_table.frame_list", unsafe.Offsetof(setupTable{}.frames), 16},
		{"mmap ioctl's size", ioctlMmap >> 16, 0x10},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: %d, want %d", tt.name, tt.got, tt.want)
		}
	}
}

func TestOf(t *testing.T) {
	mem := make([]byte, Size)
	f := Of(mem)
	f.SetUint32(8, 0x01020304)
	if mem[8] != 4 || f.Uint32(8) != 0x01020304 || len(f.Bytes()) != Size {
		t.Errorf("memory %x", mem[8:12])
	}
	if err := f.Close(); err != nil || f.Uint32(8) == 0 {
		t.Errorf("Close: %v", err)
	}
}

func TestNoDevice(t *testing.T) {
	if _, err := Map(1); err == nil || !strings.Contains(err.Error(), privcmd.Device) {
		t.Errorf("Map without Xen: %v", err)
	}
	if _, err := MapGranted(9, 0); err == nil {
		t.Error("MapGranted without Xen: no error")
	}
}
