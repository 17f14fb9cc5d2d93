package console

import (
	"os"
	"strconv"
	"testing"

	"golang.org/x/sys/unix"
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
	free := ringSize
	h.SetFree(func() int { return free })
	check("ring empty", ringSize-kernelReserve)
	free = 100
	if got := h.Room(); got > 0 {
		t.Errorf("ring nearly full: room %d", got)
	}
	h.SetConnected(false)
	check("backend gone, last words, ring nearly full", 100)
}

func TestRingFree(t *testing.T) {
	for _, tt := range []struct {
		cons, prod uint32
		want       int
	}{
		{0, 0, 2048}, {0, 2048, 0}, {0, 2049, 0}, {10, 30, 2028},
		{0xffffffff, 1, 2046}, {5, 4, 0}, // prod behind cons: not a ring
	} {
		if got := RingFree(tt.cons, tt.prod); got != tt.want {
			t.Errorf("RingFree(%d, %d) = %d, want %d", tt.cons, tt.prod, got, tt.want)
		}
	}
}

// Every byte value passes a raw tty unchanged, and nothing comes back.
func TestRawTermios(t *testing.T) {
	master, path := pty(t)
	tty, err := os.OpenFile(path, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	if err := unix.IoctlSetTermios(int(tty.Fd()), unix.TCSETS, rawTermios()); err != nil {
		t.Fatal(err)
	}
	var all [256]byte
	for i := range all {
		all[i] = byte(i)
	}
	exchange := func(what string, to, from *os.File) {
		t.Helper()
		if _, err := to.Write(all[:]); err != nil {
			t.Fatal(err)
		}
		var got []byte
		for len(got) < len(all) {
			buf := make([]byte, 512)
			n, err := from.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, buf[:n]...)
		}
		if string(got) != string(all[:]) {
			t.Errorf("%s: got %x", what, got)
		}
	}
	exchange("in", master, tty)
	exchange("out", tty, master)
	if err := unix.IoctlSetInt(int(master.Fd()), unix.TCFLSH, unix.TCIFLUSH); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCINQ)
	if err != nil || n != 0 {
		t.Errorf("%d bytes echoed (%v)", n, err)
	}
}

func TestOpenMissing(t *testing.T) {
	for name, open := range map[string]func() error{
		"log": func() error { _, err := OpenHVC("/nonexistent/hvc0"); return err },
	} {
		if err := open(); !os.IsNotExist(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
