package lab

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/test/lab/wire"
)

func TestCanonical(t *testing.T) {
	for in, want := range map[string]string{
		"/lib/modules/x": "usr/lib/modules/x", "/root/guest.img": "root/guest.img",
		"//usr/../bin/sh": "usr/bin/sh", "/library/x": "library/x",
	} {
		if got := canonical(in); got != want {
			t.Errorf("canonical(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestLastLines(t *testing.T) {
	if got := LastLines("a\nb\r\n\x1b[1mc\x1b[0m\n", 2); got != "b\nc" {
		t.Errorf("got %q", got)
	}
}

func TestFindSuite(t *testing.T) {
	if s, err := FindSuite("bookworm"); err != nil || s.Xen != "4.17" {
		t.Errorf("bookworm: %v, %v", s, err)
	}
	if _, err := FindSuite("sid"); err == nil || !strings.Contains(err.Error(), "trixie") {
		t.Errorf("sid: %v: want an error that names the suites", err)
	}
}

func TestConsole(t *testing.T) {
	c, err := newConsole("test", filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	go func() {
		c.Write([]byte("boot 1\nti"))
		c.Write([]byte("ck 7\ntick 8\n"))
		c.end(errors.New("pulled"))
	}()
	for _, want := range []string{"7", "8"} {
		m, err := c.Expect(ctx, `^tick (\d+)\n`)
		if err != nil {
			t.Fatal(err)
		}
		if m[1] != want {
			t.Errorf("tick %s, want %s", m[1], want)
		}
	}
	_, err = c.Expect(ctx, "never")
	if err == nil || !strings.Contains(err.Error(), "pulled") || !strings.Contains(err.Error(), "tick 8") {
		t.Errorf("after the end: %v: want an error that has the cause and the tail", err)
	}
	kept, err := os.ReadFile(c.file.Name())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("boot 1\ntick 7\ntick 8\n", string(kept)); diff != "" {
		t.Errorf("file (-want +got):\n%s", diff)
	}
}

// A stand-in for dom0's agent takes input slowly: the host keeps to the window, and tells output and code apart.
func TestProcess(t *testing.T) {
	ours, theirs := net.Pipe()
	k := newConn(ours)
	defer k.close()
	input := strings.Repeat("x", (wire.Window+5)*wire.MaxData)
	got := make(chan int, 1)
	go func() {
		wire.Write(theirs, wire.Frame{Kind: wire.Hello})
		var start wire.Process
		n, unacked := 0, 0
		for {
			f, err := wire.Read(theirs)
			if err != nil {
				return
			}
			switch f.Kind {
			case wire.Start:
				json.Unmarshal(f.Data, &start)
			case wire.Stdin:
				n += len(f.Data)
				if unacked++; unacked == wire.Window || n == len(input) {
					for range unacked {
						wire.Write(theirs, wire.Frame{Kind: wire.Ack, ID: f.ID})
					}
					unacked = 0
				}
			case wire.StdinClose:
				got <- n
				wire.Write(theirs, wire.Frame{Kind: wire.Stdout, ID: f.ID, Data: []byte(start.Argv[len(start.Argv)-1])})
				wire.Write(theirs, wire.JSON(wire.Exit, f.ID, wire.Status{Code: 3}))
			}
		}
	}()
	<-k.hello
	var out strings.Builder
	p, err := k.start(Command{Script: "cat", Args: []string{"argument"}, Stdin: strings.NewReader(input), Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	var exit *ExitError
	if err := p.Wait(ctx); !errors.As(err, &exit) || exit.Code != 3 {
		t.Errorf("Wait: %v: want exit code 3", err)
	}
	if n := <-got; n != len(input) {
		t.Errorf("%d bytes of input came, want %d", n, len(input))
	}
	if out.String() != "argument" {
		t.Errorf("output %q", out.String())
	}

	p, err = k.start(Command{Script: "sleep"})
	if err != nil {
		t.Fatal(err)
	}
	theirs.Close()
	<-k.done
	if err := p.Wait(ctx); err == nil || errors.As(err, &exit) && exit.Code == 0 {
		t.Errorf("Wait after the agent's end: %v", err)
	}
	if _, err := k.start(Command{Script: "true"}); err == nil {
		t.Error("a process was started without an agent")
	}
}
