//go:build integration

package xenstore_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
)

// A libxenstore is a C program that was linked with image/xs.c, which the static QEMU has in libxenstore's place.
type libxenstore struct {
	t      *testing.T
	server *xenstoretest.Server
	in     io.Writer
	out    *bufio.Scanner
	came   chan struct{} // has one element when a request has come that nobody took note of yet
}

// startLibxenstore connects the program with a server, as domain 5.
func startLibxenstore(t *testing.T) *libxenstore {
	t.Helper()
	dir := t.TempDir()
	program, socket := filepath.Join(dir, "main"), filepath.Join(dir, "socket")
	gcc := exec.Command("gcc", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined", "-o", program,
		"testdata/libxenstore/main.c", "../../../image/xs.c")
	if out, err := gcc.CombinedOutput(); err != nil {
		t.Fatalf("%v (install gcc, libc6-dev and libxen-dev if one is missing)\n%s", err, out)
	}
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	cmd := exec.Command(program)
	cmd.Env = append(os.Environ(), "XENSTORED_PATH="+socket)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	l := &libxenstore{t: t, server: xenstoretest.New(t), in: in, out: bufio.NewScanner(out), came: make(chan struct{}, 1)}
	conn := l.server.DialConn(5)
	requests := make(chan struct{})
	go func() {
		defer close(requests)
		for {
			m, err := wire.Receive(c)
			if err != nil {
				return // the program has ended
			}
			select {
			case l.came <- struct{}{}:
			default:
			}
			if _, err := conn.Write(m.Append(nil)); err != nil {
				t.Errorf("the server refuses %v: %v", m, err)
			}
		}
	}()
	go func() { // ends with conn
		_, _ = io.Copy(c, conn)
		c.Close()
	}()
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil { // also what the sanitizers found
			t.Error(err)
		}
		<-requests
		conn.Close()
	})
	l.expect("ok")
	return l
}

func (l *libxenstore) send(command string) {
	l.t.Helper()
	if _, err := fmt.Fprintln(l.in, command); err != nil {
		l.t.Fatal(err)
	}
}

func (l *libxenstore) expect(want string) {
	l.t.Helper()
	if !l.out.Scan() {
		l.t.Fatalf("the program ended, want %q", want)
	}
	if got := l.out.Text(); got != want {
		l.t.Fatalf("got %q, want %q", got, want)
	}
}

// do runs pairs of a command and what it prints.
func (l *libxenstore) do(pairs ...string) {
	l.t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		l.send(pairs[i])
		l.t.Log(pairs[i])
		l.expect(pairs[i+1])
	}
}

func TestLibxenstore(t *testing.T) {
	l := startLibxenstore(t)
	l.server.SetFaults(xenstoretest.Faults{Chunk: 5})
	l.do(
		"read a", "ENOENT",
		"write a one", "ok",
		"read a", "3 one",
		"mkdir d", "ok",
		"write d/x 1", "ok",
		"write d/yy 2", "ok",
		"list d", "2 x yy",
		"list d/x", "0",
		"list e", "ENOENT",
		"begin", "ok",
		"write a two", "ok",
		"end abort", "ok",
		"read a", "3 one",
		"begin", "ok",
		"write a two", "ok",
		"end commit", "ok",
		"read a", "3 two",
		"rm d", "ok",
		"list d", "ENOENT",
		"write /local/domain/0/x 1", "EACCES",
		"read "+strings.Repeat("x", 5000), "E2BIG",
		"read a", "3 two",
	)
	l.do("perms a 5", "ok")
	if got := strings.Join(l.server.Perms("/local/domain/5/a"), " "); got != "n5 r7" {
		t.Errorf("permissions %q, want n5 r7", got)
	}
}

// TestLibxenstoreEventBeforeAnswer is what Debian's libxenstore.a fails in: a watch fires while a request is under way.
func TestLibxenstoreEventBeforeAnswer(t *testing.T) {
	l := startLibxenstore(t)
	l.do(
		"watch a token", "ok",
		"poll 5000", "readable", // each watch fires once at its start
		"check", "a token",
		"check", "EAGAIN",
		"poll 0", "nothing",
	)
	l.server.SetFaults(xenstoretest.Faults{Late: true})
	l.send("write b 1")
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, ok := l.server.Get("/local/domain/5/b"); ok {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the request does not arrive")
		}
	}
	l.server.Set("/local/domain/5/a", "x")
	l.server.Set("/local/domain/5/a/below", "x")
	l.server.SetFaults(xenstoretest.Faults{})
	l.expect("ok")
	l.do(
		"poll 0", "readable", // though all was read from the connection
		"check", "a token",
		"poll 0", "readable",
		"check", "a/below token",
		"poll 0", "nothing",
		"check", "EAGAIN",
		"read b", "1 1",
	)
}

func TestLibxenstoreUnwatch(t *testing.T) {
	l := startLibxenstore(t)
	l.server.SetFaults(xenstoretest.Faults{EventBeforeAck: true})
	l.do(
		"watch a one", "ok",
		"watch a two", "ok",
		"watch ab one", "ok",
		"unwatch a one", "ok",
		"check", "a two",
		"check", "ab one",
		"poll 0", "nothing",
		"unwatch a two", "ok",
		"unwatch ab one", "ok",
		"watch a three", "ok",
		"check", "a three",
		"watch a four", "ok",
		"unwatch a four", "ok",
		"poll 0", "nothing",
		"check", "EAGAIN",
	)
}

// TestLibxenstoreBadStream: after what cannot be a message nothing is believed any more.
func TestLibxenstoreBadStream(t *testing.T) {
	for name, bytes := range map[string][]byte{
		"long payload":  {15, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 16, 0, 0},
		"not an answer": wire.Message{Type: wire.Mkdir, ReqID: 1, Payload: []byte("OK\x00")}.Append(nil),
	} {
		t.Run(name, func(t *testing.T) {
			l := startLibxenstore(t)
			l.server.Inject(5, bytes)
			l.do("write a 1", "EPROTO", "read a", "EBADF", "check", "EBADF")
		})
	}
	t.Run("end", func(t *testing.T) {
		l := startLibxenstore(t)
		l.server.SetFaults(xenstoretest.Faults{Late: true})
		l.send("read a")
		<-l.came // else the socket is closed with the request in it, which is another error
		l.server.Hangup(5)
		l.expect("EPIPE")
	})
	t.Run("a refusal keeps it", func(t *testing.T) {
		l := startLibxenstore(t)
		l.server.SetFaults(xenstoretest.Faults{Fail: func(string, string) syscall.Errno { return syscall.EINVAL }})
		l.do("read a", "EINVAL")
		l.server.SetFaults(xenstoretest.Faults{})
		l.do("write a 1", "ok")
	})
}
