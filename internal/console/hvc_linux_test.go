package console

import (
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/xen/consring"
)

// pty gives a terminal's two ends.
func pty(t *testing.T) (master *os.File, path string) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	c, err := master.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	c.Control(func(fd uintptr) {
		if e := unix.IoctlSetPointerInt(int(fd), unix.TIOCSPTLCK, 0); e != nil {
			t.Fatal(e)
		}
		n, e := unix.IoctlGetInt(int(fd), unix.TIOCGPTN)
		if e != nil {
			t.Fatal(e)
		}
		path = "/dev/pts/" + strconv.Itoa(n)
	})
	return master, path
}

func TestHVCRoom(t *testing.T) {
	_, path := pty(t)
	h, err := OpenHVC(path)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	check := func(what string, want int) {
		t.Helper()
		if got := h.Room(); got != want {
			t.Errorf("%s: room %d, want %d", what, got, want)
		}
	}
	check("no backend", 0)
	h.AllowLastWords(300)
	check("last words", 300)
	if _, err := h.Write(make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	check("after 100 of them", 200)
	h.SetConnected(true)
	check("connected, ring unseen", unseenRoom)
	free := consring.OutSize
	h.SetFree(func() int { return free })
	check("ring empty", consring.OutSize-kernelReserve)
	free = 100
	if got := h.Room(); got > 0 {
		t.Errorf("ring nearly full: room %d", got)
	}
	h.SetConnected(false)
	check("backend gone, last words, ring nearly full", 100)
}

func TestOpenMissing(t *testing.T) {
	if _, err := OpenHVC("/nonexistent/hvc0"); !os.IsNotExist(err) {
		t.Errorf("log: %v", err)
	}
}
