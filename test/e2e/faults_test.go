//go:build lab

package e2e

import (
	"bytes"
	"context"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/initramfs"
	"github.com/stubinit/stubinit/test/lab"
)

// docs/faults.md lists these scenarios by name, with what the user sees and what is lost.

// faulty is an initrd in dom0 in which test/faults/shim starts QEMU.
const faulty = "/root/faulty"

// faultyImage puts the initrd faulty into dom0.
func faultyImage(t *testing.T, l *lab.Lab) {
	t.Helper()
	ctx := limit(t, 5*time.Minute)
	if _, err := l.Run(ctx, `[ -e "$1" ]`, faulty); err == nil {
		return
	}
	shim := filepath.Join(t.TempDir(), "shim")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", shim, "../faults/shim")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	program, err := os.ReadFile(shim)
	if err != nil {
		t.Fatal(err)
	}
	files := standingIn(t, string(program), "-unconfined")
	if hasModules(t) {
		files["oops.ko"] = string(oopsModule(t))
	}
	image := imageWith(t, files)
	if err := l.Put(ctx, faulty, 0o644, bytes.NewReader(image)); err != nil {
		t.Fatal(err)
	}
}

// withShell makes stubinit start a shim beside QEMU, for faults that need more than QEMU's rights.
const withShell = " stubinit.shell"

// notQEMUs is what comes of the ways to the kernel's log and addresses that QEMU, as root, would have.
const notQEMUs = "kcore=null kmsg=null mknod=EPERM module=EPERM mount=EPERM proc-kmsg=null root=EACCES sysctl=EROFS syslog=EPERM sysrq=null umount=EPERM"

// faultyConfig is config with that image, and with more on the stubdomain's command line.
func faultyConfig(name, cmdline string) lab.GuestConfig {
	cfg := config(name)
	cfg.Stubdom.Ramdisk, cfg.Stubdom.Cmdline = faulty, lab.DefaultCmdline+cmdline
	return cfg
}

// do makes the shim do something, and returns what came of it.
func do(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest, fault string) string {
	t.Helper()
	out, err := l.Run(ctx, `
dir=/local/domain/$1/data
xenstore-rm $dir/fault-result 2>/dev/null
xenstore-write $dir/fault "$2 now"
for try in {1..600}; do xenstore-exists $dir/fault || { xenstore-read $dir/fault-result; exit; }; sleep 0.1; done
exit 1`, strconv.Itoa(g.StubID), fault)
	out = strings.TrimSpace(out)
	if err != nil || strings.HasPrefix(out, "error: ") {
		t.Fatalf("%s: %s %v", fault, out, err)
	}
	return out
}

// armAtBoot lets the shim find a fault when the next stubdomain starts it.
func armAtBoot(t *testing.T, ctx context.Context, l *lab.Lab, fault string) {
	t.Helper()
	setHook(t, ctx, l, stubOnly+`xenstore-write "/local/domain/$s/data/fault" "`+fault+`"`)
}

// gone waits until xl has ended the guest, for this reason (SHUTDOWN_* of sched.h).
func gone(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest, reason int) {
	t.Helper()
	out, err := l.Run(ctx, `
for try in {1..100}; do xl domid "$1" >/dev/null 2>&1 || break; sleep 0.1; done
! xl domid "$1" >/dev/null 2>&1 || { xl list; exit 1; }
grep "has shut down" "/var/log/xen/xl-$1.log"`, g.Name)
	if err != nil {
		t.Fatalf("the guest is still there, or xl has not seen it end: %v\n%s", err, out)
	}
	if want := fmt.Sprintf("Domain %d has shut down, reason code %d ", g.ID, reason); !strings.Contains(out, want) {
		t.Errorf("xl's log lacks %q:\n%s", want, out)
	}
}

const (
	poweroffReason = 0
	rebootReason   = 1
	crashReason    = 3
)

// A shutdown waits for libxl's domain-death event, which is the watch @releaseDomain.
type shutdown struct {
	p     *lab.Process
	times chan string
}

// watchDeath runs a script that ends the domain, and takes the time from its end to the event, by dom0's clock.
func watchDeath(t *testing.T, l *lab.Lab, script string, args ...string) shutdown {
	t.Helper()
	times := make(chan string, 1)
	p, err := l.Begin(lab.Command{Script: `
xenstore-watch -n 2 @releaseDomain >/dev/null &
watch=$!
sleep 0.3 # its registration is the first event
` + script + `
read -r from _ </proc/uptime
wait $watch
read -r to _ </proc/uptime
echo "$from $to"`, Args: args, Stdout: stringChan(times)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill() })
	return shutdown{p, times}
}

// took is the time in seconds.
func (s shutdown) took(t *testing.T, ctx context.Context) float64 {
	t.Helper()
	select {
	case times := <-s.times:
		var from, to float64
		if _, err := fmt.Sscan(times, &from, &to); err != nil {
			t.Fatalf("times %q: %v", times, err)
		}
		return to - from
	case <-ctx.Done():
		t.Fatal("no @releaseDomain event")
		return 0
	}
}

// A chan that takes what is written to it, whole.
type stringChan chan string

func (c stringChan) Write(b []byte) (int, error) {
	c <- string(b)
	return len(b), nil
}

// publishedError waits for the next stubdomain's error node.
func publishedError(t *testing.T, l *lab.Lab) <-chan string {
	t.Helper()
	value := make(chan string, 1)
	p, err := l.Begin(lab.Command{Script: `
exec 3< <(exec xenstore-watch /local/domain)
while read -r path <&3; do
	case $path in */device-model/*/stubinit/error) v=$(xenstore-read "$path" 2>/dev/null) && echo "$v" && exit ;; esac
done`, Stdout: stringChan(value)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Kill() })
	return value
}

// wantPublished compares what dom0 tools can read with the log.
func wantPublished(t *testing.T, ctx context.Context, value <-chan string, pattern string) {
	t.Helper()
	select {
	case got := <-value:
		if !regexp.MustCompile(pattern).MatchString(got) {
			t.Errorf("the error node says %q, want %s", got, pattern)
		}
	case <-ctx.Done():
		t.Error("no error node in xenstore")
	}
}

// One guest goes through all that it can survive.
func TestFaultsGuest(t *testing.T) {
	l := boot(t)
	faultyImage(t, l)
	ctx := limit(t, 8*time.Minute)
	cfg := faultyConfig("survivor", withShell+" stubinit.qemu_stuck_after=4s stubinit.log_burst=4096 stubinit.log_rate=1024")
	cfg.Disks = append(cfg.Disks, lab.Disk{VDev: "hdb", File: lab.GuestImage})
	g := create(t, ctx, cfg)
	ready(t, ctx, g)
	alive := func(t *testing.T) {
		t.Helper()
		if got := ask(t, ctx, g, "echo still here"); got != "still here" {
			t.Errorf("echo: %q", got)
		}
		if s := queryStatus(t, ctx, g); !strings.Contains(s, `"status": "running"`) {
			t.Errorf("query-status: %s", s)
		}
	}

	// The agent's own share of stubdomain_memory, and what a QEMU that was taken over could learn of the kernel.
	t.Run("what QEMU sees", func(t *testing.T) {
		got := do(t, ctx, l, g, "report")
		t.Logf("PID 1: %s", got)
		if n := field(t, got, "symbols"); n != "0" {
			t.Errorf("%s kernel addresses are readable", n)
		}
		if d := cmp.Diff(notQEMUs, do(t, ctx, l, g, "rights")); d != "" {
			t.Error(d)
		}
		// mkinitramfs counts 10 MiB for the agent.
		if rss, err := strconv.Atoi(field(t, got, "rss_kib")); err != nil || rss > 10<<10 || rss < 1<<10 {
			t.Errorf("PID 1 has %d KiB resident, %v: want 10240 at most", rss, err)
		}
	})
	t.Run("signals to PID 1", func(t *testing.T) {
		t.Log(do(t, ctx, l, g, "signals"))
		alive(t)
	})
	t.Run("orphans", func(t *testing.T) {
		do(t, ctx, l, g, "threads")
		t.Log(do(t, ctx, l, g, "orphans"))
		alive(t)
	})
	t.Run("full file systems", func(t *testing.T) {
		t.Log(do(t, ctx, l, g, "fill"))
		alive(t)
		do(t, ctx, l, g, "clear")
	})
	t.Run("little memory", func(t *testing.T) {
		if !hasModules(t) {
			t.Skip("the small image's kernel has no control groups, by which the shim makes little memory")
		}
		t.Log(do(t, ctx, l, g, "press"))
		expect(t, ctx, g.Stub, `warn memory is short: raise stubdomain_memory in xl.cfg`)
		expect(t, ctx, g.Stub, `resident agent_kib=\d+ qemu_kib=\d+`)
		alive(t)
	})
	t.Run("no descriptors left for QEMU", func(t *testing.T) {
		t.Log(do(t, ctx, l, g, "few-files"))
		if got := ask(t, ctx, g, "echo still here"); got != "still here" {
			t.Errorf("echo: %q", got)
		}
		if got := ask(t, ctx, g, "ata 0 read 0 8"); !strings.Contains(got, "sectors=8") {
			t.Errorf("disk: %q", got)
		}
		do(t, ctx, l, g, "files")
		alive(t)
	})
	t.Run("stopped for a while", func(t *testing.T) {
		do(t, ctx, l, g, "19")
		expect(t, ctx, g.Stub, `error QEMU is stuck: it does not answer`)
		expect(t, ctx, g.Stub, `stuck QEMU proc="process \d+: State=T`)
		expect(t, ctx, g.Stub, `stuck QEMU proc="?stack: `)
		expect(t, ctx, g.Stub, `left alone`)
		do(t, ctx, l, g, "18")
		expect(t, ctx, g.Stub, `QEMU answers again`)
		alive(t)
	})
	t.Run("flood of port 0x12", func(t *testing.T) {
		before := len(g.Stub.Text())
		from, err := l.Uptime(ctx)
		if err != nil {
			t.Fatal(err)
		}
		ask(t, ctx, g, "unplug flood 10000")
		to, err := l.Uptime(ctx)
		if err != nil {
			t.Fatal(err)
		}
		expect(t, ctx, g.Stub, `lines, \d+ bytes dropped \(limit: 4096 bytes, then 1024 a second\)`)
		wrote := len(g.Stub.Text()) - before
		t.Logf("10000 bytes of the guest's in %.1f s made %d bytes of log", (to - from).Seconds(), wrote)
		// Until the count came some more seconds may have passed. Without the limit there would be 16000 bytes.
		if most := 4096 + 1024*((to-from).Seconds()+5); float64(wrote) > most {
			t.Error("the limit does not hold")
		}
	})
	read := func(t *testing.T, unit int) string { // what the guest says of a disk's first blocks, which are not empty
		t.Helper()
		if err := g.Serial.Send(fmt.Sprintf("ata %d read 0 8\n", unit)); err != nil {
			t.Fatal(err)
		}
		m := expect(t, ctx, g.Serial, `^(ok|err) ata\b(?: sectors=8 (crc=[0-9a-f]+))?.*\n`)
		return m[1] + " " + m[2]
	}
	first, second := read(t, 0), read(t, 1)
	if !strings.HasPrefix(first, "ok crc=") || first != second {
		t.Fatalf("disks: %q and %q, want the same file's", first, second)
	}
	t.Run("detach of a disk in use", func(t *testing.T) {
		out, err := l.Run(ctx, `xl block-detach "$1" hda 2>&1`, g.Name)
		t.Logf("xl block-detach: %v; it says\n%s", err, out)
		if err == nil {
			t.Error("a disk that QEMU has open was detached")
		}
		alive(t)
		if got := read(t, 0); got != first {
			t.Errorf("the disk that was not detached: %q, want %q", got, first)
		}
	})
	// Linux lets go of a disk that a program has open: the stubdomain's own can be pulled.
	t.Run("detach of the stubdomain's disk", func(t *testing.T) {
		if out, err := l.Run(ctx, `xl block-detach "$1-dm" hdb 2>&1`, g.Name); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		expect(t, ctx, g.Stub, `a disk was detached from the stubdomain while QEMU has it open: .* devid=832 disk=xvdb`)
		got := read(t, 1)
		t.Logf("the guest reads %q", got)
		if got == second {
			t.Error("the guest reads from a disk that is not there")
		}
		alive(t)
		if got := read(t, 0); got != first {
			t.Errorf("the other disk: %q, want %q", got, first)
		}
	})
	// libxl never starts its proxy again, nor ends one that is not its own: what a user would have to do is done here.
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := l.Run(ctx, `pkill -f "vchan-socket-proxy.*qmp-libxl-$1"`, strconv.Itoa(g.ID)); err != nil {
			t.Error(err)
		}
	})
	t.Run("proxy killed in a message", func(t *testing.T) {
		out, err := l.Run(ctx, `
socket=/var/run/xen/qmp-libxl-$1
mapfile -d '' -t argv < <(cat "/proc/$(pgrep -f "vchan-socket-proxy.*$socket")/cmdline")
{ printf '{"execute":"qmp_capabilities"}\r\n{"execute":"query-sta'; sleep 30; } | socat STDIO "UNIX-CONNECT:$socket" >/dev/null &
sleep 2 # so far it has come
pkill -KILL vchan-socket-pr
echo "${argv[@]}"
rm -f "$socket"
exec "${argv[@]}" >/var/log/xen/qmp-proxy-again.log 2>&1 </dev/null &
for try in {1..50}; do [ -S "$socket" ] && exit; sleep 0.1; done
exit 1`, strconv.Itoa(g.ID))
		t.Logf("proxy: %s", out)
		if err != nil {
			t.Fatal(err)
		}
		alive(t)
	})
	// The serial port goes with that QEMU, and the log; the device model does not.
	t.Run("console's QEMU killed", func(t *testing.T) {
		if _, err := l.Run(ctx, `kill -KILL "$(xenstore-read "/local/domain/$1/image/device-model-pid")"`, strconv.Itoa(g.StubID)); err != nil {
			t.Fatal(err)
		}
		if s := queryStatus(t, ctx, g); !strings.Contains(s, `"status": "running"`) {
			t.Errorf("query-status: %s", s)
		}
		// More of a log than the console's ring holds, which nobody reads now, must stop nothing.
		for range 3 {
			do(t, ctx, l, g, "talk")
		}
		if s := queryStatus(t, ctx, g); !strings.Contains(s, `"status": "running"`) {
			t.Errorf("query-status: %s", s)
		}
	})
}

// A death is one way in which a running guest's QEMU ends.
type death struct {
	name, cmdline string
	// script ends it; $1 is the stubdomain, $2 the guest.
	script string
	want   []string // patterns in the log, in this order
	reason int
	delay  float64 // seconds from the script's end that are not the agent's
}

const tell = `xenstore-write "/local/domain/$1/data/fault" `

// run ends a guest, and returns the seconds to libxl's event; 0 if the test failed, or -run leaves it out.
func (d death) run(t *testing.T, l *lab.Lab) (took float64) {
	t.Run(d.name, func(t *testing.T) {
		ctx := limit(t, 3*time.Minute)
		g := create(t, ctx, faultyConfig("mortal", d.cmdline))
		ready(t, ctx, g)
		s := watchDeath(t, l, d.script, strconv.Itoa(g.StubID), strconv.Itoa(g.ID))
		for _, pattern := range d.want {
			expect(t, ctx, g.Stub, pattern)
		}
		took = s.took(t, ctx)
		gone(t, ctx, l, g, d.reason)
		t.Logf("%s: %.2f s to libxl's event", d.name, took)
	})
	return took
}

// testDeaths compares the mean time to libxl's event with the second that there is for it.
func testDeaths(t *testing.T, deaths []death) {
	l := boot(t)
	faultyImage(t, l)
	sum, n := 0.0, 0
	for _, d := range deaths {
		if took := d.run(t, l); took > 0 && d.delay == 0 {
			sum, n = sum+took, n+1
		}
	}
	if n == 0 {
		return // those that ran have failed, or their time does not count
	}
	t.Logf("mean time to libxl's domain-death event: %.2f s of %d", sum/float64(n), n)
	if sum > float64(n) {
		t.Errorf("mean %.2f s, want 1 at most", sum/float64(n))
	}
}

// A running guest whose QEMU dies is shut down at once, with reason crash.
func TestFaultsDeath(t *testing.T) {
	testDeaths(t, []death{
		{"killed", "", tell + `"9 now"`, []string{`FATAL supervise: QEMU ended: killed by SIGKILL`}, crashReason, 0},
	})
}

func TestFaultsMoreDeaths(t *testing.T) {
	const dead = `FATAL supervise: QEMU ended: killed by `
	testDeaths(t, []death{
		{"segmentation fault", "", tell + `"11 now"`, []string{dead + `SIGSEGV`}, crashReason, 0},
		{"abort", "", tell + `"6 now"`, []string{dead + `SIGABRT`}, crashReason, 0},
		{"terminated", "", tell + `"15 now"`, []string{`QEMU ended how="exit status 0"`}, poweroffReason, 0},
		{"out of memory", "", tell + `"oom now"`,
			[]string{`FATAL supervise: QEMU ended: killed by SIGKILL.*the kernel ran out of memory while QEMU used \d+ MiB: raise stubdomain_memory`}, crashReason, 60},
		{"stuck, to be killed", " stubinit.qemu_stuck=kill stubinit.qemu_stuck_after=2s", tell + `"19 now"`,
			[]string{`QEMU is stuck: it does not answer`, `stuck QEMU proc=.*`, `killing QEMU`, dead + `SIGKILL`}, crashReason, 4},
		{"quit", "", `{ printf '{"execute":"qmp_capabilities"}\r\n{"execute":"quit"}\r\n'; sleep 30; } | socat STDIO "UNIX-CONNECT:/var/run/xen/qmp-libxl-$2" >/dev/null &`,
			[]string{`QEMU ended how="exit status 0"`}, poweroffReason, 0},
	})
}

// oopsModule is a module of the image's kernel, with an instruction in its first place that there is not (ud2).
func oopsModule(t *testing.T) []byte {
	t.Helper()
	// It needs no other module, and the stubdomain has no use for it.
	const name = "test_static_key_base.ko"
	files, err := filepath.Glob(filepath.Join(lab.Top(), "build/root", *suite, "usr/lib/modules/*/kernel/lib", name+"*"))
	if err != nil || len(files) != 1 {
		t.Fatalf("the kernel's modules of %s have %d files %s, want 1: run make initrd SUITE=%[1]s first", *suite, len(files), name)
	}
	read := exec.Command("cat", files[0])
	if filepath.Ext(files[0]) == ".xz" {
		read = exec.Command("xz", "--decompress", "--stdout", files[0])
	}
	module, err := read.Output()
	if err != nil {
		t.Fatalf("%s: %v", files[0], err)
	}
	f, err := elf.NewFile(bytes.NewReader(module))
	if err != nil {
		t.Fatalf("%s: %v", files[0], err)
	}
	symbols, err := f.Symbols()
	if err != nil {
		t.Fatalf("%s: %v", files[0], err)
	}
	i := slices.IndexFunc(symbols, func(s elf.Symbol) bool { return s.Name == "init_module" })
	if i < 0 {
		t.Fatalf("%s has no init_module", files[0])
	}
	copy(module[f.Sections[symbols[i].Section].Offset+symbols[i].Value:], "\x0f\x0b")
	// The signature, which is wrong now, comes after the table of sections (e_shoff, e_shentsize, e_shnum), which is the file's end.
	entries := int(f.ByteOrder.Uint16(module[58:])) * int(f.ByteOrder.Uint16(module[60:]))
	return module[:int(f.ByteOrder.Uint64(module[40:]))+entries]
}

// kernelLine is a line of the kernel's on console 0.
var kernelLine = regexp.MustCompile(`(?m)^(\[ *\d+\.\d{6}\] .*?)\r?$`)

// What a kernel that goes on has to say of an oops is all in the log, and nothing else is lost than the process that it was in.
func TestFaultsKernelOops(t *testing.T) {
	if !hasModules(t) {
		t.Skip("the small image's kernel loads no modules, and makes a panic of each oops (CONFIG_PANIC_ON_OOPS): TestFaultsKernelPanic")
	}
	l := boot(t)
	faultyImage(t, l)
	ctx := limit(t, 3*time.Minute)
	g := create(t, ctx, faultyConfig("oops", withShell))
	ready(t, ctx, g)
	before := len(g.Stub.Text())
	t.Log(do(t, ctx, l, g, "oops"))
	for _, pattern := range []string{
		`invalid opcode: 0000 \[#1\]`, `RIP: e030:(?:init_module|test_static_key_base_init)\+0x0/`, `Call Trace:`, `do_one_initcall\+0x`, `---\[ end trace `,
		`shim: oops: the loading process ended by signal 11`,
	} {
		expect(t, ctx, g.Stub, pattern)
	}
	// Up to the oops "quiet" holds, and what the kernel says is not for the console.
	text := g.Stub.Text()[before:]
	var want, got []string
	for _, m := range regexp.MustCompile(`(?m)shim: kernel's log: <\d+>(.*?)\r?$`).FindAllStringSubmatch(text, -1) {
		if len(want) > 0 || strings.Contains(m[1], "invalid opcode") {
			want = append(want, m[1])
		}
	}
	for _, m := range kernelLine.FindAllStringSubmatch(text, -1) {
		got = append(got, m[1])
	}
	if d := cmp.Diff(want, got); d != "" || len(want) == 0 {
		t.Errorf("%d lines in the kernel's log; those on console 0 (-log +console):\n%s", len(want), d)
	}
	// The log has registers now.
	if d := cmp.Diff(notQEMUs, do(t, ctx, l, g, "rights")); d != "" {
		t.Error(d)
	}
	if got := ask(t, ctx, g, "echo still here"); got != "still here" {
		t.Errorf("echo: %q", got)
	}
	if s := queryStatus(t, ctx, g); !strings.Contains(s, `"status": "running"`) {
		t.Errorf("query-status: %s", s)
	}
}

// The end of PID 1's kernel is beyond PID 1: the log has the panic, the stubdomain has shut down with reason crash, and the guest stays until it is
// destroyed, as libxl looks only at the guest. Xen makes of a kernel without panic= one that restarts at once (xen_panic_event in
// arch/x86/xen/enlighten.c), which for Xen is that crash.
func TestFaultsKernelPanic(t *testing.T) {
	l := boot(t)
	faultyImage(t, l)
	for _, test := range []struct {
		name, cmdline string
		want          []string // patterns in the log after the panic itself
		delay         float64  // seconds from the panic to the shutdown
	}{
		{"at once", "", nil, 0},
		{"panic=5", " panic=5", []string{`Rebooting in 5 seconds\.\.`}, 5},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := limit(t, 3*time.Minute)
			g := create(t, ctx, faultyConfig("panic", withShell+test.cmdline))
			ready(t, ctx, g)
			s := watchDeath(t, l, tell+`"panic now"`, strconv.Itoa(g.StubID))
			for _, pattern := range append([]string{`Kernel panic - not syncing: sysrq triggered crash`, `Call Trace:`, `</TASK>`}, test.want...) {
				expect(t, ctx, g.Stub, pattern)
			}
			took := s.took(t, ctx)
			t.Logf("the stubdomain has shut down after %.2f s", took)
			// It panics while the time begins to be taken.
			if least, most := test.delay-0.5, test.delay+3; took < least || took > most {
				t.Errorf("the stubdomain has shut down after %.2f s, want %.1f to %.1f", took, least, most)
			}
			out, err := l.Run(ctx, `xl list -v`)
			if err != nil {
				t.Fatal(err)
			}
			t.Log(out)
			for name, want := range map[string]string{g.Name + "-dm": "---sc- " + strconv.Itoa(crashReason), g.Name: "------ -|-b---- -|r----- -"} {
				m := regexp.MustCompile(`(?m)^` + name + ` +\d+ +\d+ +\d+ +(\S+) +[0-9.]+ +[0-9a-f-]{36} +(\S+)`).FindStringSubmatch(out)
				if m == nil || !slices.Contains(strings.Split(want, "|"), m[1]+" "+m[2]) {
					t.Errorf("%s is %q, want state and reason %s", name, m, want)
				}
			}
		})
	}
}

// startLimit is for a guest that does not start, of which libxl knows after half a minute, or a whole one.
const startLimit = 100 * time.Second

// vifHook begins a hook that runs when a stubdomain's vif is attached, which is after its consoles; $s is the stubdomain.
const vifHook = `
[ "$1 $2" = "vif online" ] || exit 0
IFS=/ read -r _ _ s _ <<<"$XENBUS_PATH"
[[ $(xenstore-read "/local/domain/$s/name") = *-dm ]] || exit 0
`

// fails is xl create of a guest that must not start; it gives the guest for its log.
func fails(t *testing.T, ctx context.Context, cfg lab.GuestConfig) *lab.Guest {
	t.Helper()
	g, err := tryCreate(t, ctx, cfg)
	if err == nil {
		t.Error("xl create ended well")
	}
	t.Logf("xl create failed after %.1f s", g.Created.Seconds())
	return g
}

// saidSoon compares the log's own times: the reason comes within a second of the shim's word that it has sent the signal.
func saidSoon(t *testing.T, log string) {
	t.Helper()
	at := func(pattern string) float64 {
		m := regexp.MustCompile(`(?m)^[a-z]+ ([0-9.]+) ` + pattern).FindStringSubmatch(log)
		if m == nil {
			t.Fatalf("no line %s in the log:\n%s", pattern, log)
		}
		seconds, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		return seconds
	}
	took := at(`error FATAL `) - at(`shim: (?:9: sent|signal 9 to QEMU)`)
	t.Logf("the reason came after %.2f s", took)
	if took > 1 {
		t.Errorf("the reason came after %.2f s, want 1 at most", took)
	}
}

// QEMU dies before its guest runs: xl create fails, and says nothing; log and xenstore say why.
func testStartKilled(t *testing.T, phase, want string) {
	l := boot(t)
	faultyImage(t, l)
	ctx := limit(t, startLimit)
	armAtBoot(t, ctx, l, "9 "+phase)
	published := publishedError(t, l)
	g := fails(t, ctx, faultyConfig("start", ""))
	expect(t, ctx, g.Stub, want)
	wantPublished(t, ctx, published, want)
	saidSoon(t, g.Stub.Text())
}

// From phase "bridge" on QEMU may have told libxl that it runs, before it dies: whether xl create ends well is a matter of milliseconds. The guest
// ends in any case.
func testStartKilledLate(t *testing.T, phase string) {
	l := boot(t)
	faultyImage(t, l)
	ctx := limit(t, startLimit)
	armAtBoot(t, ctx, l, "9 "+phase)
	g, err := tryCreate(t, ctx, faultyConfig("start", ""))
	t.Logf("xl create: %v after %.1f s", err, g.Created.Seconds())
	expect(t, ctx, g.Stub, `FATAL (bridge|running|supervise): QEMU ended: killed by SIGKILL`)
	if out, err := l.Run(ctx, `for try in {1..100}; do xl domid "$1" >/dev/null 2>&1 || exit 0; sleep 0.1; done; xl list; exit 1`, g.Name); err != nil {
		t.Errorf("the guest is still there: %v\n%s", err, out)
	}
}

// QEMU stops before its guest runs: the log has what it was doing before libxl ends the stubdomain.
func testStartStopped(t *testing.T, phase string) {
	l := boot(t)
	faultyImage(t, l)
	ctx := limit(t, startLimit)
	armAtBoot(t, ctx, l, "19 "+phase)
	g := fails(t, ctx, faultyConfig("start", ""))
	expect(t, ctx, g.Stub, `QEMU does not answer on its monitor yet; libxl gives up`)
	expect(t, ctx, g.Stub, `late QEMU proc="process \d+: State=T`)
}

// Here too QEMU may have told libxl that it runs: then libxl waits a minute for its answer to "cont", and it is a running guest's QEMU that is stuck.
func testStartStoppedLate(t *testing.T, phase string) {
	l := boot(t)
	faultyImage(t, l)
	ctx := limit(t, startLimit)
	armAtBoot(t, ctx, l, "19 "+phase)
	g, err := tryCreate(t, ctx, faultyConfig("start", ""))
	t.Logf("xl create: %v after %.1f s", err, g.Created.Seconds())
	expect(t, ctx, g.Stub, `QEMU has not written "running" for the toolstack yet; libxl gives up|error QEMU is stuck: it does not answer`)
	expect(t, ctx, g.Stub, `(late|stuck) QEMU proc="process \d+: State=T`)
}

// The backend's state is moved away from where the frontend looks.
func testNoDisk(t *testing.T) {
	l := boot(t)
	ctx := limit(t, 3*time.Minute)
	setHook(t, ctx, l, stubOnly+`xenstore-write "/local/domain/$s/device/vbd/768/backend" "/local/domain/0/backend/vbd/$s/9999"`)
	published := publishedError(t, l)
	g := fails(t, ctx, config("nodisk"))
	const want = `FATAL devices: no /dev/xvda .*after 15s.*hotplug-status`
	expect(t, ctx, g.Stub, want)
	wantPublished(t, ctx, published, want)
}

// What keeps a guest from starting is said, in the log and in xenstore.
func TestFaultsStart(t *testing.T) {
	t.Run("QEMU killed in monitor", func(t *testing.T) { testStartKilled(t, "monitor", `FATAL monitor: QEMU ended: killed by SIGKILL`) })
	t.Run("no disk backend", testNoDisk)
}

func TestFaultsMoreStarts(t *testing.T) {
	t.Run("QEMU killed in qemu", func(t *testing.T) { testStartKilled(t, "qemu", `FATAL monitor: QEMU ended: killed by SIGKILL`) })
	t.Run("QEMU killed in bridge", func(t *testing.T) { testStartKilledLate(t, "bridge") })
	t.Run("QEMU killed in running", func(t *testing.T) { testStartKilledLate(t, "running") })
	t.Run("QEMU stopped in qemu", func(t *testing.T) { testStartStopped(t, "qemu") })
	t.Run("QEMU stopped in monitor", func(t *testing.T) { testStartStopped(t, "monitor") })
	t.Run("QEMU stopped in bridge", func(t *testing.T) { testStartStoppedLate(t, "bridge") })
	t.Run("QEMU stopped in running", func(t *testing.T) { testStartStoppedLate(t, "running") })
	t.Run("no serial port backend", func(t *testing.T) {
		l := boot(t)
		ctx := limit(t, startLimit)
		setHook(t, ctx, l, vifHook+`xenstore-write "/local/domain/$s/device/console/3/backend" "/local/domain/0/backend/console/$s/9999"`)
		published := publishedError(t, l)
		g := fails(t, ctx, config("noserial"))
		const want = `FATAL devices: no /dev/hvc3 .*after 15s`
		expect(t, ctx, g.Stub, want)
		wantPublished(t, ctx, published, want)
	})
	// The guest starts; its NIC has no link.
	t.Run("no NIC backend", func(t *testing.T) {
		l := boot(t)
		ctx := limit(t, startLimit)
		setHook(t, ctx, l, vifHook+`xenstore-write "/local/domain/$s/device/vif/0/backend" "/local/domain/0/backend/vif/$s/9999"`)
		g := create(t, ctx, config("nonic"))
		ready(t, ctx, g)
		expect(t, ctx, g.Stub, `NIC still has no network: `)
		if got := ask(t, ctx, g, "echo still here"); got != "still here" {
			t.Errorf("echo: %q", got)
		}
	})
	// The stubdomain's own framebuffer and keyboard, which libxl makes for vnc. Nothing waits for them.
	t.Run("no framebuffer backend", func(t *testing.T) {
		l := boot(t)
		ctx := limit(t, startLimit)
		setHook(t, ctx, l, vifHook+`for kind in vfb vkbd; do
	xenstore-exists "/local/domain/$s/device/$kind/0" && xenstore-write "/local/domain/$s/device/$kind/0/backend" "/local/domain/0/backend/$kind/$s/9999"
done`)
		cfg := config("nofb")
		cfg.Extra = []string{`vnc = 1`}
		g := create(t, ctx, cfg)
		ready(t, ctx, g)
		expect(t, ctx, g.Stub, `unable to read other end from device/vfb/0`)
		expect(t, ctx, g.Stub, `unable to read other end from device/vkbd/0`)
		if got := ask(t, ctx, g, "echo still here"); got != "still here" {
			t.Errorf("echo: %q", got)
		}
		if s := queryStatus(t, ctx, g); !strings.Contains(s, `"status": "running"`) {
			t.Errorf("query-status: %s", s)
		}
	})
	t.Run("too little memory", func(t *testing.T) {
		least, ramfs, err := initramfs.ReportedLeast(filepath.Dir(rootfs(t)))
		if err != nil {
			t.Fatal(err)
		}
		if least == ramfs {
			t.Skip("this image's kernel unpacks into a ramfs, which has no limit: it panics, before there is a console")
		}
		ctx := limit(t, startLimit)
		cfg := config("small")
		cfg.Stubdom.Memory = least - 25
		published := publishedError(t, boot(t))
		g := fails(t, ctx, cfg)
		const want = `FATAL modules: the initramfs was not unpacked to its end: .*raise stubdomain_memory`
		expect(t, ctx, g.Stub, want)
		wantPublished(t, ctx, published, want)
	})
}

// A saved state that does not come, or is bad, is said like any other failure to start.
func TestFaultsRestore(t *testing.T) {
	l := boot(t)
	ctx := limit(t, 6*time.Minute)
	g := create(t, ctx, config("restore"))
	ready(t, ctx, g)
	const file = "/root/faults.save"
	if out, err := l.Run(ctx, `xl save "$1" "$2" 2>&1`, g.Name, file); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	fails := func(t *testing.T, want string) {
		t.Helper()
		published := publishedError(t, l)
		if err := g.Restore(ctx, file); err == nil {
			t.Error("xl restore ended well")
		}
		expect(t, ctx, g.Stub, want)
		wantPublished(t, ctx, published, want)
	}
	// A backend that the stubdomain may read, and that nobody serves.
	const unserved = vifHook + `xenstore-write "/local/domain/$s/nobody/state" 1 "/local/domain/$s/device/console/2/backend" "/local/domain/$s/nobody"`
	t.Run("no console backend", func(t *testing.T) {
		setHook(t, ctx, l, unserved)
		fails(t, `FATAL incoming: nobody serves console 2 after 15s \(/local/domain/\d+/nobody is in state 1\): `)
	})
	t.Run("console backend that cannot be read", func(t *testing.T) {
		setHook(t, ctx, l, vifHook+`xenstore-write "/local/domain/$s/device/console/2/backend" "/local/domain/0/backend/console/$s/9999"`)
		fails(t, `FATAL incoming: wait for console 2: xenstore: read /local/domain/0/backend/console/\d+/9999/state: permission denied`)
	})
	t.Run("damaged state", func(t *testing.T) {
		// What follows QEMU's magic is its devices.
		out, err := l.Run(ctx, `
at=$(grep -abo QEVM "$1" | tail -n 1 | cut -d: -f1) && [ -n "$at" ] &&
dd if=/dev/zero bs=1 count=4096 seek=$((at + 64)) conv=notrunc of="$1" 2>&1`, file)
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		fails(t, `FATAL (monitor|bridge|running): QEMU ended: `)
	})
	t.Run("destroyed while it waits", func(t *testing.T) {
		setHook(t, ctx, l, unserved)
		killer := destroyAt(t, l, g.Name, "incoming")
		if err := g.Restore(ctx, file); err == nil {
			t.Error("xl restore ended well")
		}
		if err := killer.Wait(ctx); err != nil {
			t.Errorf("not destroyed: %v", err)
		}
	})
	if _, err := l.Run(ctx, `rm "$1"`, file); err != nil {
		t.Error(err)
	}
}

// destroyAt runs xl destroy when the boot of the guest's stubdomain is in this phase, "" being its kernel's.
func destroyAt(t *testing.T, l *lab.Lab, name, phase string) *lab.Process {
	t.Helper()
	killer, err := l.Begin(lab.Command{Script: `
until s=$(xl domid "$1-dm" 2>/dev/null) && g=$(xl domid "$1" 2>/dev/null) && xl list "$s" | grep -q ' [-r][-b]-'; do sleep 0.1; done
[ -z "$2" ] && sleep 0.3 # the kernel's own start takes 7 s, the small image's 1.3
until [ "$(xenstore-read "/local/domain/$s/device-model/$g/stubinit/phase" 2>/dev/null)" = "$2" ]; do sleep 0.1; done
echo "destroyed at phase $(xenstore-read "/local/domain/$s/device-model/$g/stubinit/phase" 2>&1)"
xl destroy "$1"`, Args: []string{name, phase}, Stdout: os.Stderr, Stderr: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { killer.Kill() })
	return killer
}

// xl destroy at each phase in which the boot waits leaves nothing behind. A stopped QEMU, or a disk that does not come, keeps the boot where it is to be hit.
func TestFaultsDestroy(t *testing.T) {
	l := boot(t)
	faultyImage(t, l)
	for _, test := range []struct{ name, phase, hook string }{
		{"kernel", "", ""},
		{"devices", "devices", `xenstore-write "/local/domain/$s/device/vbd/768/backend" "/local/domain/0/backend/vbd/$s/9999"`},
		{"monitor", "monitor", `xenstore-write "/local/domain/$s/data/fault" "19 qemu"`},
		{"running", "running", `xenstore-write "/local/domain/$s/data/fault" "19 bridge"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := limit(t, 3*time.Minute)
			if test.hook != "" {
				setHook(t, ctx, l, stubOnly+test.hook)
			}
			g, err := l.NewGuest(ctx, faultyConfig("early", ""))
			if err != nil {
				t.Fatal(err)
			}
			killer := destroyAt(t, l, g.Name, test.phase)
			created := g.Create(ctx)
			// At its end xl asks no more whether the guest is there.
			if created == nil && test.phase != "running" {
				t.Error("xl create ended well")
			}
			if err := killer.Wait(ctx); err != nil {
				t.Errorf("not destroyed: %v", err)
			}
			t.Logf("xl create: %v after %.1f s", created, g.Created.Seconds())
			if err := g.Destroy(ctx); err != nil {
				t.Error(err)
			}
			checkClean(t, ctx, l)
		})
	}
}

// rebooted waits for the domain and the stubdomain that xl makes of a guest which has shut down with reason reboot.
func rebooted(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest) {
	t.Helper()
	out, err := l.Run(ctx, `
for try in {1..600}; do
	id=$(xl domid "$1" 2>/dev/null) && [ "$id" != "$2" ] && s=$(xl domid "$1-dm" 2>/dev/null) &&
		[ "$(xenstore-read "/local/domain/$s/device-model/$id/state" 2>/dev/null)" = running ] && echo "domain $2 became $id" &&
		grep "has shut down" "/var/log/xen/xl-$1.log" && exit 0
	sleep 0.2
done
xl list; exit 1`, g.Name, strconv.Itoa(g.ID))
	if err != nil {
		t.Fatalf("no new domain with a running device model: %v\n%s", err, out)
	}
	t.Log(out)
	if want := fmt.Sprintf("Domain %d has shut down, reason code %d ", g.ID, rebootReason); !strings.Contains(out, want) {
		t.Errorf("xl's log lacks %q", want)
	}
}

// The guest's own ways to end are no faults.
func TestFaultsPower(t *testing.T) {
	l := boot(t)
	t.Run("reboot", func(t *testing.T) {
		ctx := limit(t, 5*time.Minute)
		g := create(t, ctx, config("reboot"))
		ready(t, ctx, g)
		if err := g.Serial.Send("reboot\n"); err != nil {
			t.Fatal(err)
		}
		rebooted(t, ctx, l, g)
	})
	t.Run("suspend to memory", func(t *testing.T) {
		ctx := limit(t, 5*time.Minute)
		g := create(t, ctx, config("suspend"))
		ready(t, ctx, g)
		if err := g.Serial.Send("suspend\n"); err != nil {
			t.Fatal(err)
		}
		for status := ""; !strings.Contains(status, `"status": "suspended"`); status = queryStatus(t, ctx, g) {
			if ctx.Err() != nil {
				t.Fatalf("status %s", status)
			}
		}
		if out, err := l.Run(ctx, `xl trigger "$1" s3resume 2>&1`, g.Name); err != nil {
			t.Fatalf("xl trigger: %v\n%s", err, out)
		}
		// The test guest has no place to wake up at. The firmware, which runs again, restarts it then.
		rebooted(t, ctx, l, g)
	})
	t.Run("power off", func(t *testing.T) {
		ctx := limit(t, 5*time.Minute)
		g := create(t, ctx, config("poweroff"))
		ready(t, ctx, g)
		if err := g.Serial.Send("poweroff\n"); err != nil {
			t.Fatal(err)
		}
		gone(t, ctx, l, g, poweroffReason)
	})
}

// The rescue shell shares console 0 with the log. libxl makes that a file, which nobody can type into: here it is a pty.
func TestFaultsShell(t *testing.T) {
	l := boot(t)
	ctx := limit(t, 3*time.Minute)
	busybox, err := l.Get(ctx, "/usr/bin/busybox")
	if err != nil {
		t.Fatal(err)
	}
	const place = "/root/shell"
	if err := l.Put(ctx, place, 0o644, bytes.NewReader(imageWith(t, map[string]string{"bin/busybox": string(busybox)}))); err != nil {
		t.Fatal(err)
	}
	// Between libxl's word and dom0's QEMU, which reads it, there is no hook.
	pty, err := l.Begin(lab.Command{Script: `
exec 3< <(exec xenstore-watch /local/domain)
while read -r path <&3; do
	case $path in
	/local/domain/*/console/output)
		[[ $(xenstore-read "${path%/console/output}/name") = shell-dm ]] && exec xenstore-write "$path" pty ;;
	esac
done`})
	if err != nil {
		t.Fatal(err)
	}
	defer pty.Kill()
	cfg := config("shell")
	cfg.Stubdom.Ramdisk, cfg.Stubdom.Cmdline = place, lab.DefaultCmdline+" stubinit.shell"
	g := create(t, ctx, cfg)
	ready(t, ctx, g)
	// An answer, and a line of the log beside it.
	var out bytes.Buffer
	reader, err := l.Begin(lab.Command{Script: `
exec 3<>"$(xenstore-read "/local/domain/$1/console/tty")"
echo 'echo $((6 * 7)) processes: $(busybox pidof init)' >&3
answer='' log=''
while [ -z "$answer" ] || [ -z "$log" ]; do
	read -r -t 20 line <&3 || exit 1
	echo "$line"
	case $line in
	*"42 processes: 1"*) answer=1 ;;
	*"qemu "*"xen platform: beside the shell"*) log=1 ;;
	esac
done`, Args: []string{strconv.Itoa(g.StubID)}, Stdout: &out})
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Kill()
	for done := false; !done; {
		ask(t, ctx, g, "unplug log beside the shell")
		select {
		case <-reader.Done():
			done = true
		case <-time.After(time.Second):
		}
	}
	if err := reader.Wait(ctx); err != nil {
		t.Errorf("no answer from the shell, or no log beside it: %v\n%s", err, out.String())
	}
}
