package privcmd

import (
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

// fakeDevice notes each call.
type fakeDevice struct {
	calls []string
	value int
	err   error
}

func (d *fakeDevice) ioctl(req uint, arg []byte) (int, error) {
	d.calls = append(d.calls, fmt.Sprintf("%#x %x", req, arg))
	return d.value, d.err
}

func (d *fakeDevice) dmOp(domid uint16, bufs [][]byte) error {
	d.calls = append(d.calls, fmt.Sprintf("dm_op %d %x", domid, bufs))
	return d.err
}

func (d *fakeDevice) Close() error { return d.err }

// struct xen_dm_op of hvm/dm_op.h: operation 16, padding, the reason, and the
// rest of the 32 bytes.
func TestRemoteShutdown(t *testing.T) {
	dev := &fakeDevice{}
	f := &File{dev}
	if err := errors.Join(f.RemoteShutdown(7, Crash), f.RemoteShutdown(8, Poweroff), f.DMOp(9, []byte{1}, []byte{2, 3}), f.Close()); err != nil {
		t.Error(err)
	}
	zeros := strings.Repeat("00", 20)
	want := []string{
		"dm_op 7 [" + "10000000" + "00000000" + "03000000" + zeros + "]",
		"dm_op 8 [" + "10000000" + "00000000" + "00000000" + zeros + "]",
		"dm_op 9 [01 0203]",
	}
	if diff := cmp.Diff(want, dev.calls); diff != "" {
		t.Error(diff)
	}
	dev.err = syscall.ESRCH
	for text, err := range map[string]error{
		"/dev/xen/privcmd: shut down domain 7 (crash): no such process":         f.RemoteShutdown(7, Crash),
		"/dev/xen/privcmd: device model operation on domain 7: no such process": f.DMOp(7, nil),
		"/dev/xen/privcmd: close: no such process":                              f.Close(),
	} {
		var e *Error
		if !errors.As(err, &e) || !errors.Is(err, syscall.ESRCH) || err.Error() != text {
			t.Errorf("err = %v, want %s", err, text)
		}
	}
}

// SHUTDOWN_* of sched.h.
func TestReasons(t *testing.T) {
	for i, want := range []string{"poweroff", "reboot", "suspend", "crash", "watchdog", "soft reset", "reason 6"} {
		if got := Reason(i).String(); got != want {
			t.Errorf("Reason(%d) = %s, want %s", i, got, want)
		}
	}
	if diff := cmp.Diff([]Reason{0, 1, 2, 3, 4, 5}, []Reason{Poweroff, Reboot, Suspend, Crash, Watchdog, SoftReset}); diff != "" {
		t.Error(diff)
	}
}

func TestHypercall(t *testing.T) {
	dev := &fakeDevice{value: 0x40014}
	f := &File{dev}
	if v, err := f.Hypercall(34, 1, 0x1122334455667788); v != 0x40014 || err != nil {
		t.Error(v, err)
	}
	if restricted, err := f.Restricted(); restricted || err != nil {
		t.Error("restricted:", restricted, err)
	}
	dev.err = syscall.EPERM
	if restricted, err := f.Restricted(); !restricted || err != nil {
		t.Error("not restricted:", restricted, err)
	}
	dev.err = syscall.ENOSYS
	if restricted, err := f.Restricted(); restricted || !errors.Is(err, syscall.ENOSYS) || err.Error() != "/dev/xen/privcmd: hypercall 17: function not implemented" {
		t.Error(restricted, err)
	}
	zeros := func(n int) string { return strings.Repeat("00", 8*n) }
	version := "0x305000 " + "1100000000000000" + zeros(5)
	want := []string{"0x305000 " + "2200000000000000" + "0100000000000000" + "8877665544332211" + zeros(3), version, version, version}
	if diff := cmp.Diff(want, dev.calls); diff != "" {
		t.Error(diff)
	}
	if _, err := f.Hypercall(1, 1, 2, 3, 4, 5, 6); !errors.Is(err, syscall.EINVAL) || !strings.Contains(err.Error(), "6 arguments, the limit is 5") {
		t.Errorf("err = %v", err)
	}
}

// The system calls themselves, on a file that is no hypercall device.
func TestKernelDevice(t *testing.T) {
	if _, err := os.Stat(Device); errors.Is(err, fs.ErrNotExist) {
		err := RemoteShutdown(7, Crash)
		if !errors.Is(err, fs.ErrNotExist) || err.Error() != "/dev/xen/privcmd: open: no such file or directory: load kernel module xen_privcmd" {
			t.Errorf("RemoteShutdown: %v", err)
		}
	}
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := open(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.RemoteShutdown(7, Crash); !errors.Is(err, syscall.ENOTTY) {
		t.Errorf("RemoteShutdown: %v", err)
	}
	if _, err := f.Hypercall(17, 0); !errors.Is(err, syscall.ENOTTY) {
		t.Errorf("Hypercall: %v", err)
	}
	for _, bufs := range [][][]byte{nil, make([][]byte, 1<<16)} {
		if err := f.DMOp(7, bufs...); !errors.Is(err, syscall.EINVAL) {
			t.Errorf("%d buffers: %v", len(bufs), err)
		}
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	if _, err := f.Hypercall(17, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
	if err := remoteShutdown(path, 7, Crash); !errors.Is(err, syscall.ENOTTY) {
		t.Errorf("remoteShutdown: %v", err)
	}
}
