package fdio

import (
	"bytes"
	"io"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Read waits for data.
func TestRead(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	conn, err := r.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	go func() {
		if n, err := w.Write(want); n != len(want) || err != nil {
			t.Errorf("%d, %v", n, err)
		}
		w.Close()
	}()
	var got []byte
	for buf := make([]byte, 5000); ; {
		n, err := Read(conn, buf)
		got = append(got, buf[:n]...)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, want) {
		t.Error("other bytes came")
	}
}

func TestReadNow(t *testing.T) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fds[0])
	defer unix.Close(fds[1])
	b := make([]byte, 3)
	if n, err := ReadNow(fds[0], b); n != 0 || err != unix.EAGAIN {
		t.Errorf("nothing there: %d, %v", n, err)
	}
	unix.Write(fds[1], []byte("xy"))
	if n, err := ReadNow(fds[0], b); n != 2 || err != nil || string(b[:n]) != "xy" {
		t.Errorf("%d, %v", n, err)
	}
}

func TestSleep(t *testing.T) {
	start := time.Now()
	for range 20 { // signals of the runtime may end one
		Sleep(2 * time.Millisecond)
	}
	if took := time.Since(start); took < 20*time.Millisecond || took > time.Second {
		t.Errorf("20 times 2 ms took %v", took)
	}
}
