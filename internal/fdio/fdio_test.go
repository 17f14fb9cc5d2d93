package fdio

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
)

// pair gives both ends of a connection.
func pair(t *testing.T) (*Conn, *net.UnixConn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "socket")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := DialUnix(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	peer, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		peer.Close()
	})
	return c, peer
}

func TestConn(t *testing.T) {
	nettest.TestConn(t, func() (net.Conn, net.Conn, func(), error) {
		c, peer := pair(t)
		return c, peer, func() {}, nil
	})
}

// More than the socket holds: Write waits, and writes all.
func TestWriteWaits(t *testing.T) {
	c, peer := pair(t)
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	got := make(chan []byte)
	go func() {
		b, err := io.ReadAll(peer)
		if err != nil {
			t.Error(err)
		}
		got <- b
	}()
	if n, err := c.Write(want); n != len(want) || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	c.Close()
	if !bytes.Equal(<-got, want) {
		t.Error("other bytes came")
	}
}

func TestErrors(t *testing.T) {
	c, peer := pair(t)
	c.SetReadDeadline(time.Now().Add(time.Millisecond))
	var op *net.OpError
	if _, err := c.Read(make([]byte, 1)); !errors.As(err, &op) || op.Op != "read" || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("deadline: %v", err)
	}
	c.SetReadDeadline(time.Time{})
	peer.Close()
	if n, err := c.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("the other side has closed: %d, %v", n, err)
	}
	if _, err := c.Write([]byte{1}); !errors.As(err, &op) || op.Op != "write" || !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the other side has closed: %v", err)
	}
	c.Close()
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := DialUnix(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
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
