//go:build lab

package e2e

import (
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/u-root/u-root/pkg/cpio"

	"github.com/stubinit/stubinit/test/lab"
	"github.com/stubinit/stubinit/test/standin"
)

// A guest starts with a stock xl create, and is what the toolstack and its user expect.
func TestBoot(t *testing.T) {
	ctx := limit(t, 3*time.Minute)
	g := create(t, ctx, config("boot"))
	t.Run("serial", func(t *testing.T) {
		ready(t, ctx, g)
		if got := ask(t, ctx, g, "echo one two"); got != "one two" {
			t.Errorf("echo one two: %q", got)
		}
	})
	t.Run("state", func(t *testing.T) {
		state, err := g.State(ctx)
		if err != nil || state != "running" {
			t.Errorf("device-model/%d/state is %q, %v: want running", g.ID, state, err)
		}
	})
	t.Run("qmp", func(t *testing.T) {
		for range 3 { // each is a connection of its own
			if s := queryStatus(t, ctx, g); !strings.Contains(s, `"status": "running"`) {
				t.Errorf("query-status: %s", s)
			}
		}
	})
	t.Run("ticks", func(t *testing.T) {
		ask(t, ctx, g, "ticks on")
		expect(t, ctx, g.Serial, `^tick \d+`)
		expect(t, ctx, g.Serial, `^tick \d+`)
		ask(t, ctx, g, "ticks off")
	})
	t.Run("unplug", func(t *testing.T) {
		if got := ask(t, ctx, g, "unplug probe"); !strings.HasPrefix(got, "magic=0x49d2 ") {
			t.Errorf("unplug probe: %q", got)
		}
		// The line that the guest wrote to port 0x12 at boot.
		expect(t, ctx, g.Stub, `stubinit-guest boot 1`)
	})
}

// Creates and destroys in a row, in one dom0.
func TestCreateDestroy(t *testing.T) {
	rounds := 5
	if *soak {
		rounds = 50
	}
	for i := range rounds {
		t.Run(fmt.Sprint(i+1), func(t *testing.T) {
			ctx := limit(t, 3*time.Minute)
			ready(t, ctx, create(t, ctx, config("row")))
		})
	}
}

// Consoles that dom0's QEMU serves late, or not at all, keep no guest from starting.
func TestConsoles(t *testing.T) {
	tests := []struct {
		name    string
		cmdline string
		pvArgs  []string
	}{
		// Console 2 without a backend, which is what QEMU from 8.2 on makes of it when nothing is restored.
		{"kernel parameter", lab.DefaultCmdline, nil},
		{"device_model_args_pv", "console=hvc0 quiet", []string{"-serial", "null", "-serial", "null", "-serial", "null"}},
		// Nobody drains console 0 then, with QEMU from 8.2 on in dom0.
		{"no console state", lab.DefaultCmdline + " stubinit.console_state=off stubinit.log=debug", nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ctx := limit(t, 3*time.Minute)
			cfg := config("consoles")
			cfg.Stubdom.Cmdline, cfg.PVArgs = test.cmdline, test.pvArgs
			g := create(t, ctx, cfg)
			ready(t, ctx, g)
			if s := queryStatus(t, ctx, g); !strings.Contains(s, `"status": "running"`) {
				t.Errorf("query-status: %s", s)
			}
		})
	}
}

// What cannot work ends in one FATAL line that says why, soon.
func TestBadInput(t *testing.T) {
	tests := []struct {
		name string
		hook string // changes what libxl has written, just before the stubdomain runs
		args []string
		// without is left out of the image's list of modules.
		without string
		want    []string // patterns in the stubdomain's log, in this order; the last one's text stands in xenstore too
		// unknown: nobody can tell where in xenstore to put it.
		unknown bool
		// clean removes what libxl cannot find any more.
		clean string
	}{
		{
			name: "no target",
			hook: stubOnly + `xenstore-rm "/local/domain/$s/target"`,
			want: []string{`FATAL config: .*\btarget\b.*device_model_stubdomain_override`}, unknown: true,
			// Without the node libxl does not know a stubdomain when it destroys one, and leaves its proxy.
			clean: `for dir in /proc/[0-9]*; do [ "$(cat $dir/comm 2>/dev/null)" != vchan-socket-pr ] || kill "${dir#/proc/}"; done; rm -f /run/xen/qmp-libxl-*`,
		},
		{
			name: "empty dm-argv",
			hook: stubOnly + `
vm=$(xenstore-read "/local/domain/$(xenstore-read "/local/domain/$s/target")/vm")
for n in $(xenstore-list "$vm/image/dm-argv"); do xenstore-rm "$vm/image/dm-argv/$n"; done`,
			want: []string{`FATAL config: .*/image/dm-argv: no arguments`},
		},
		{
			name: "refused argument",
			args: []string{"-no-such-option"},
			want: []string{`no-such-option: invalid option`, `FATAL .*QEMU`},
		},
		{
			// Not by spice=1, which libxl passes over for a stubdomain.
			name: "Spice",
			args: []string{"-spice", "port=6000,addr=127.0.0.1,disable-ticketing=on"},
			want: withoutSpice(t),
		},
		{
			name:    "no privcmd module",
			without: "xen-privcmd",
			want:    []string{`FATAL modules: .*/dev/xen/privcmd`},
		},
	}
	if !hasModules(t) { // of those that are built in none can be missing
		tests = tests[:len(tests)-1]
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ctx := limit(t, 3*time.Minute)
			l := boot(t)
			cfg := config("bad")
			cfg.HVMArgs = test.args
			if test.hook != "" {
				setHook(t, ctx, l, test.hook)
			}
			if test.without != "" {
				cfg.Stubdom.Ramdisk = "/root/without-" + test.without
				if err := l.Put(ctx, cfg.Stubdom.Ramdisk, 0o644, bytes.NewReader(imageWithout(t, test.without))); err != nil {
					t.Fatal(err)
				}
			}
			published := publishedError(t, l)
			g, err := tryCreate(t, ctx, cfg)
			if test.clean != "" {
				t.Cleanup(func() {
					ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
					defer cancel()
					if _, err := l.Run(ctx, test.clean); err != nil {
						t.Error(err)
					}
				})
			}
			if err == nil {
				t.Errorf("xl create ended well")
			}
			for _, pattern := range test.want {
				expect(t, ctx, g.Stub, pattern)
			}
			if !test.unknown {
				wantPublished(t, ctx, published, test.want[len(test.want)-1])
			}
			if strings.Contains(g.Stub.Text(), "Kernel panic") {
				t.Errorf("the stubdomain's kernel panicked")
			}
		})
	}
}

// withoutSpice are the patterns of TestBadInput for a guest with Spice: the image either leaves the library out, or has a QEMU that
// was built without it.
func withoutSpice(t *testing.T) []string {
	t.Helper()
	report, err := os.ReadFile(filepath.Join(filepath.Dir(rootfs(t)), "stubdom-image.txt"))
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(report, []byte("Left out, as nothing calls it: libspice-server.so.1")) {
		return []string{`FATAL config: .*-spice needs libspice-server\.so\.1.*device_model_args_hvm`}
	}
	return []string{`-spice: invalid option`, `FATAL .*QEMU`}
}

// stubOnly begins a hook that runs when a stubdomain's disk is attached; $s is the stubdomain.
const stubOnly = `
[ "$1 $2" = "block add" ] || exit 0
IFS=/ read -r _ _ s _ <<<"$XENBUS_PATH"
[[ $(xenstore-read "/local/domain/$s/name") = *-dm ]] || exit 0
`

// setHook installs a scenario's script for dom0's hotplug scripts, until the end of the test.
func setHook(t *testing.T, ctx context.Context, l *lab.Lab, script string) {
	t.Helper()
	const name = "/etc/xen/scripts/lab-hook"
	if err := l.Put(ctx, name, 0o755, strings.NewReader("#!/bin/bash\n"+script+"\n")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := l.Run(ctx, `rm "$1"`, name); err != nil {
			t.Error(err)
		}
	})
}

// imageWithout returns the suite's initrd with a module taken off its list.
func imageWithout(t *testing.T, module string) []byte {
	t.Helper()
	text, ok := imageFile(t, moduleList)
	if !ok {
		t.Fatalf("the initrd has no %s", moduleList)
	}
	var kept []string
	for line := range strings.Lines(text) {
		if !strings.Contains(line, "/"+module+".ko") {
			kept = append(kept, line)
		}
	}
	if len(kept) != strings.Count(text, "\n")-1 {
		t.Fatalf("%s does not name %s once:\n%s", moduleList, module, text)
	}
	return imageWith(t, map[string]string{moduleList: strings.Join(kept, "")})
}

// moduleList names the modules that stubinit loads.
const moduleList = "etc/stubinit/modules"

// hasModules is false for the small image, whose kernel has all built in.
func hasModules(t *testing.T) bool {
	t.Helper()
	list, _ := imageFile(t, moduleList)
	return strings.Contains(list, ".ko")
}

// imageWith returns the suite's initrd followed by an archive with more files, or other ones in their places: the kernel
// unpacks both.
func imageWith(t *testing.T, files map[string]string) []byte {
	t.Helper()
	packed, err := os.ReadFile(rootfs(t))
	if err != nil {
		t.Fatal(err)
	}
	var more bytes.Buffer
	w := cpio.Newc.Writer(&more)
	for _, name := range slices.Sorted(maps.Keys(files)) {
		// The kernel makes no folders by itself.
		for i, c := range name {
			if c == '/' {
				if err := cpio.WriteRecords(w, []cpio.Record{cpio.Directory(name[:i], 0o755)}); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cpio.WriteRecords(w, []cpio.Record{cpio.StaticFile(name, files[name], 0o755)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := cpio.WriteTrailer(w); err != nil {
		t.Fatal(err)
	}
	// LZ4's end is a block of size 0, four bytes.
	padded := append(packed, make([]byte, 4+-(len(packed)+4)&511)...)
	return append(padded, more.Bytes()...)
}

// standingIn are the files by which a program stands in QEMU's place, and, as its argument shellArg tells it, in that of the rescue shell, which has more rights.
func standingIn(t *testing.T, program, shellArg string) map[string]string {
	t.Helper()
	place := standin.Place[1:]
	files := map[string]string{
		place:             program,
		standin.Shell[1:]: "#!" + standin.Place + " " + shellArg + "\n",
	}
	if qemu, ok := imageFile(t, place); ok { // the small image's
		files[standin.Moved[1:]] = qemu
	}
	return files
}

// imageFile reads a file of the suite's initrd; ok is false if it has none of that name.
func imageFile(t *testing.T, name string) (content string, ok bool) {
	t.Helper()
	packed, err := os.ReadFile(rootfs(t))
	if err != nil {
		t.Fatal(err)
	}
	var plain io.Reader
	switch {
	case bytes.HasPrefix(packed, []byte{0x1f, 0x8b}):
		plain, err = gzip.NewReader(bytes.NewReader(packed))
	case bytes.HasPrefix(packed, []byte{0x02, 0x21, 0x4c, 0x18}):
		plain = lz4.NewReader(bytes.NewReader(packed))
	default:
		plain, err = zstd.NewReader(bytes.NewReader(packed))
	}
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(plain)
	if err != nil {
		t.Fatal(err)
	}
	records, err := cpio.ReadAllRecords(cpio.Newc.Reader(bytes.NewReader(data)))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if r.Name == name {
			text, err := io.ReadAll(io.NewSectionReader(r, 0, int64(r.FileSize)))
			if err != nil {
				t.Fatal(err)
			}
			return string(text), true
		}
	}
	return "", false
}

// rootfs is the initrd's file here.
func rootfs(t *testing.T) string {
	t.Helper()
	payload, err := lab.Artifacts(*suite, *image)
	if err != nil {
		t.Fatal(err)
	}
	for place, file := range payload {
		if strings.HasSuffix(place, "-rootfs") {
			return file
		}
	}
	t.Fatal("the payload has no rootfs")
	return ""
}
