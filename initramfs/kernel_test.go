package initramfs

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"io"
	"os/exec"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/stubinit/stubinit/initramfs/initramfstest"
)

// Sections as in Debian's 6.12, with what makes no difference left out.
var vmlinux = ELF{Loaded: []initramfstest.Section{
	{Name: ".text", Addr: 0xffffffff81000000, Size: 0x1000000},
	{Name: ".rodata", Addr: 0xffffffff82000000, Size: 0x667ee6},
	{Name: ".pci_fixup", Addr: 0xffffffff82667ef0, Size: 0x003e60},
	{Name: ".BTF", Addr: 0xffffffff826d3b84, Size: 0x4ba9f0},
	{Name: ".data", Addr: 0xffffffff82c00000, Size: 0x270d80},
	{Name: ".orc_unwind_ip", Addr: 0xffffffff82e8dbb8, Size: 0x1b8630},
	{Name: ".data..percpu", Addr: 0, Size: 0x39000},
	{Name: ".init.text", Addr: 0xffffffff83355000, Size: 0x8e5d4},
	{Name: ".init.data", Addr: 0xffffffff833e8000, Size: 0x1e56e0},
	{Name: ".bss", Addr: 0xffffffff8373c000, Size: 0x4c4000},
	{Name: ".brk", Addr: 0xffffffff83c00000, Size: 0x30000},
	{Name: ".init.scratch", Addr: 0xffffffff83e00000, Size: 0x400000},
}}

func TestKernelMemory(t *testing.T) {
	packed := func(content []byte, writer func(io.Writer) io.WriteCloser) string {
		var b bytes.Buffer
		w := writer(&b)
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	zip := func(content []byte) string {
		return packed(content, func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) })
	}
	file := vmlinux.Bytes()
	size := string(binary.LittleEndian.AppendUint32(nil, uint32(len(file))))
	cmd := exec.Command("xz", "--stdout")
	cmd.Stdin = bytes.NewReader(file)
	xz, err := cmd.Output()
	if err != nil {
		t.Fatalf("xz: %v: install xz-utils", err)
	}
	const initSize = 48 << 20
	const (
		loaded = 0x2c30000 // from .text to .brk
		kept   = 0x1000000 + 0x668000 + 0x4000 + 0x4bc000 + 0x271000 + 0x1ba000 + 0x4c4000 + 0x30000
	)
	for _, test := range []struct {
		name, payload string
		loaded, kept  int64
		err           string
	}{
		{"gzip", zip(file), loaded, kept, ""},
		{"xz", string(xz) + size, loaded, kept, ""},
		{"zstd", packed(file, func(w io.Writer) io.WriteCloser {
			z, err := zstd.NewWriter(w)
			if err != nil {
				t.Fatal(err)
			}
			return z
		}) + size, loaded, kept, ""},
		{"LZ4", packed(file, func(w io.Writer) io.WriteCloser {
			z := lz4.NewWriter(w)
			if err := z.Apply(lz4.LegacyOption(true)); err != nil {
				t.Fatal(err)
			}
			return z
		}) + size, loaded, kept, ""},
		{"LZO", "\x89LZO\x00\r\n\x1a\n", initSize, initSize, ""},
		{"none", "", initSize, initSize, ""},
		{"damaged", zip(file)[:100], 0, 0, "unexpected EOF"},
		{"no more than magic", "\x28\xb5\x2f\xfd", 0, 0, "EOF"},
		{"text", zip([]byte(strings.Repeat("x", 100))), 0, 0, "bad magic number"},
		{"no kernel", zip(ELF{}.Bytes()), 0, 0, "sections .text, .init.text and .bss at 0x0, 0x0 and 0x0: not a kernel for x86"},
	} {
		loaded, kept, err := kernelMemory(t.Context(), initramfstest.BzImage(initSize, test.payload))
		if loaded != test.loaded || kept != test.kept {
			t.Errorf("%s: loaded %#x, kept %#x; want %#x, %#x", test.name, loaded, kept, test.loaded, test.kept)
		}
		if test.err == "" && err != nil || test.err != "" && (err == nil || !strings.Contains(err.Error(), test.err)) {
			t.Errorf("%s: error %v, want %q", test.name, err, test.err)
		}
	}
	image := initramfstest.BzImage(initSize, zip(file))
	if _, _, err := kernelMemory(t.Context(), image[:len(image)-1]); err == nil || !strings.Contains(err.Error(), "before its payload does") {
		t.Errorf("cut short: error %v", err)
	}
}
