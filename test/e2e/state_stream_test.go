//go:build lab

package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stubinit/stubinit/test/lab"
)

// stateProgram builds test/state, which has a part on each side of a console.
func stateProgram(t *testing.T) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "state")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", file, "./test/state")
	build.Dir = lab.Top()
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build test/state: %v\n%s", err, out)
	}
	program, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return program
}

// A stream of all byte values arrives whole past a console's tty, as stubinit reads it, and nothing of it comes back,
// whether the stream begins before the console is opened, at the same time, or later. What a shell gets, which opens
// the console and starts stty, shows that the streams would tell: bytes changed, lost, and sent back.
func TestStateStream(t *testing.T) {
	ctx := limit(t, 4*time.Minute)
	rounds, size := 20, 256<<10
	if *soak {
		ctx = limit(t, time.Hour)
		rounds, size = 200, 4<<20
	}
	l := boot(t)
	program := stateProgram(t)
	for name, data := range map[string][]byte{"/root/state": program, "/root/state.cpio": imageWith(t, map[string]string{"init": string(program)})} {
		if err := l.Put(ctx, name, 0o755, bytes.NewReader(data)); err != nil {
			t.Fatal(err)
		}
	}
	const socket = "/run/stream.socket"
	// xl before 4.20 numbers the first channel 0, which libxl then leaves out.
	config := fmt.Sprintf(`name = "stream"
type = "pv"
kernel = "%s/qemu-stubdom-linux-kernel"
ramdisk = "/root/state.cpio"
memory = 192
vcpus = 1
extra = "quiet initcall_blacklist=boot_wait_for_devices"
on_crash = "preserve"
channel = ["name=none,connection=pty", "name=stream,connection=socket,path=%s"]
`, l.Suite.StubdomDir(), socket)
	if err := l.Put(ctx, "/root/stream.cfg", 0o644, strings.NewReader(config)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { checkClean(t, cleanup(t), l) })
	t.Cleanup(func() {
		if t.Failed() {
			out, err := l.Run(cleanup(t), `tail -n 20 /var/log/xen/console/guest-stream.log /var/log/xen/*stream.log; xl list`)
			t.Log(out, err)
		}
		// At the end of the streams the guest powers off by itself.
		if _, err := l.Run(cleanup(t), `xl destroy stream 2>/dev/null || ! xl domid stream 2>/dev/null; rm -f "$1"`, socket); err != nil {
			t.Error(err)
		}
	})
	// The console's backend is late: it runs only when the guest waits for it.
	state, err := l.Run(ctx, `
set -e
xl create -p /root/stream.cfg
domain=/local/domain/$(xl domid stream)
qemu=$(xenstore-read "$domain/image/device-model-pid")
trap 'kill -CONT "$qemu"' EXIT
kill -STOP "$qemu"
xl unpause stream
for try in {1..600}; do
	answer=$(xenstore-read "$domain/data/answer" 2>/dev/null) && break
	sleep 0.1
done
for console in $(xenstore-list "$domain/device/console"); do
	[ "$(xenstore-read "$domain/device/console/$console/name" 2>/dev/null)" != stream ] ||
		echo "$answer, state $(xenstore-read "$(xenstore-read "$domain/device/console/$console/backend")/state")"
done`)
	if err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`(?m)^waits for the console, state [^4]$`).MatchString(state) {
		t.Errorf("the guest does not wait for the backend: %q", state)
	}
	out, err := l.Run(ctx, `/root/state drive -domid "$(xl domid stream)" -socket "$1" -rounds "$2" -bytes "$3"`, socket, fmt.Sprint(rounds), fmt.Sprint(size))
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	exact := fmt.Sprintf("received=%d missing=0 extra=0 different=0 first=-1 echoed=0 ", size)
	if n := strings.Count(out, exact); strings.Count(out, "way=direct ") != rounds || n < rounds {
		t.Errorf("%d streams arrived as they were sent, want %d", n, rounds)
	}
	late := regexp.MustCompile(`(?m)^way=stty moment="late" .*$`).FindString(out)
	if late == "" || strings.Contains(late, exact) {
		t.Errorf("the streams tell no difference: %s", late)
	}
}

// cleanup is a context for what is done at the end of a test, when its own context is over.
func cleanup(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}
