package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
)

// DefaultCmdline is a stubdomain's kernel command line. QEMU from 8.2 on has no backend for console 2 when nothing is
// restored; the kernel must not wait for it.
const DefaultCmdline = "console=hvc0 quiet initcall_blacklist=boot_wait_for_devices"

// A Disk of a guest. File is a file in dom0, which gets a loop device; a CD-ROM may have none.
type Disk struct {
	VDev     string // "hda"
	File     string
	CDROM    bool
	ReadOnly bool
}

// A Stubdom says what a guest's device model runs in.
type Stubdom struct {
	Kernel, Ramdisk string // files in dom0; default libxl's
	Memory          int    // MiB; default 192
	Cmdline         string // default DefaultCmdline
}

// GuestConfig says what to write into xl.cfg.
type GuestConfig struct {
	Name    string
	Memory  int // MiB; default 64
	Disks   []Disk
	VIFs    []string // as in xl.cfg: "mac=…,model=e1000,bridge=xenbr0"
	Stubdom *Stubdom // nil: QEMU runs in dom0
	PVArgs  []string // device_model_args_pv: for dom0's QEMU, which serves the stubdomain's consoles
	HVMArgs []string // device_model_args_hvm
	Extra   []string // more lines
	// Progress, if set, is called for each stage of the creation.
	Progress func(Stage)
}

// A Stage is something that was seen while a guest was created.
type Stage struct {
	What string
	At   time.Duration // dom0's uptime
}

// A Guest is a domain that xl created, or tried to.
type Guest struct {
	Name   string
	ID     int // 0 when it was not created
	StubID int // 0 when there is none
	// Serial is the first serial port, Stub the stubdomain's console 0 (or QEMU's log in dom0 when there is no stubdomain).
	Serial, Stub *Console
	// Stages are in order of time.
	Stages []Stage
	// Created is how long xl create took, by dom0's clock.
	Created time.Duration

	// ConfigFile is xl.cfg in dom0.
	ConfigFile string

	lab    *Lab
	cfg    GuestConfig
	loops  []string
	starts int
	log    string // what xl said: a file here

	mu     sync.Mutex
	events *Process
	ttyErr error
}

// watchScript reports on the guest named $1 as xenstore tells: lines "UPTIME WORD VALUE".
const watchScript = `
say() { read -r up _ </proc/uptime; echo "$up $*"; }
exec 3< <(exec xenstore-watch /local/domain)
while read -r path <&3; do
	case $path in
	*/device/console/3/tty | */serial/0/tty | */device-model/*/state | */target | /local/domain/*/name) ;;
	*) continue ;;
	esac
	IFS=/ read -r _ _ _ id dm g _ <<<"$path"
	value=$(xenstore-read "$path" 2>/dev/null) || continue
	name=$(xenstore-read "/local/domain/$id/name" 2>/dev/null)
	case $path in
	*/name)
		[ "$value" = "$1" ] && say guest "$id"
		[ "$value" = "$1-dm" ] && say stub "$id"
		continue ;;
	*/device-model/*/state)
		[ "$dm" = device-model ] && [ "$(xenstore-read "/local/domain/$g/name" 2>/dev/null)" = "$1" ] && say state "$value"
		continue ;;
	esac
	[ "$name" = "$1" ] || [ "$name" = "$1-dm" ] || continue
	case $path in
	*/tty) [ -n "$value" ] && say tty "$value" ;;
	esac
done`

// NewGuest writes xl.cfg and makes the loop devices that it names. It starts nothing.
func (l *Lab) NewGuest(ctx context.Context, cfg GuestConfig) (*Guest, error) {
	g := &Guest{Name: cfg.Name, ConfigFile: "/root/" + cfg.Name + ".cfg", lab: l, cfg: cfg}
	text, err := g.config(ctx)
	if err == nil {
		err = l.Put(ctx, g.ConfigFile, 0o644, strings.NewReader(text))
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(l.Dir, g.Name+".cfg"), []byte(text), 0o644)
	}
	if err != nil {
		return g, fmt.Errorf("guest %s: %w", cfg.Name, err)
	}
	return g, nil
}

// CreateGuest is NewGuest and Create. It returns the guest also after a failure, for its logs and for Destroy.
func (l *Lab) CreateGuest(ctx context.Context, cfg GuestConfig) (*Guest, error) {
	g, err := l.NewGuest(ctx, cfg)
	if err != nil {
		return g, err
	}
	return g, g.Create(ctx)
}

// Create runs xl create.
func (g *Guest) Create(ctx context.Context) error { return g.bring(ctx, "create", g.ConfigFile) }

// Restore runs xl restore from a file in dom0 that xl save wrote.
func (g *Guest) Restore(ctx context.Context, file string) error {
	return g.bring(ctx, "restore", g.ConfigFile, file)
}

// bring starts the guest with an xl command, and follows it with consoles of its own.
func (g *Guest) bring(ctx context.Context, command string, args ...string) error {
	g.Release()
	g.starts++
	file := func(kind string) string {
		name := kind + "-" + g.Name
		if g.starts > 1 {
			name += fmt.Sprintf("-%d", g.starts)
		}
		return filepath.Join(g.lab.Dir, name+".log")
	}
	g.log = file("xl-" + command)
	log, err := os.Create(g.log)
	if err != nil {
		return err
	}
	defer log.Close()
	if g.Serial, err = newConsole(g.Name+"'s serial port", file("serial")); err != nil {
		return err
	}
	if g.Stub, err = newConsole(g.Name+"'s device model", file("stubdom")); err != nil {
		return err
	}
	g.Stages = nil
	if err := g.watch(); err != nil {
		return err
	}
	// libxl keeps the logs of an earlier guest of this name by renaming; what is shown must be this one's.
	if _, err := g.lab.Run(ctx, `rm -f /var/log/xen/*"-$1".log* /var/log/xen/*"-$1-dm".log*`, g.Name); err != nil {
		return err
	}
	if err := g.Stub.run(g.lab, `exec tail -n +1 -F "$1" 2>/dev/null`, "/var/log/xen/qemu-dm-"+g.Name+".log"); err != nil {
		return err
	}
	var times []time.Duration
	answers := map[string]bool{} // libxl says it of each connection; the first counts
	p, err := g.lab.Begin(Command{
		Script: createScript,
		Args:   append([]string{command}, args...), Stderr: log,
		Stdout: &lines{f: func(line string) {
			at, domain, found := strings.Cut(line, " ")
			if found && answers[domain] {
				return
			}
			if found {
				answers[domain] = true
				g.stage(Stage{"QEMU of domain " + domain + " answers libxl", uptime(at)})
				return
			}
			if times = append(times, uptime(at)); len(times) == 1 {
				g.stage(Stage{"xl " + command + " began", times[0]})
			} else {
				g.stage(Stage{"xl " + command + " ended", times[1]})
			}
		}},
	})
	if err != nil {
		return err
	}
	err = p.Wait(ctx)
	if len(times) == 2 {
		g.Created = times[1] - times[0]
	}
	g.findIDs(ctx)
	var exit *ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("exit code %d", exit.Code)
	}
	if err == nil && g.ID == 0 {
		err = errors.New("ended well, but the domain does not exist")
	}
	g.mu.Lock()
	if err == nil {
		err = g.ttyErr
	}
	g.mu.Unlock()
	if err != nil {
		return fmt.Errorf("xl %s of %s: %w", command, g.Name, err)
	}
	return nil
}

// createScript runs xl with what it says on standard error, and prints dom0's uptime before and after it, and with a domain's
// id when QEMU has answered libxl for that domain. xl leaves a process behind that may hold the pipe: so not longer than 2 s.
const createScript = `
up() { read -r up _ </proc/uptime; echo $up $*; }
up
xl -vvv "$@" 2> >(tee /proc/self/fd/2 | grep --line-buffered -o 'Domain [0-9]*:QEMU version' |
	while IFS=' :' read -r _ id _; do up $id; done) >&2
code=$?
up
for _ in {1..20}; do kill -0 $! 2>/dev/null || break; sleep 0.1; done
exit $code`

func uptime(s string) time.Duration {
	f, _ := strconv.ParseFloat(s, 64)
	return time.Duration(f * float64(time.Second))
}

func (g *Guest) stage(s Stage) {
	g.mu.Lock()
	g.Stages = append(g.Stages, s)
	g.mu.Unlock()
	if g.cfg.Progress != nil {
		g.cfg.Progress(s)
	}
}

// watch follows the creation and connects the serial port when its pty is known.
func (g *Guest) watch() error {
	seen := map[string]bool{}
	p, err := g.lab.Begin(Command{
		Script: watchScript, Args: []string{g.Name},
		Stderr: &lines{f: func(line string) { g.stage(Stage{What: "watching xenstore: " + line}) }},
		Stdout: &lines{f: func(line string) {
			word := strings.Fields(line)
			if len(word) < 3 || seen[word[1]+word[2]] {
				return
			}
			seen[word[1]+word[2]] = true
			at := uptime(word[0])
			switch word[1] {
			case "guest":
				g.stage(Stage{"domain " + word[2] + " is the guest", at})
			case "stub":
				g.stage(Stage{"domain " + word[2] + " is its stubdomain", at})
			case "state":
				g.stage(Stage{"device model is " + word[2], at})
			case "tty":
				if seen["tty"] {
					return
				}
				seen["tty"] = true
				if err := g.Serial.run(g.lab, `exec socat STDIO "FILE:$1,rawer" 2>/dev/null`, word[2]); err != nil {
					g.mu.Lock()
					g.ttyErr = err
					g.mu.Unlock()
				}
				g.stage(Stage{"serial port on " + word[2], at})
			}
		}},
	})
	g.events = p
	return err
}

func (g *Guest) findIDs(ctx context.Context) {
	id := func(name string) int {
		out, err := g.lab.Run(ctx, `xl domid "$1" 2>/dev/null`, name)
		if err != nil {
			return 0
		}
		n, _ := strconv.Atoi(strings.TrimSpace(out))
		return n
	}
	g.ID, g.StubID = id(g.Name), id(g.Name+"-dm")
}

// config writes xl.cfg and makes the loop devices it names.
func (g *Guest) config(ctx context.Context) (string, error) {
	c := g.cfg
	if c.Memory == 0 {
		c.Memory = 64
	}
	var b strings.Builder
	put := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	put(`name = "%s"`, c.Name)
	put(`type = "hvm"`)
	put(`memory = %d`, c.Memory)
	put(`vcpus = 1`)
	put(`device_model_version = "qemu-xen"`)
	put(`serial = "pty"`)
	put(`vga = "none"`)
	put(`vnc = 0`)
	put(`sdl = 0`)
	put(`on_crash = "destroy"`)
	if s := c.Stubdom; s != nil {
		memory, cmdline := s.Memory, s.Cmdline
		if memory == 0 {
			memory = 192
		}
		if cmdline == "" {
			cmdline = DefaultCmdline
		}
		put(`device_model_stubdomain_override = 1`)
		if s.Kernel != "" {
			put(`stubdomain_kernel = "%s"`, s.Kernel)
		}
		if s.Ramdisk != "" {
			put(`stubdomain_ramdisk = "%s"`, s.Ramdisk)
		}
		put(`stubdomain_memory = %d`, memory)
		put(`stubdomain_cmdline = "%s"`, cmdline)
	}
	var disks []string
	for _, d := range c.Disks {
		spec := "format=raw,vdev=" + d.VDev
		switch {
		case d.CDROM:
			spec += ",devtype=cdrom,access=ro"
		case d.ReadOnly:
			spec += ",access=ro"
		default:
			spec += ",access=rw"
		}
		if d.File != "" {
			dev, err := g.lab.Loop(ctx, d.File, d.CDROM || d.ReadOnly)
			if err != nil {
				return "", err
			}
			g.loops = append(g.loops, dev)
			spec += ",target=" + dev
		} else {
			spec += ",target="
		}
		disks = append(disks, spec)
	}
	put(`disk = %s`, list(disks))
	put(`vif = %s`, list(c.VIFs))
	if c.PVArgs != nil {
		put(`device_model_args_pv = %s`, list(c.PVArgs))
	}
	if c.HVMArgs != nil {
		put(`device_model_args_hvm = %s`, list(c.HVMArgs))
	}
	for _, line := range c.Extra {
		put("%s", line)
	}
	return b.String(), nil
}

// list is a list in xl.cfg's syntax.
func list(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = `"` + w + `"`
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// Loop makes a loop device for a file in dom0. Unloop removes it.
func (l *Lab) Loop(ctx context.Context, file string, readOnly bool) (string, error) {
	flag := ""
	if readOnly {
		flag = "-r"
	}
	out, err := l.Run(ctx, `losetup $2 -f --show "$1"`, file, flag)
	return strings.TrimSpace(out), err
}

// Unloop removes a loop device.
func (l *Lab) Unloop(ctx context.Context, dev string) error {
	_, err := l.Run(ctx, `losetup -d "$1"`, dev)
	return err
}

// XenstoreRead reads a node from dom0.
func (l *Lab) XenstoreRead(ctx context.Context, path string) (string, error) {
	out, err := l.Run(ctx, `xenstore-read "$1"`, path)
	return strings.TrimSuffix(out, "\n"), err
}

// Uptime is dom0's.
func (l *Lab) Uptime(ctx context.Context) (time.Duration, error) {
	out, err := l.Run(ctx, `cut -d' ' -f1 /proc/uptime`)
	return uptime(strings.TrimSpace(out)), err
}

// State is the device model's state as the toolstack sees it: "running" is what it waits for.
func (g *Guest) State(ctx context.Context) (string, error) {
	return g.lab.XenstoreRead(ctx, fmt.Sprintf("/local/domain/%d/device-model/%d/state", g.StubID, g.ID))
}

// QMP runs commands over one connection through the socket that libxl uses, and returns what each returned.
func (g *Guest) QMP(ctx context.Context, commands ...string) ([]json.RawMessage, error) {
	file, err := os.CreateTemp(g.lab.Dir, "qmp-"+g.Name+"-*.log")
	if err != nil {
		return nil, err
	}
	file.Close()
	c, err := newConsole(g.Name+"'s QMP", file.Name())
	if err != nil {
		return nil, err
	}
	if err := c.run(g.lab, `exec socat STDIO "UNIX-CONNECT:/var/run/xen/qmp-libxl-$1"`, strconv.Itoa(g.ID)); err != nil {
		return nil, err
	}
	defer c.Close()
	if _, err := c.Expect(ctx, `^\{"QMP".*\n`); err != nil {
		return nil, err
	}
	var answers []json.RawMessage
	for i, cmd := range append([]string{`{"execute":"qmp_capabilities"}`}, commands...) {
		if err := c.Send(cmd + "\r\n"); err != nil {
			return nil, err
		}
		m, err := c.Expect(ctx, `^\{"(?:return|error|id)".*\n`)
		if err != nil {
			return nil, err
		}
		var a struct {
			Return json.RawMessage
			Error  *struct{ Class, Desc string }
		}
		if err := json.Unmarshal([]byte(m[0]), &a); err != nil {
			return nil, fmt.Errorf("%s: answer %q: %w", cmd, m[0], err)
		}
		if a.Error != nil {
			return nil, fmt.Errorf("%s: %s: %s", cmd, a.Error.Class, a.Error.Desc)
		}
		if i > 0 {
			answers = append(answers, a.Return)
		}
	}
	return answers, nil
}

// Tails returns the ends of the logs that tell why something about this guest went wrong.
func (g *Guest) Tails(n int) string {
	if g.starts == 0 {
		return g.Name + " was not started"
	}
	return strings.Join([]string{Tail(g.log, n), g.Stub.Tail(n), g.Serial.Tail(n)}, "\n")
}

// Destroy ends the guest as xl destroy does, and what the lab made for it.
func (g *Guest) Destroy(ctx context.Context) error {
	var errs []error
	// After a crash the xl that stayed behind for on_crash may be destroying it too: what counts is that it is gone.
	if _, err := g.lab.Run(ctx, `xl domid "$1" >/dev/null 2>&1 || exit 0; xl destroy "$1" || ! xl domid "$1" >/dev/null 2>&1`, g.Name); err != nil {
		errs = append(errs, err)
	}
	for _, dev := range g.loops {
		errs = append(errs, g.lab.Unloop(ctx, dev))
	}
	g.loops = nil
	g.Release()
	return errors.Join(errs...)
}

// Release ends what reads from the guest, and leaves the guest alone.
func (g *Guest) Release() {
	if g.events != nil {
		g.events.Kill()
		g.events = nil
	}
	if g.Serial != nil {
		g.Serial.Close()
	}
	if g.Stub != nil {
		g.Stub.Close()
	}
}

// leftScript prints, a line each, what there is in dom0 besides an idle toolstack. What ends by itself gets 10 s for it.
const leftScript = `
left() {
xl list | while read -r name id _; do case $name in Name | Domain-0) ;; *) echo "domain $name ($id)" ;; esac; done
for dir in /local/domain /libxl; do
	for id in $(xenstore-list $dir 2>/dev/null); do [ "$id" = 0 ] || echo "xenstore $dir/$id"; done
done
for kind in $(xenstore-list /local/domain/0/backend 2>/dev/null); do
	for id in $(xenstore-list /local/domain/0/backend/$kind); do echo "xenstore /local/domain/0/backend/$kind/$id"; done
done
for id in $(xenstore-list /local/domain/0/device-model 2>/dev/null); do [ "$id" = 0 ] || echo "xenstore /local/domain/0/device-model/$id"; done
for uuid in $(xenstore-list /vm 2>/dev/null); do [ "$uuid" = 00000000-0000-0000-0000-000000000000 ] || echo "xenstore /vm/$uuid"; done
losetup -a | sed 's/^/loop device /'
ps -eo pid=,args= | grep -E '^ *[0-9]+ [^ ]*(qemu-system|vchan-socket-proxy|/xl |xl )' | sed 's/^ */process /'
ls /run/xen | grep -E '^qmp-' | sed 's,^,file /run/xen/,'
ls /sys/class/net | grep -E '^vif' | sed 's/^/link /'
}
for try in {1..20}; do
	found=$(left)
	[ -n "$found" ] || exit 0
	sleep 0.5
done
echo "$found"`

// Leftovers lists what domains have left behind in dom0. It is empty when all was removed.
func (l *Lab) Leftovers(ctx context.Context) ([]string, error) {
	out, err := l.Run(ctx, leftScript)
	if err != nil {
		return nil, err
	}
	if out = strings.TrimSpace(out); out == "" {
		return nil, nil
	}
	return strings.Split(out, "\n"), nil
}
