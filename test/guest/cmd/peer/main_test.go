package main

import (
	"bytes"
	"context"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/test/guest/peer"
)

// pair is two hosts, 10.0.0.1 and 10.0.0.2, on a pair of datagram sockets.
func pair(t *testing.T) [2]*peer.Host {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var hosts [2]*peer.Host
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "link")
		conn, err := net.FileConn(file)
		file.Close()
		if err != nil {
			t.Fatal(err)
		}
		hosts[i] = peer.NewHost(peer.Datagrams(conn), peer.Config{
			MAC: net.HardwareAddr{2, 0, 0, 0, 0, byte(i + 1)}, IP: netip.AddrFrom4([4]byte{10, 0, 0, byte(i + 1)}),
		})
		t.Cleanup(func() { hosts[i].Close() })
	}
	return hosts
}

func say(t *testing.T, host *peer.Host, line string) string {
	t.Helper()
	var out bytes.Buffer
	err := answer(t.Context(), &out, host, 20*time.Second, strings.Fields(line))
	if (err == nil) != strings.HasPrefix(out.String(), "ok ") {
		t.Errorf("%s: error %v, line %q", line, err, out.String())
	}
	return out.String()
}

func TestCommands(t *testing.T) {
	hosts := pair(t)
	for line, want := range map[string]string{
		"ping 10.0.0.2":         "ok ping us=",
		"ping 10.0.0.2 1000":    "ok ping us=",
		"udp 10.0.0.2 100 7":    "ok udp bytes=100\n",
		"udp 10.0.0.2 9000 7":   "err udp UDP echo: ",
		"nonsense":              "err nonsense unknown command\n",
		"ping":                  "err ping needs 1 arguments\n",
		"ping ::1":              "err ping ::1 is no IPv4 address\n",
		"udp 10.0.0.2 70000 1":  "err udp strconv.ParseUint",
		"send x 1 1 1":          "err send ParseAddr",
		"send 10.0.0.2 1 1 1.5": "err send strconv.ParseUint",
		"recv 65536":            "err recv strconv.ParseUint",
		"raw 0":                 "err raw encoding/hex: odd length",
		"frame 0x10000":         "err frame strconv.ParseUint",
		"frames 0x10000":        "err frames strconv.ParseUint",
	} {
		if got := say(t, hosts[0], line); !strings.HasPrefix(got, want) {
			t.Errorf("%s: %q, want %q…", line, got, want)
		}
	}

	const frame = "020000000002" + "020000000001" + "888e" + "0102"
	if got, want := say(t, hosts[0], "raw "+frame), "ok raw length=16\n"; got != want {
		t.Errorf("raw: %q, want %q", got, want)
	}
	if got, want := say(t, hosts[1], "frame 0x888e"), "ok frame length=16 hex="+frame+"\n"; got != want {
		t.Errorf("frame: %q, want %q", got, want)
	}

	const other = "020000000002" + "020000000001" + "8035" + "0304"
	for _, f := range []string{frame, other, other} {
		say(t, hosts[0], "raw "+f)
	}
	if got := say(t, hosts[1], "frame 0x888e"); !strings.Contains(got, frame) {
		t.Errorf("frame: %q", got)
	}
	for _, want := range []string{"ok frames count=2 " + other + " " + other + "\n", "ok frames count=0\n"} {
		if say(t, hosts[0], "ping 10.0.0.2"); t.Failed() { // what was sent before has come
			break
		}
		if got := say(t, hosts[1], "frames 0x8035"); got != want {
			t.Errorf("frames: %q, want %q", got, want)
		}
	}

	var wg sync.WaitGroup
	wg.Go(func() {
		if got, want := say(t, hosts[1], "recv 7001"), "ok recv bytes=5000 crc="; !strings.HasPrefix(got, want) {
			t.Errorf("recv: %q", got)
		}
	})
	if got, want := say(t, hosts[0], "send 10.0.0.2 7001 5000 3"), "ok send bytes=5000 crc="; !strings.HasPrefix(got, want) {
		t.Errorf("send: %q", got)
	}
	wg.Wait()
	if got := say(t, hosts[1], "stats"); !strings.Contains(got, " other=4 bad_sum=0 partial_sum=0 malformed=0 ") {
		t.Errorf("stats: %q", got)
	}
}

func TestServe(t *testing.T) {
	host := pair(t)[0]
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if text, err := execute(ctx, host, time.Second, []string{"serve"}); text != "" || err != nil {
		t.Errorf("serve until its context ends: %q, %v", text, err)
	}
	host.Close()
	if _, err := execute(t.Context(), host, time.Second, []string{"serve"}); err == nil {
		t.Error("serve on a closed link did not fail")
	}
}

func TestBadFlags(t *testing.T) {
	for _, args := range [][]string{
		{"-ip", "x"}, {"-ip", "::1"}, {"-ip", "10.0.0.1", "-mac", "y"}, {"-ip", "10.0.0.1", "-i", "no-such-if"}, {"-ip", "10.0.0.1", "-mac", "00:00:00:00:00:00:00:01"},
	} {
		if err := run(args, strings.NewReader(""), &bytes.Buffer{}); err == nil {
			t.Errorf("%q is accepted", args)
		}
	}
}
