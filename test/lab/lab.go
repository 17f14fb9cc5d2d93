// Package lab boots Debian's Xen with a dom0 in an emulated machine, and runs commands and guests in it.
//
// No patched program takes part: hypervisor, toolstack, QEMU and kernels are Debian's own packages.
package lab

import (
	"archive/tar"
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/u-root/u-root/pkg/cpio"
	"golang.org/x/sys/unix"
)

// dom0Files go into every dom0.
//
//go:embed dom0
var dom0Files embed.FS

// Options say what to boot. The zero value but for Suite is a lab for quick runs.
type Options struct {
	Suite string
	// Name is the run's: its logs are in build/lab/SUITE/NAME, replacing those of the run before. Default "run".
	Name string
	// Icount makes all clocks in the lab count instructions: times are the same in each run, and limits of the toolstack do
	// not depend on how busy this machine is. It takes about twice as long.
	Icount bool
	// Memory of the machine and of dom0 in MiB. Defaults 6144 and 2048.
	Memory, Dom0Memory int
	// QEMUArgs are added to those of the outer QEMU.
	QEMUArgs []string
	// Payload maps files' paths in dom0 to files here. /run and /tmp are hidden by mounts.
	Payload map[string]string
	// Progress gets lines that say what goes on. Default: none.
	Progress io.Writer
}

// A Lab is a running machine with Xen and dom0. Its methods may be called concurrently.
type Lab struct {
	Suite Suite
	Dir   string // the run's logs
	// Ready is how long it took from the start of the machine until dom0 took commands.
	Ready time.Duration

	opts   Options
	conn   *conn
	places places
	stop   context.CancelFunc // kills QEMU
	gone   chan struct{}      // closed when QEMU ended; exit is set then
	exit   error
}

// Start boots a lab. It builds what is missing first, and waits while another run uses this checkout's lab.
// The lab ends with ctx or at Close, whichever is first.
func Start(ctx context.Context, o Options) (*Lab, error) {
	suite, err := FindSuite(o.Suite)
	if err != nil {
		return nil, err
	}
	if o.Name == "" {
		o.Name = "run"
	}
	if o.Memory == 0 {
		o.Memory = 6144
	}
	if o.Dom0Memory == 0 {
		o.Dom0Memory = 2048
	}
	if o.Progress == nil {
		o.Progress = io.Discard
	}
	l := &Lab{Suite: suite, Dir: filepath.Join(suiteDir(suite), o.Name), opts: o, gone: make(chan struct{})}
	if err := os.RemoveAll(l.Dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(l.Dir, 0o755); err != nil {
		return nil, err
	}
	if l.places, err = takePlaces(ctx, o.Icount, o.Progress); err != nil {
		return nil, err
	}
	if err := l.boot(ctx); err != nil {
		l.Close()
		return nil, fmt.Errorf("lab %s: %w\n%s", suite.Name, err, Tail(filepath.Join(l.Dir, "serial.log"), 30))
	}
	return l, nil
}

func (l *Lab) boot(ctx context.Context) error {
	img, err := buildImage(ctx, l.Suite, l.opts.Progress)
	if err != nil {
		return err
	}
	initrd := filepath.Join(l.Dir, "initrd.cpio")
	if err := l.writeInitrd(ctx, initrd, img.initramfs); err != nil {
		return err
	}
	defer os.Remove(initrd)
	began := time.Now()
	limit := 3 * time.Minute
	if l.opts.Icount {
		limit = 6 * time.Minute
	}
	if err := l.startQEMU(ctx, img, initrd); err != nil {
		return err
	}
	fmt.Fprintf(l.opts.Progress, "lab: Xen %s and dom0 boot (log: %s)\n", l.Suite.Xen, filepath.Join(l.Dir, "serial.log"))
	select {
	case <-l.conn.hello:
	case <-l.gone:
		return fmt.Errorf("QEMU ended during the boot: %w", l.exit)
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(limit):
		return fmt.Errorf("dom0 takes no commands after %s", limit)
	}
	l.Ready = time.Since(began)
	fmt.Fprintf(l.opts.Progress, "lab: dom0 takes commands after %.1f s\n", l.Ready.Seconds())
	return nil
}

// writeInitrd puts the payload's archive behind the suite's: the kernel unpacks one after the other.
func (l *Lab) writeInitrd(ctx context.Context, dst, base string) error {
	agent := filepath.Join(Top(), "build", "lab", "dom0agent")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", agent, "./test/lab/dom0agent")
	build.Dir = Top()
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("go build dom0agent: %w\n%s", err, out)
	}
	var records []cpio.Record
	dirs := map[string]bool{}
	add := func(name string, data []byte, mode uint64) {
		name = canonical(name)
		for i, c := range name {
			if c == '/' && !dirs[name[:i]] {
				dirs[name[:i]] = true
				records = append(records, cpio.Directory(name[:i], 0o755))
			}
		}
		records = append(records, cpio.StaticFile(name, string(data), mode))
	}
	for name, place := range map[string]string{
		"init": "init", "block": "etc/xen/scripts/block", "vif-bridge": "etc/xen/scripts/vif-bridge",
	} {
		data, err := dom0Files.ReadFile("dom0/" + name)
		if err != nil {
			return err
		}
		add(place, data, 0o755)
	}
	add("root/.labshell", []byte(`[ "$1" = 0 ] || stty rows "$1" cols "$2"
cd /root
export PS1='dom0:\w# '
exec bash --norc -i
`), 0o644)
	add("etc/lab-modules", []byte(strings.Join(bootModules, "\n")+"\n"), 0o644)
	payload := maps.Clone(l.opts.Payload)
	if payload == nil {
		payload = map[string]string{}
	}
	payload["/usr/local/sbin/dom0agent"] = agent
	for _, name := range slices.Sorted(maps.Keys(payload)) {
		data, err := os.ReadFile(payload[name])
		if err != nil {
			return err
		}
		info, err := os.Stat(payload[name])
		if err != nil {
			return err
		}
		add(name, data, uint64(info.Mode().Perm()))
	}

	out, err := os.Create(dst)
	if err != nil {
		return err
	}
	defer out.Close()
	in, err := os.Open(base)
	if err != nil {
		return err
	}
	defer in.Close()
	n, err := io.Copy(out, in)
	if err != nil {
		return err
	}
	if _, err := out.Write(make([]byte, -n&511)); err != nil {
		return err
	}
	w := cpio.Newc.Writer(out)
	if err := cpio.WriteRecords(w, records); err != nil {
		return fmt.Errorf("%s: %w", dst, err)
	}
	if err := cpio.WriteTrailer(w); err != nil {
		return fmt.Errorf("%s: %w", dst, err)
	}
	return out.Close()
}

// canonical is a path without the links of the merged /usr, which a folder in the archive would replace.
func canonical(name string) string {
	name = strings.TrimPrefix(path.Clean("/"+name), "/")
	for _, dir := range []string{"bin/", "sbin/", "lib/", "lib64/"} {
		if strings.HasPrefix(name, dir) {
			return "usr/" + name
		}
	}
	return name
}

func (l *Lab) startQEMU(ctx context.Context, img image, initrd string) error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "agent"), os.NewFile(uintptr(fds[1]), "agent")
	defer theirs.Close()
	c, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return err
	}
	l.conn = newConn(c)

	accel, smp := []string{"-accel", "tcg,thread=multi"}, 2
	if l.opts.Icount {
		accel, smp = []string{"-icount", "shift=1,sleep=off", "-accel", "tcg,thread=single"}, 1
	}
	mib := l.opts.Dom0Memory
	args := slices.Concat([]string{
		"-M", "q35", "-cpu", "qemu64,+svm,+npt,+rdrand", "-smp", fmt.Sprint(smp), "-m", fmt.Sprint(l.opts.Memory),
		"-nodefaults", "-display", "none", "-no-reboot", "-net", "none",
		"-kernel", img.xen,
		// bootscrub=0: QEMU's memory is zero; to write all of it costs this machine 4 GiB and the idle time of the first minute.
		"-append", fmt.Sprintf("dom0_mem=%dM,max:%dM dom0_max_vcpus=%d com1=115200,8n1 console=com1 noreboot=1 sched=credit bootscrub=0", mib, mib, smp),
		"-initrd", fmt.Sprintf("%s console=hvc0 rdinit=/init quiet,%s", img.kernel, initrd),
		"-serial", "file:" + filepath.Join(l.Dir, "serial.log"),
		"-device", "virtio-serial-pci", "-chardev", "socket,id=agent,fd=3",
		"-device", "virtserialport,chardev=agent,name=stubinit.lab",
	}, accel, l.opts.QEMUArgs)
	qemuLog, err := os.Create(filepath.Join(l.Dir, "qemu.log"))
	if err != nil {
		return err
	}
	ctx, l.stop = context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", args...)
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stdout, cmd.Stderr = qemuLog, qemuLog
	// QEMU must not outlive a test that is killed. The signal comes when the starting thread ends, so that is kept.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer qemuLog.Close()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		if l.exit = cmd.Wait(); l.exit == nil {
			l.exit = errors.New("exit status 0")
		}
		close(l.gone)
	}()
	if err := <-started; err != nil {
		close(l.gone)
		return fmt.Errorf("the outer QEMU (install qemu-system-x86 if it is missing): %w", err)
	}
	return nil
}

// Err says whether the machine has ended, and how.
func (l *Lab) Err() error {
	select {
	case <-l.gone:
		return fmt.Errorf("the lab's machine ended: %w", l.exit)
	default:
		return nil
	}
}

// Begin starts a script in dom0.
func (l *Lab) Begin(c Command) (*Process, error) { return l.conn.start(c) }

// Run runs a bash script in dom0 and returns its standard output. args are $1, $2 …
// Code other than 0 is an *ExitError that holds its standard error output. When ctx ends the script is killed.
func (l *Lab) Run(ctx context.Context, script string, args ...string) (string, error) {
	var stdout, stderr bytes.Buffer
	p, err := l.Begin(Command{Script: script, Args: args, Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		return "", err
	}
	err = p.Wait(ctx)
	var exit *ExitError
	if errors.As(err, &exit) {
		exit.Stderr = stderr.String()
	}
	return stdout.String(), err
}

// Put writes data into a file in dom0, with folders as needed.
func (l *Lab) Put(ctx context.Context, name string, mode fs.FileMode, data io.Reader) error {
	var stderr bytes.Buffer
	p, err := l.Begin(Command{
		Script: `mkdir -p "$(dirname "$1")" && cat >"$1" && chmod "$2" "$1"`,
		Args:   []string{name, fmt.Sprintf("%o", mode.Perm())},
		Stdin:  data, Stderr: &stderr,
	})
	if err == nil {
		err = p.Wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("put %s: %w %s", name, err, bytes.TrimSpace(stderr.Bytes()))
	}
	return nil
}

// Get returns the contents of a file in dom0.
func (l *Lab) Get(ctx context.Context, name string) ([]byte, error) {
	out, err := l.Run(ctx, `cat "$1"`, name)
	return []byte(out), err
}

// Interact connects a terminal, or whatever stdin and stdout are, with a shell in dom0 until the shell ends.
func (l *Lab) Interact(ctx context.Context, stdin io.Reader, stdout io.Writer, rows, columns int) error {
	p, err := l.Begin(Command{
		Script: `exec socat STDIO 'EXEC:bash /root/.labshell '"$1 $2"',pty,stderr,setsid,ctty,sane'`,
		Args:   []string{fmt.Sprint(rows), fmt.Sprint(columns)},
		Stdin:  stdin, Stdout: stdout, Stderr: stdout,
	})
	if err != nil {
		return err
	}
	return p.Wait(ctx)
}

// Close fetches dom0's logs and ends the machine. It may be called more than once.
func (l *Lab) Close() error {
	var err error
	if l.conn != nil && l.Err() == nil && l.ready() {
		err = l.collect()
	}
	if l.stop != nil {
		l.stop()
		<-l.gone
		l.stop = nil
	}
	if l.conn != nil {
		l.conn.close()
	}
	l.places.Close()
	return err
}

func (l *Lab) ready() bool {
	select {
	case <-l.conn.hello:
		return true
	default:
		return false
	}
}

// collect copies dom0's logs into l.Dir/dom0.
func (l *Lab) collect() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var stderr bytes.Buffer
	var archive bytes.Buffer
	p, err := l.Begin(Command{
		Script: `mkdir -p /tmp/state && cd /tmp/state && { dmesg >dmesg; xl list -l >xl-list; xl dmesg >xl-dmesg; xenstore-ls -fp >xenstore; ps axww >ps; losetup -a >losetup; } 2>errors
busybox tar -c -C / var/log/xen tmp/state`,
		Stdout: &archive, Stderr: &stderr,
	})
	if err != nil {
		return err
	}
	if err := p.Wait(ctx); err != nil {
		return fmt.Errorf("dom0's logs: %w %s", err, stderr.Bytes())
	}
	for r := tar.NewReader(&archive); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("dom0's logs: %w", err)
		}
		if h.Typeflag != tar.TypeReg || !filepath.IsLocal(h.Name) {
			continue
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return fmt.Errorf("dom0's logs: %s: %w", h.Name, err)
		}
		name := filepath.Join(l.Dir, "dom0", h.Name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, data, 0o644); err != nil {
			return err
		}
	}
}

// Tail returns the last n lines of a file here, with its name above, for messages.
func Tail(name string, n int) string {
	data, err := os.ReadFile(name)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("--- %s (last %d lines)\n%s", name, n, LastLines(string(data), n))
}

var control = regexp.MustCompile("\x1b\\[[0-9;?]*[A-Za-z]|\r")

// LastLines returns the last n lines of a text, without what would disturb a terminal.
func LastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(control.ReplaceAllString(text, ""), "\n"), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, "\n")
}
