//go:build lab

package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stubinit/stubinit/test/lab"
)

// A saved is a guest that is saved, restored and migrated, and what it must still be after that.
type saved struct {
	t    *testing.T
	ctx  context.Context
	l    *lab.Lab
	g    *lab.Guest
	tty  string        // of the serial port, when the guest's own console does not have it: after a migration
	id   string        // of the guest's boot
	look *look         // at its clock; nil when it is not known what that was
	down time.Duration // since then, the most that it may have stood still
	end  time.Duration // dom0's clock at the end of the last save
}

// A look is at the guest's clock, in hundredths of a second, and at dom0's before and after that.
type look struct {
	ticks         int
	before, after time.Duration
}

// tickLag is how much later than dom0's clock the guest may count its ticks: when dom0 has the processor, they wait.
const tickLag = 250 * time.Millisecond

// What is written into memory and devices before the first save.
const (
	seed    = 4711
	diskLBA = 2048
	cmosReg = 0x40

	savedNICs = 2
	savedHost = "198.51.100.1" // dom0
	pingTries = 10             // each waits for 2 s of the guest's
)

func (s *saved) ask(command string) string {
	s.t.Helper()
	status, rest := s.try(command)
	if status != "ok" {
		s.t.Fatalf("the guest answers %q with %s %s", command, status, rest)
	}
	return rest
}

// try returns the guest's answer: ok or err, and what follows the command's name.
func (s *saved) try(command string) (status, rest string) {
	s.t.Helper()
	name, _, _ := strings.Cut(command, " ")
	pattern := `^(ok|err) ` + name + `\b *([^\r\n]*)\r?\n`
	if s.tty == "" {
		if err := s.g.Serial.Send(command + "\n"); err != nil {
			s.t.Fatal(err)
		}
		m := expect(s.t, s.ctx, s.g.Serial, pattern)
		return m[1], m[2]
	}
	out, err := s.l.Run(s.ctx, `
exec 3<>"$1"
echo "$2" >&3
while read -r -t 60 line <&3; do
	case $line in "ok ${2%% *}"* | "err ${2%% *}"*) echo "$line"; exit ;; esac
done
echo "no answer" >&2; exit 1`, s.tty, command)
	if err != nil {
		s.t.Fatal(err)
	}
	m := regexp.MustCompile(pattern).FindStringSubmatch(out)
	if m == nil {
		s.t.Fatalf("the guest answers %q with %q", command, out)
	}
	return m[1], m[2]
}

// fill gives memory, the VGA's memory, CMOS, the disk and the NICs something to keep.
func (s *saved) fill() {
	s.t.Helper()
	s.id = field(s.t, s.ask("info"), "id")
	for _, command := range []string{
		fmt.Sprint("mem fill ", seed), fmt.Sprint("vga fill ", seed), fmt.Sprintf("cmos %d 90", cmosReg),
		fmt.Sprintf("ata 0 write %d 64 %d", diskLBA, seed),
	} {
		s.ask(command)
	}
	for i := range savedNICs {
		s.ask(fmt.Sprintf("nic %d up 198.51.100.%d", i, 10+i))
	}
	s.clock()
}

// ping says that dom0 answers a NIC, which has not been set up anew. It may take a while after a restore until its backend has connected.
func (s *saved) ping(nic int) {
	s.t.Helper()
	var rest string
	for range pingTries {
		var status string
		if status, rest = s.try(fmt.Sprintf("nic %d ping %s", nic, savedHost)); status == "ok" {
			return
		}
	}
	s.t.Errorf("NIC %d: no answer to %d pings, the last: %s", nic, pingTries, rest)
}

// check says that it is the same guest, that it went on where it was, and has kept everything.
func (s *saved) check() {
	t := s.t
	t.Helper()
	s.clock()
	for _, command := range []string{fmt.Sprint("mem check ", seed), fmt.Sprint("vga check ", seed), fmt.Sprintf("ata 0 verify %d 64 %d", diskLBA, seed)} {
		if got := s.ask(command); field(t, got, "bad") != "0" {
			t.Errorf("%s: %s", command, got)
		}
	}
	if got := s.ask(fmt.Sprintf("cmos %d", cmosReg)); !strings.HasSuffix(got, "=90") && !strings.HasSuffix(got, "=0x5a") {
		t.Errorf("CMOS register %d: %s, want 90", cmosReg, got)
	}
	if got := s.ask("cd 2 size"); field(t, got, "bytes") != fmt.Sprint(cdBytes) {
		t.Errorf("cd: %s, want %d bytes", got, cdBytes)
	}
	for i := range savedNICs {
		s.ping(i)
	}
	// The clock runs, and at the right speed.
	s.ask("sleep 300")
	s.clock()
}

// clock says that the guest has not booted again, and that no tick is lost but of the time in which it was saved, restored or migrated.
func (s *saved) clock() {
	t := s.t
	t.Helper()
	now := &look{before: s.uptime()}
	info := s.ask("info")
	now.after = s.uptime()
	if field(t, info, "id") != s.id || field(t, info, "boot") != "1" {
		t.Errorf("the guest has booted again: %s, was id=%s", info, s.id)
	}
	var err error
	if now.ticks, err = strconv.Atoi(field(t, info, "ticks")); err != nil {
		t.Fatal(err)
	}
	if s.look != nil {
		passed := time.Duration(now.ticks-s.look.ticks) * 10 * time.Millisecond
		least, most := now.before-s.look.after-s.down, now.after-s.look.before
		t.Logf("the guest's clock went on by %v; dom0's by %v, of them %v with xl", passed, now.after-s.look.after, s.down)
		if passed <= 0 || passed < least-tickLag || passed > most+tickLag {
			t.Errorf("the guest's clock went on by %v, want %v to %v", passed, least, most)
		}
	}
	s.look, s.down = now, 0
}

func field(t *testing.T, answer, key string) string {
	t.Helper()
	m := regexp.MustCompile(`\b` + key + `=(\S+)`).FindStringSubmatch(answer)
	if m == nil {
		t.Fatalf("answer %q has no %s", answer, key)
	}
	return m[1]
}

// save runs xl save and returns what it said.
func (s *saved) save(args ...string) (string, error) {
	s.t.Helper()
	start := s.uptime()
	out, err := s.l.Run(s.ctx, `xl save "$@" 2>&1`, args...)
	s.end = s.uptime()
	s.down += s.end - start
	s.t.Logf("xl save %s: %.1f s, %v", strings.Join(args, " "), (s.end - start).Seconds(), err)
	var exit *lab.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	return out, err
}

func (s *saved) uptime() time.Duration {
	s.t.Helper()
	up, err := s.l.Uptime(s.ctx)
	if err != nil {
		s.t.Fatal(err)
	}
	return up
}

// timing logs what the agent measured of the last save.
func (s *saved) timing() (bytes, rate int) {
	s.t.Helper()
	m := expect(s.t, s.ctx, s.g.Stub, `state saved bytes=(\d+) took=(\S+) waited_for_dom0=(\S+) kib_per_s=(\d+)`)
	s.t.Logf("agent: %s bytes in %s, of them %s waiting for dom0: %s KiB/s", m[1], m[2], m[3], m[4])
	bytes, _ = strconv.Atoi(m[1])
	rate, _ = strconv.Atoi(m[4])
	return bytes, rate
}

// restore brings the guest back from a file, in place of the one that runs.
func (s *saved) restore(file string) {
	s.t.Helper()
	s.destroy()
	if err := s.g.Restore(s.ctx, file); err != nil {
		s.t.Fatal(err)
	}
	s.down += s.uptime() - s.end
	s.tty = ""
	m := expect(s.t, s.ctx, s.g.Stub, `state received bytes=(\d+) took=(\S+) waited_for_dom0=(\S+) kib_per_s=(\d+)`)
	s.t.Logf("agent: received %s bytes in %s, of them %s waiting for dom0: %s KiB/s", m[1], m[2], m[3], m[4])
	m = expect(s.t, s.ctx, s.g.Stub, `(\S+) info step done step=running`)
	s.t.Logf("xl restore: %.1f s; ready %s s after the stubdomain's kernel started (libxl waits 30)", s.g.Created.Seconds(), m[1])
	if _, err := s.l.Run(s.ctx, `rm "$1"`, file); err != nil { // dom0 has it in memory
		s.t.Error(err)
	}
}

// destroy ends the domain and leaves its loop devices.
func (s *saved) destroy() {
	s.t.Helper()
	if _, err := s.l.Run(s.ctx, `xl domid "$1" >/dev/null 2>&1 || exit 0; xl destroy "$1"`, s.g.Name); err != nil {
		s.t.Fatal(err)
	}
}

// sub runs a scenario on the guest; the chain ends with the first that fails.
func (s *saved) sub(name string, f func(s *saved)) {
	s.t.Helper()
	if s.t.Failed() {
		return
	}
	s.t.Run(name, func(t *testing.T) {
		outer := s.t
		s.t = t
		defer func() { s.t = outer }()
		f(s)
	})
}

const (
	cdFile  = "/root/state-cd.iso"
	cdBytes = 1 << 20
)

// newSaved creates a guest with a disk, a CD and two NICs, and fills it. An armed one's QEMU is killed in a save once it is told so.
func newSaved(t *testing.T, ctx context.Context, name string, armed bool) *saved {
	t.Helper()
	l := boot(t)
	if _, err := l.Run(ctx, `head -c "$2" /dev/urandom >"$1"`, cdFile, fmt.Sprint(cdBytes)); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Run(ctx, `ip address replace "$1"/24 dev xenbr0`, savedHost); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if _, err := l.Run(cleanup(t), `ip address del "$1"/24 dev xenbr0`, savedHost); err != nil {
			t.Error(err)
		}
	})
	cfg := config(name)
	cfg.Disks = append(cfg.Disks, lab.Disk{VDev: "hdc", File: cdFile, CDROM: true})
	cfg.VIFs = append(cfg.VIFs, "mac=00:16:3e:00:00:02,model=rtl8139,bridge=xenbr0")
	cfg.Extra = []string{`vga = "stdvga"`} // after the lab's own line: the last counts
	if armed {
		cfg.Stubdom.Ramdisk, cfg.Stubdom.Cmdline = "/root/state-kill", lab.DefaultCmdline+withShell
		image := imageWith(t, standingIn(t, string(stateProgram(t)), "kill"))
		if err := l.Put(ctx, cfg.Stubdom.Ramdisk, 0o644, bytes.NewReader(image)); err != nil {
			t.Fatal(err)
		}
	}
	s := &saved{t: t, ctx: ctx, l: l, g: create(t, ctx, cfg)}
	ready(t, ctx, s.g)
	s.fill()
	return s
}

// What every change runs: a guest is saved while it goes on, twice at once and then once more, restored, saved and restored again, and loses its QEMU in a save.
func TestState(t *testing.T) {
	ctx := limit(t, 6*time.Minute)
	s := newSaved(t, ctx, "state", true)
	var good string
	s.sub("two at once", func(s *saved) { good = s.twoAtOnce() })
	// dom0's QEMU would put a second state behind the first, in the same file.
	s.sub("second save", func(s *saved) {
		out, err := s.save("-c", s.g.Name, "/root/second.save")
		if err == nil {
			s.t.Error("a second save of the same stubdomain ended well")
		}
		if want := "console 1 has carried a state already"; !strings.Contains(out, want) {
			s.t.Errorf("xl does not say %q:\n%s", want, out)
		}
		s.clock() // it goes on
	})
	s.sub("restore", func(s *saved) {
		s.look = nil // the guest has gone on since that save
		s.restore(good)
		s.check()
	})
	s.sub("round 2", func(s *saved) { s.round() })
	s.sub("QEMU dies", func(s *saved) { s.kill() })
}

// The other ways to save, each on what the one before has left.
func TestStateWays(t *testing.T) {
	ctx := limit(t, 8*time.Minute)
	rounds := 2
	if *soak {
		ctx = limit(t, 25*time.Minute)
		rounds = 10
	}
	s := newSaved(t, ctx, "ways", false)
	for i := range rounds {
		s.sub(fmt.Sprint("round ", i+1), func(s *saved) { s.round() })
	}
	s.sub("migrate", func(s *saved) { s.migrate(); s.check() })
	s.sub("save and migrate at once", func(s *saved) { s.saveAndMigrate(); s.check() })
	s.sub("no backend", func(s *saved) {
		path := fmt.Sprintf("/local/domain/0/backend/console/%d/1/state", s.g.StubID)
		if _, err := s.l.Run(s.ctx, `xenstore-write "$1" 1`, path); err != nil {
			s.t.Fatal(err)
		}
		out, err := s.save(s.g.Name, "/root/none.save")
		if _, err := s.l.Run(s.ctx, `xenstore-write "$1" 4`, path); err != nil {
			s.t.Fatal(err)
		}
		if err == nil || !strings.Contains(out, "nobody serves console 1") {
			s.t.Errorf("%v; xl says\n%s", err, out)
		}
		s.check() // it goes on
	})
	// libxl has removed console 1's file, which dom0's QEMU still has open.
	s.sub("after a failed save", func(s *saved) {
		out, err := s.save(s.g.Name, "/root/none.save")
		if want := "No such file or directory"; err == nil || !strings.Contains(out, want) {
			s.t.Errorf("%v; xl does not say %q:\n%s", err, want, out)
		}
		s.check() // it goes on
	})
}

// round saves the guest, which ends it, and brings it back.
func (s *saved) round() {
	t := s.t
	t.Helper()
	const file = "/root/round.save"
	if out, err := s.save(s.g.Name, file); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s.timing()
	s.restore(file)
	s.check()
}

// under is what a refused save says: at its first command, and of its cont.
var under = []string{
	"another save or migration of this guest is under way, or has been killed",
	"another save or migration of this guest is under way: the guest does not go on",
}

// twoAtOnce saves twice at the same time, and the guest is to go on. libxl lets both begin. One makes a good state, the other
// is refused with an error and leaves nothing that could be restored; the guest goes on once, after the good one. The second begins when
// libxl has suspended the guest for the first: refused any sooner, it could spoil that (saveAndMigrate).
// It returns the good state's file.
func (s *saved) twoAtOnce() string {
	t := s.t
	t.Helper()
	start := s.uptime()
	out, err := s.l.Run(s.ctx, `
for n in 1 2; do
	{ xl save -c "$1" /root/at-once.$n >/root/at-once.$n.log 2>&1; echo "$n=$?"; } &
	for try in {1..200}; do [[ $(xl list "$1" | tail -n 1) =~ \ [-r][-b][-p]s ]] && break; sleep 0.01; done
done
wait
for n in 1 2; do sed "s/^/$n: /" /root/at-once.$n.log; stat -c '%s bytes in %n' /root/at-once.$n; done`, s.g.Name)
	s.down += s.uptime() - start
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	good := regexp.MustCompile(`(?m)^(\d)=0$`).FindAllStringSubmatch(out, -1)
	if len(good) != 1 {
		t.Fatalf("%d of two saves ended well, want 1", len(good))
	}
	winner := good[0][1]
	loser := map[string]string{"1": "2", "2": "1"}[winner]
	for _, want := range under {
		if !regexp.MustCompile(`(?m)^` + loser + `: .*` + want).MatchString(out) {
			t.Errorf("xl save %s does not say %q", loser, want)
		}
	}
	s.timing()
	s.check() // the guest goes on
	out, err = s.l.Run(s.ctx, `
sed 's/^name = .*/name = "refused"/' "$1" >/root/refused.cfg
xl restore /root/refused.cfg /root/at-once."$2" 2>&1 && xl destroy refused`, s.g.ConfigFile, loser)
	if err == nil {
		t.Errorf("the refused save's file could be restored:\n%s", out)
	}
	return "/root/at-once." + winner
}

// saveAndMigrate begins a save while the guest is migrated, live. The save is refused. Its libxl has switched Xen's dirty log
// off even so (cleanup in xg_sr_save.c), which the migration, without its state yet, still needs: it fails too, and the guest goes on where it was.
func (s *saved) saveAndMigrate() {
	t := s.t
	t.Helper()
	start := s.uptime()
	s.g.Release()
	out, err := s.l.Run(s.ctx, `
{ xl migrate -s "" "$1" "xl migrate-receive" >/root/migrate.log 2>&1; echo "migrate=$?"; } &
for try in {1..200}; do grep -q "Saving domain" /root/migrate.log && break; sleep 0.05; done
xl save "$1" /root/meanwhile.save >/root/meanwhile.log 2>&1
echo "save=$?"
wait
sed "s/^/save: /" /root/meanwhile.log
sed "s/^/migrate: /" /root/migrate.log`, s.g.Name)
	s.down += s.uptime() - start
	t.Logf("%s", out)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(out, "save=0") {
		t.Error("the save ended well")
	}
	if !regexp.MustCompile(`(?m)^save: .*` + under[0]).MatchString(out) {
		t.Errorf("xl save does not say %q", under[0])
	}
	if strings.Contains(out, "migrate=0") || !strings.Contains(out, "Xen's log of dirty memory was switched off") {
		t.Error("the migration did not fail for the save's sake")
	}
	s.follow()
}

// migrate moves the guest to this same dom0, live, over a pipe to a second xl.
func (s *saved) migrate() {
	s.t.Helper()
	start := s.uptime()
	s.g.Release() // the names of logs and consoles are another's from here on
	out, err := s.l.Run(s.ctx, `xl migrate -s "" "$1" "xl migrate-receive" 2>&1`, s.g.Name)
	if err != nil {
		logs, _ := s.l.Run(s.ctx, `tail -n 30 /var/log/xen/qemu-dm-"$1"--incoming.log`, s.g.Name)
		s.t.Fatalf("%v\n%s\n%s", err, out, logs)
	}
	took := s.uptime() - start
	s.down += took
	s.t.Logf("xl migrate: %.1f s", took.Seconds())
	s.follow()
}

// follow finds the guest, whichever domain it is now.
func (s *saved) follow() {
	s.t.Helper()
	ids, err := s.l.Run(s.ctx, `id=$(xl domid "$1") && echo "$id" && xenstore-read "/local/domain/$id/image/device-model-domid"`, s.g.Name)
	if err != nil {
		s.t.Fatal(err)
	}
	if _, err := fmt.Sscan(ids, &s.g.ID, &s.g.StubID); err != nil {
		s.t.Fatalf("domids %q: %v", ids, err)
	}
	if s.tty, err = s.l.XenstoreRead(s.ctx, fmt.Sprintf("/local/domain/%d/device/console/3/tty", s.g.StubID)); err != nil {
		s.t.Fatal(err)
	}
	if _, err := s.l.Run(s.ctx, `socat -u OPEN:/dev/null "FILE:$1,rawer"`, s.tty); err != nil {
		s.t.Fatal(err)
	}
}

// kill has QEMU killed while it writes its state. The save fails; libxl resumes the guest, which then ends as one that has crashed.
func (s *saved) kill() {
	t := s.t
	t.Helper()
	if _, err := s.l.Run(s.ctx, `xenstore-write "/local/domain/$1/data/kill" 1`, fmt.Sprint(s.g.StubID)); err != nil {
		t.Fatal(err)
	}
	out, err := s.save("-c", s.g.Name, "/root/dead.save")
	// The second, when it had answered, and was killed before the agent had handed the state over.
	if want := "QEMU closed its monitor|qmp remove-fd: connection closed"; err == nil || !regexp.MustCompile(want).MatchString(out) {
		t.Errorf("%v; xl does not say %q:\n%s", err, want, out)
	}
	expect(t, s.ctx, s.g.Stub, "FATAL supervise: QEMU ended: killed by SIGKILL")
	// The xl that created the guest has ended when it saw it suspended, so nobody applies on_crash: the guest stays as a crashed one.
	state, err := s.l.Run(s.ctx, `
for try in {1..100}; do
	xl domid "$1" >/dev/null 2>&1 || { echo gone; exit; }
	state=$(xl list "$1" | tail -n 1 | tr -s ' ' | cut -d' ' -f5)
	case $state in *sc*) echo "$state"; exit ;; esac
	sleep 0.1
done
echo "$state"; exit 1`, s.g.Name)
	t.Logf("the guest is %s", strings.TrimSpace(state))
	if err != nil {
		t.Errorf("10 s after the save the guest is neither gone nor crashed: %s, %v", state, err)
	}
}

// A state of 16 MiB: NICs with 128 KiB of registers each, behind bridges that the guest's firmware does not look at.
func TestStateLarge(t *testing.T) {
	if !hasModules(t) {
		t.Skip("the small image's QEMU has no device whose state is large: no bridges, no e1000e (configs/qemu-stubdom.devices)")
	}
	ctx := limit(t, 6*time.Minute)
	l := boot(t)
	const mib = 16
	cfg := config("large")
	cfg.Stubdom.Memory = 344
	for b := range 4 {
		cfg.HVMArgs = append(cfg.HVMArgs, "-device", fmt.Sprintf("pci-bridge,id=b%d,chassis_nr=%d,addr=%x", b, b+1, 0x10+b))
		for i := range 31 {
			cfg.HVMArgs = append(cfg.HVMArgs, "-device", fmt.Sprintf("e1000e,bus=b%d,addr=%x.%d,multifunction=on,romfile=", b, 1+i/8, i%8))
		}
	}
	s := &saved{t: t, ctx: ctx, l: l, g: create(t, ctx, cfg)}
	ready(t, ctx, s.g)
	s.sub("paused", func(s *saved) {
		if out, err := s.save("-p", s.g.Name, "/root/large.save"); err != nil {
			s.t.Fatalf("%v\n%s", err, out)
		}
		state, err := s.l.Run(s.ctx, `xl list "$1" | tail -n 1`, s.g.Name)
		if err != nil || !regexp.MustCompile(` --p--- `).MatchString(state) {
			s.t.Errorf("after xl save -p the guest is not paused: %s, %v", state, err)
		}
		if _, err := s.l.Run(s.ctx, `xl unpause "$1"`, s.g.Name); err != nil {
			s.t.Fatal(err)
		}
		s.ask("echo alive")
		if bytes, _ := s.timing(); bytes < mib<<20 {
			s.t.Errorf("the state has %d bytes, want %d MiB", bytes, mib)
		}
	})
	s.sub("restore", func(s *saved) {
		s.restore("/root/large.save")
		s.ask("echo alive")
	})
	// From here on libxl cannot save this guest: it removes console 1's file after a failure.
	s.sub("does not fit", func(s *saved) {
		balloon := func(mib int) {
			s.t.Helper()
			// xl mem-set refuses stubdomains. The kernel gives what it can spare: wait until that is all.
			out, err := l.Run(ctx, `
mem() { xl list "$1" | tail -n 1 | tr -s ' ' | cut -d' ' -f3; }
old=$(mem "$1")
xenstore-write "/local/domain/$1/memory/target" $(($2 << 10))
for try in {1..60}; do
	sleep 1
	now=$(mem "$1")
	[ "$now" = "$2" ] || [ "$now" = "$last" -a "$now" != "$old" ] && break
	last=$now
done
echo "$old MiB, now $now"`, fmt.Sprint(s.g.StubID), fmt.Sprint(mib))
			if err != nil {
				s.t.Fatal(err)
			}
			s.t.Logf("stubdomain had %s", strings.TrimSpace(out))
		}
		m := regexp.MustCompile(`info memory .*available_mib=(\d+)`).FindStringSubmatch(s.g.Stub.Text())
		if m == nil {
			s.t.Fatal("the log does not say how much memory is available")
		}
		available, _ := strconv.Atoi(m[1])
		balloon(cfg.Stubdom.Memory - available + mib + 4) // less than the state and what must stay free
		out, err := s.save(s.g.Name, "/root/large.save")
		if want := "raise stubdomain_memory in xl.cfg"; err == nil || !strings.Contains(out, want) {
			s.t.Fatalf("%v; xl does not say %q:\n%s", err, want, out)
		}
		expect(s.t, ctx, s.g.Stub, `save failed; the guest goes on.*: raise stubdomain_memory`)
		s.ask("echo alive")
		balloon(cfg.Stubdom.Memory)
	})
	s.sub("file full", func(s *saved) {
		const dir = "/run/full"
		if _, err := l.Run(ctx, `mkdir "$1" && mount -t tmpfs -o size=8m full "$1"`, dir); err != nil {
			s.t.Fatal(err)
		}
		out, err := s.save(s.g.Name, dir+"/large.save")
		if _, err := l.Run(ctx, `umount "$1" && rmdir "$1"`, dir); err != nil {
			s.t.Error(err)
		}
		if err == nil || !strings.Contains(out, "No space left on device") {
			s.t.Errorf("%v; xl says\n%s", err, out)
		}
		s.ask("echo alive")
	})
}

// A full file system below dom0's own file of the state (/var/lib/xen): nobody tells the agent, and libxl takes what there is.
// A guest cannot be restored from that; the log says why.
func TestStateFileFull(t *testing.T) {
	ctx := limit(t, 4*time.Minute)
	l := boot(t)
	const dir, file = "/var/lib/xen", "/root/full.save"
	if _, err := l.Run(ctx, `mount -t tmpfs -o size=128k full "$1"`, dir); err != nil {
		t.Fatal(err)
	}
	full := true
	empty := func(ctx context.Context) {
		if _, err := l.Run(ctx, `mount -o remount,size=16m "$1"`, dir); err != nil {
			t.Error(err)
		}
		full = false
	}
	t.Cleanup(func() {
		if _, err := l.Run(cleanup(t), `umount "$1"`, dir); err != nil {
			t.Error(err)
		}
	})
	s := newSaved(t, ctx, "full", false)
	defer func() {
		if full {
			empty(cleanup(t))
		}
	}()
	out, err := s.save("-c", s.g.Name, file)
	t.Logf("%v\n%s", err, out)
	s.check() // it goes on
	size, err := l.Run(ctx, `stat -c %s "$1"/qemu-save.* || true; rm -f "$1"/qemu-save.*`, dir)
	t.Logf("dom0's file has %s bytes, %v", strings.TrimSpace(size), err)
	s.timing()
	empty(ctx)
	s.destroy()
	if err := s.g.Restore(ctx, file); err == nil {
		t.Error("a guest was restored from a state that was cut off")
	}
	expect(t, ctx, s.g.Stub, `no more of the state comes; if QEMU still waits for it, it was cut off when it was saved`)
}
