package privcmd

import (
	"encoding/binary"
	"runtime"
	"testing"
	"unsafe"

	"github.com/google/go-cmp/cmp"
)

// struct privcmd_dm_op: u16 dom, u16 num, padding, pointer to num of {pointer, size}.
func TestDMOpLayout(t *testing.T) {
	var pin runtime.Pinner
	defer pin.Unpin()
	one, two := []byte{1}, []byte{2, 3}
	arg := dmOpArg(&pin, 0x0102, [][]byte{one, two, nil})
	if diff := cmp.Diff([]byte{2, 1, 3, 0, 0, 0, 0, 0}, arg[:8]); diff != "" || len(arg) != 16 {
		t.Errorf("%d bytes: %s", len(arg), diff)
	}
	// Follow the pointer as the kernel does.
	table := *(*unsafe.Pointer)(unsafe.Pointer(&arg[8]))
	var want []byte
	for _, b := range [][]byte{one, two} {
		want = binary.LittleEndian.AppendUint64(want, uint64(uintptr(unsafe.Pointer(&b[0]))))
		want = binary.LittleEndian.AppendUint64(want, uint64(len(b)))
	}
	want = append(want, make([]byte, 16)...)
	if diff := cmp.Diff(want, unsafe.Slice((*byte)(table), 48)); diff != "" {
		t.Error(diff)
	}
	if ioctlDMOp != 0x105005 || ioctlHypercall != 0x305000 {
		t.Errorf("ioctls %#x, %#x", ioctlDMOp, ioctlHypercall)
	}
}

// struct privcmd_hypercall with EVTCHNOP_send and the address of a struct evtchn_send.
func TestPort(t *testing.T) {
	port := uint32(3)
	arg := sendArg(&port)
	if len(arg) != 0x30 || ioctlHypercall>>16 != 0x30 {
		t.Errorf("%#x bytes, the ioctl takes %#x", len(arg), ioctlHypercall>>16)
	}
	if diff := cmp.Diff([]byte{32, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0}, arg[:16]); diff != "" {
		t.Error(diff)
	}
	if got := **(**uint32)(unsafe.Pointer(&arg[16])); got != port {
		t.Errorf("port %d, want %d", got, port)
	}
	if _, err := OpenPort(3); err == nil {
		t.Error("OpenPort without Xen: no error")
	}
}
