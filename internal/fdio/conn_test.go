package fdio

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// pair gives both ends of a connection, and the Poller of the first.
func pair(t *testing.T) (*Poller, *Conn, *net.UnixConn) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "socket")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	p, err := NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	c, err := DialUnix(p, path)
	if err != nil {
		t.Fatal(err)
	}
	peer, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		p.Close()
		peer.Close()
	})
	return p, c, peer
}

// wait is Wait with a limit.
func wait(t *testing.T, p *Poller) {
	t.Helper()
	limit := time.AfterFunc(10*time.Second, p.Interrupt)
	defer limit.Stop()
	if err := p.Wait(); err != nil {
		t.Fatal(err)
	}
}

// A Conn that is told of all readiness moves everything, both ways at once, whatever fits at a time.
func TestConn(t *testing.T) {
	p, c, peer := pair(t)
	want := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	got := make(chan []byte)
	go func() {
		b, err := io.ReadAll(peer)
		if err != nil {
			t.Error(err)
		}
		got <- b
	}()
	go func() {
		if _, err := peer.Write(want); err != nil {
			t.Error(err)
		}
		peer.CloseWrite()
	}()
	calls := 0
	if err := c.Notify(func() { calls++ }); err != nil {
		t.Fatal(err)
	}
	var in []byte
	out, ended := want, false
	for buf := make([]byte, 5000); len(out) > 0 || !ended; {
		for !ended {
			n, err := c.TryRead(buf)
			in = append(in, buf[:n]...)
			if ended = err == io.EOF; n == 0 && err == nil {
				break
			}
			if err != nil && !ended {
				t.Fatal(err)
			}
		}
		n, err := c.TryWrite(out)
		if err != nil {
			t.Fatal(err)
		}
		out = out[n:]
		// At its end the Conn is watched no more, and written as long as there is room.
		if !ended {
			wait(t, p)
		}
	}
	c.Close()
	if !bytes.Equal(<-got, want) || !bytes.Equal(in, want) {
		t.Error("other bytes came")
	}
	if calls == 0 {
		t.Error("never told")
	}
}

// What a Conn cannot write yet it can write when it is told, and it is not told while there is still no room.
func TestRoom(t *testing.T) {
	p, c, peer := pair(t)
	if err := c.Notify(func() {}); err != nil {
		t.Fatal(err)
	}
	block := make([]byte, 1<<20)
	sent, err := c.TryWrite(block)
	if err != nil || sent == 0 || sent == len(block) {
		t.Fatalf("the first write: %d, %v", sent, err)
	}
	if n, err := c.TryWrite(block); n != 0 || err != nil {
		t.Errorf("no room: %d, %v", n, err)
	}
	short := time.AfterFunc(50*time.Millisecond, func() { peer.Write([]byte{1}) }) // only that wakes Wait
	defer short.Stop()
	wait(t, p)
	if n, _ := c.TryRead(make([]byte, 10)); n != 1 {
		t.Errorf("told without need, read %d", n)
	}
	if n, err := c.TryWrite(block); n != 0 || err != nil {
		t.Errorf("still no room: %d, %v", n, err)
	}
	if _, err := io.ReadFull(peer, block[:sent]); err != nil {
		t.Fatal(err)
	}
	wait(t, p)
	if n, err := c.TryWrite(block); n == 0 || err != nil {
		t.Errorf("after all was read: %d, %v", n, err)
	}
}

// An expected read waits, but not for long.
func TestExpect(t *testing.T) {
	_, c, peer := pair(t)
	if err := c.Notify(func() {}); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 10)
	c.TryRead(b)
	c.Expect()
	if n, err := c.TryRead(b); n != 0 || err != nil {
		t.Errorf("nothing comes: %d, %v", n, err)
	}
	start := time.Now()
	if n, err := c.TryRead(b); n != 0 || err != nil || time.Since(start) > expectLimit {
		t.Errorf("only the next one waits: %d, %v after %v", n, err, time.Since(start))
	}
	peer.Write([]byte("answer"))
	c.Expect()
	if n, err := c.TryRead(b); string(b[:n]) != "answer" || err != nil {
		t.Errorf("%q, %v", b[:n], err)
	}
	peer.Close()
	c.Expect()
	if n, err := c.TryRead(b); n != 0 || err != io.EOF {
		t.Errorf("the other side has closed: %d, %v", n, err)
	}
}

func TestConnErrors(t *testing.T) {
	p, c, peer := pair(t)
	told := 0
	if err := c.Notify(func() { told++ }); err != nil {
		t.Fatal(err)
	}
	if n, err := c.TryRead(make([]byte, 1)); n != 0 || err != nil {
		t.Errorf("nothing yet: %d, %v", n, err)
	}
	peer.Close()
	wait(t, p)
	for range 2 {
		if n, err := c.TryRead(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("the other side has closed: %d, %v", n, err)
		}
	}
	var op *net.OpError
	if _, err := c.TryWrite([]byte{1}); !errors.As(err, &op) || op.Op != "write" || !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the other side has closed: %v", err)
	}
	// Nobody is told of it for ever.
	before := told
	time.AfterFunc(20*time.Millisecond, p.Interrupt)
	if err := p.Wait(); !errors.Is(err, fs.ErrClosed) || told != before {
		t.Errorf("Wait at the end: %v, told %d times", err, told-before)
	}
	c.Close()
	if err := c.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	if _, err := c.TryRead(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := c.TryWrite([]byte{1}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if err := c.Notify(func() {}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("closed: %v", err)
	}
	if _, err := DialUnix(p, filepath.Join(t.TempDir(), "none")); !errors.As(err, &op) || op.Op != "dial" || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
}
