//go:build integration

package console

import (
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// OpenRaw needs CAP_SYS_NICE for SCHED_FIFO.
func TestOpenRaw(t *testing.T) {
	_, path := pty(t)
	f, err := OpenRaw(path, os.O_RDONLY)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	if got.Lflag != 0 || got.Iflag != 0 || got.Oflag != 0 {
		t.Errorf("lflag %#x iflag %#x oflag %#x, want none", got.Lflag, got.Iflag, got.Oflag)
	}
	if fl, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil || fl&unix.O_NONBLOCK != 0 {
		t.Errorf("flags %#x (%v), want a blocking descriptor", fl, err)
	}
	attr, err := unix.SchedGetAttr(0, 0)
	if err != nil || attr.Policy != unix.SCHED_NORMAL {
		t.Errorf("the caller's thread has policy %d (%v)", attr.Policy, err)
	}
	if _, err := OpenRaw("/nonexistent/hvc2", os.O_RDONLY); !os.IsNotExist(err) {
		t.Errorf("missing console: %v", err)
	}
}
