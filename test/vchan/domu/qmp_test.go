package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/stubinit/stubinit/test/vchan"
)

// The QMP server says what client/client.c and the bridge expect of QEMU.
func TestQMPServer(t *testing.T) {
	ln, err := net.Listen("unix", t.TempDir()+"/qmp")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() { done <- new(qmpServer).serve(ln) }()
	defer func() {
		ln.Close()
		<-done
	}()
	const storm = 2 // the session in which events come
	for n, commands := range [][]string{
		{"qmp_capabilities", "query-status", vchan.CommandLarge},
		{"qmp_capabilities", vchan.CommandStormOn},
		{"qmp_capabilities", "query-status", "query-status", vchan.CommandStormOff},
		{"qmp_capabilities", "query-status"},
	} {
		c, err := net.Dial("unix", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		r := bufio.NewReader(c)
		next := func() string {
			line, err := r.ReadString('\n')
			if err != nil || !strings.HasSuffix(line, "\r\n") || !json.Valid([]byte(line)) {
				t.Fatalf("line %.100q, %v: want JSON and CRLF", line, err)
			}
			return line
		}
		if line := next(); !strings.HasPrefix(line, `{"QMP"`) {
			t.Errorf("session %d begins with %q", n, line)
		}
		for i, command := range commands {
			fmt.Fprintf(c, "{\"execute\": %q, \"id\": \"%d.%d\"}\r\n", command, n, i)
			line := next()
			for isEvent(line) {
				line = next()
			}
			var answer struct {
				Return json.RawMessage
				ID     string
			}
			if err := json.Unmarshal([]byte(line), &answer); err != nil {
				t.Fatal(err)
			}
			if answer.Return == nil || answer.ID != fmt.Sprintf("%d.%d", n, i) {
				t.Errorf("%s of session %d: %.200q", command, n, line)
			}
			if size := len(answer.Return); command == vchan.CommandLarge && (size < 899<<10 || size > 900<<10) {
				t.Errorf("%s: %d bytes, want 900 KiB", command, size)
			}
			if n == storm && command == "qmp_capabilities" {
				// The storm begins with this answer: its first event may still be on the way.
				for !isEvent(next()) {
				}
			}
		}
		c.Close()
	}
}

func isEvent(line string) bool { return strings.HasPrefix(line, `{"timestamp"`) }
