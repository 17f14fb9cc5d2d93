package qemu

import (
	"encoding/binary"
	"runtime"
	"slices"
	"testing"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// TestCallFilter runs the filter. The interpreter reads big-endian words, as the kernel does for packets; for seccomp the kernel reads its own (seccomp(2)).
func TestCallFilter(t *testing.T) {
	const refusedResult, kill, allow = unix.SECCOMP_RET_ERRNO | int(unix.EPERM), unix.SECCOMP_RET_KILL_PROCESS, unix.SECCOMP_RET_ALLOW
	arch := auditArch[runtime.GOARCH]
	if arch == 0 {
		t.Fatalf("no filter for %s", runtime.GOARCH)
	}
	var program []bpf.RawInstruction
	for _, i := range callFilter(arch) {
		program = append(program, bpf.RawInstruction{Op: i.Code, Jt: i.Jt, Jf: i.Jf, K: i.K})
	}
	instructions, ok := bpf.Disassemble(program)
	if !ok {
		t.Fatalf("not all instructions are known: %v", instructions)
	}
	vm, err := bpf.NewVM(instructions)
	if err != nil {
		t.Fatal(err)
	}
	result := func(arch, number uint32) int {
		data := make([]byte, 64) // struct seccomp_data: number, arch, instruction pointer, six arguments
		binary.BigEndian.PutUint32(data, number)
		binary.BigEndian.PutUint32(data[4:], arch)
		got, err := vm.Run(data)
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	for number := range uint32(1024) {
		want := allow
		if slices.Contains(refused, number) {
			want = refusedResult
		}
		if got := result(arch, number); got != want {
			t.Errorf("system call %d: %#x, want %#x", number, got, want)
		}
		// The other ABIs of an x86-64 kernel, whose numbers mean something else.
		if got := result(unix.AUDIT_ARCH_I386, number); got != kill {
			t.Errorf("system call %d of i386: %#x, want %#x", number, got, kill)
		}
		if got := result(arch, x32Bit|number); got != kill {
			t.Errorf("system call %d of x32: %#x, want %#x", number, got, kill)
		}
	}
}
