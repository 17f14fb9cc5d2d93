// Command bench measures what a stubdomain costs: our two images against a shell script in stubinit's place and against a
// kernel that only says hello, all in one lab whose clocks count instructions.
//
// It wants the images of scripts/bench/build-images, and writes a table, the figures as JSON, the console logs that they
// come from, and a picture of two boots into a folder.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/initramfs"
	"github.com/stubinit/stubinit/internal/bootlog"
	"github.com/stubinit/stubinit/test/lab"
)

func main() {
	var o options
	flag.StringVar(&o.suite, "suite", "trixie", "Debian `suite`")
	flag.StringVar(&o.out, "o", "docs/bench", "`folder` for the results")
	flag.StringVar(&o.parts, "parts", "boot,memory,scale", "what to measure, memory is the longest; figures of other parts stay if the images' sizes are the same")
	flag.IntVar(&o.guests, "guests", 8, "how many guests the scale has")
	// With eight at once on the lab's one processor, dom0's own QEMU missed the 10 s that libxl gives it to answer query-chardev, before
	// the stubdomain's start: five of the eight failed.
	flag.IntVar(&o.creating, "creating", 4, "how many xl create run at a time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type options struct {
	suite, out, parts string
	guests, creating  int
}

// A flavour is a kernel and initrd to measure.
type flavour struct {
	name, title, dir string
	floor            bool // ends with hello
	memory           int  // stubdomain_memory, MiB, with which it surely starts
}

// flavours of a suite; the first is what the others are measured against.
func flavours(suite string) []flavour {
	bench := filepath.Join("build", "bench", suite)
	return []flavour{
		{name: "baseline", title: "shell script", dir: filepath.Join(bench, "baseline"), memory: 256},
		{name: "debian", title: "default (`make initrd`)", dir: filepath.Join("build", suite), memory: 256},
		{name: "small", title: "small (`make image`)", dir: filepath.Join("build", suite+"-small"), memory: 256},
		{name: "floor-debian", title: "floor, Debian's kernel", dir: filepath.Join(bench, "floor-debian"), floor: true, memory: 256},
		{name: "floor-small", title: "floor, small kernel", dir: filepath.Join(bench, "floor-small"), floor: true, memory: 256},
	}
}

// kernel and rootfs are the flavour's files in dom0.
func (f flavour) kernel() string { return "/root/bench/" + f.name + "/kernel" }
func (f flavour) rootfs() string { return "/root/bench/" + f.name + "/rootfs" }

const disc = "/root/bench/disc.iso"

type bench struct {
	o    options
	lab  *lab.Lab
	wall time.Time // dom0's, at its uptime's 0
}

func run(ctx context.Context, o options) (err error) {
	all := flavours(o.suite)
	payload := map[string]string{lab.GuestImage: filepath.Join(lab.Top(), "build", "guest.img")}
	results := make([]*Result, len(all))
	for i, f := range all {
		payload[f.kernel()] = filepath.Join(lab.Top(), f.dir, initramfs.KernelFile)
		payload[f.rootfs()] = filepath.Join(lab.Top(), f.dir, initramfs.ArchiveFile)
		if results[i], err = sizes(f); err != nil {
			return fmt.Errorf("%w: run make bench, which builds it", err)
		}
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil {
		return err
	}
	l, err := lab.Start(ctx, lab.Options{Suite: o.suite, Name: "bench-images", Icount: true, Payload: payload, Progress: os.Stderr})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	b := &bench{o: o, lab: l}
	if _, err := l.Run(ctx, `truncate -s 1M "$1"`, disc); err != nil {
		return err
	}
	report := &Report{Suite: o.suite, Flavours: results}
	if err := report.keep(o.out); err != nil {
		return err
	}
	for _, part := range strings.Split(o.parts, ",") {
		switch part {
		case "boot":
			err = b.boots(ctx, all, results)
		case "memory":
			err = b.memories(ctx, all, results)
		case "scale":
			report.Scale, err = b.scale(ctx, all[slices.IndexFunc(all, func(f flavour) bool { return f.name == "small" })])
		default:
			err = fmt.Errorf("-parts: %q", part)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
		if err := report.write(o.out); err != nil { // also after each part: the next ones take long
			return err
		}
	}
	fmt.Print(report.markdown())
	return nil
}

// sizes are those of the files.
func sizes(f flavour) (*Result, error) {
	r := &Result{Name: f.name, Title: f.title, Floor: f.floor}
	for name, size := range map[string]*int64{initramfs.KernelFile: &r.KernelBytes, initramfs.ArchiveFile: &r.InitrdBytes} {
		info, err := os.Stat(filepath.Join(lab.Top(), f.dir, name))
		if err != nil {
			return nil, err
		}
		*size = info.Size()
	}
	text, err := os.ReadFile(filepath.Join(lab.Top(), f.dir, initramfs.ReportFile))
	if err != nil {
		return nil, err
	}
	m := regexp.MustCompile(`unpacked (\d+)`).FindSubmatch(text)
	if m == nil {
		return nil, fmt.Errorf("%s: no unpacked size", f.dir)
	}
	r.UnpackedBytes, err = strconv.ParseInt(string(m[1]), 10, 64)
	return r, err
}

// guest is one with what every guest has: a disk, a CD, a NIC.
func guest(name string, f flavour, n, memory int) lab.GuestConfig {
	return lab.GuestConfig{
		Name:    name,
		Disks:   []lab.Disk{{VDev: "hda", File: lab.GuestImage}, {VDev: "hdc", File: disc, CDROM: true}},
		VIFs:    []string{fmt.Sprintf("mac=00:16:3e:00:00:%02x,model=e1000,bridge=xenbr0", n+1)},
		Stubdom: &lab.Stubdom{Kernel: f.kernel(), Ramdisk: f.rootfs(), Memory: memory},
	}
}

// create starts a guest and waits until it talks on its serial port. What comes back must be called at the guest's end.
func (b *bench) create(ctx context.Context, cfg lab.GuestConfig) (*lab.Guest, func() error, error) {
	g, err := b.lab.CreateGuest(ctx, cfg)
	destroy := func() error { return g.Destroy(ctx) }
	if err != nil {
		return g, destroy, err
	}
	_, err = g.Serial.Expect(ctx, `^stubinit-guest ready.*$`)
	return g, destroy, err
}

func (b *bench) boots(ctx context.Context, all []flavour, results []*Result) error {
	// The first creation finds a dom0 whose page cache is cold: it is not measured.
	_, destroy, err := b.create(ctx, guest("warm", all[1], 0, all[1].memory))
	if err := errors.Join(err, destroy()); err != nil {
		return fmt.Errorf("warming dom0: %w", err)
	}
	if b.wall, err = b.wallAtBoot(ctx); err != nil {
		return err
	}
	for i, f := range all {
		fmt.Fprintf(os.Stderr, "bench: %s boots\n", f.name)
		measure := b.boot
		if f.floor {
			measure = b.hello
		}
		if err := measure(ctx, f, results[i]); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	logs := []string{filepath.Join(b.o.out, "baseline.log"), filepath.Join(b.o.out, "small.log")}
	chart := exec.CommandContext(ctx, "go", append([]string{"run", "./cmd/stubinit-bootchart",
		"-titles", "shell script with Debian's kernel and QEMU,stubinit in the small image", "-o", filepath.Join(b.o.out, "boot.svg")}, logs...)...)
	chart.Stdout, chart.Stderr = os.Stderr, os.Stderr
	return chart.Run()
}

// wallAtBoot is dom0's wall clock at its uptime's 0. Xen gives all domains the same wall clock, and nobody sets it here.
func (b *bench) wallAtBoot(ctx context.Context) (time.Time, error) {
	// The uptime has hundredths: of ten readings, the one that was taken soonest after a hundredth began.
	out, err := b.lab.Run(ctx, `for i in 0 1 2 3 4 5 6 7 8 9; do read -r up _ </proc/uptime; date +"%s.%N $up"; done`)
	if err != nil {
		return time.Time{}, err
	}
	var first time.Time
	for line := range strings.Lines(out) {
		var s, ns int64
		var up float64
		if _, err := fmt.Sscanf(line, "%d.%d %f", &s, &ns, &up); err != nil {
			return time.Time{}, fmt.Errorf("dom0's clocks %q: %w", line, err)
		}
		if at := time.Unix(s, ns).Add(-time.Duration(up * float64(time.Second))); first.IsZero() || at.Before(first) {
			first = at
		}
	}
	return first, nil
}

func (b *bench) boot(ctx context.Context, f flavour, r *Result) error {
	g, destroy, err := b.create(ctx, guest(f.name, f, 0, f.memory))
	if err == nil {
		// The last line of the boot: it comes after "running".
		_, err = g.Stub.Expect(ctx, `resident .*qemu_faults=.*\n`)
	}
	text := g.Stub.Text()
	if err := errors.Join(err, destroy()); err != nil {
		return fmt.Errorf("%w\n%s", err, g.Tails(30))
	}
	if err := os.WriteFile(filepath.Join(b.o.out, f.name+".log"), []byte(lab.LastLines(text, 1000)+"\n"), 0o644); err != nil {
		return err
	}
	log, err := bootlog.Parse(text)
	if err != nil {
		return err
	}
	i := slices.IndexFunc(g.Stages, func(s lab.Stage) bool { return s.What == fmt.Sprintf("QEMU of domain %d answers libxl", g.ID) })
	if i < 0 {
		return fmt.Errorf("xl did not say when QEMU answered: %v", g.Stages)
	}
	r.InitSeconds = log.Init.Seconds()
	r.QEMUSeconds = log.QEMU.Seconds()
	r.RunningSeconds = log.Running.Seconds()
	if log.Started.IsZero() {
		return errors.New("the console's log has no time")
	}
	r.AnswerSeconds = b.wall.Add(g.Stages[i].At).Sub(log.Started).Seconds()
	monitor := slices.IndexFunc(log.Steps, func(s bootlog.Step) bool { return s.Name == "monitor" })
	if monitor < 0 || r.AnswerSeconds < log.Steps[monitor].End.Seconds() {
		return fmt.Errorf("QEMU answered libxl %.2f s after the kernel's start, before stubinit's step monitor: %v", r.AnswerSeconds, log.Steps)
	}
	r.CreateSeconds = g.Created.Seconds()
	r.UsedMiB = f.memory - log.AvailableMiB
	r.AgentKiB, r.QEMUKiB, r.QEMUFaults = log.AgentKiB, log.QEMUKiB, log.QEMUFaults
	return nil
}

// hello starts what only says hello, and gives up on it then: xl would wait for its 30 s.
func (b *bench) hello(ctx context.Context, f flavour, r *Result) error {
	// Its console is there when xl has begun.
	began := make(chan struct{})
	var once sync.Once
	cfg := guest(f.name, f, 0, f.memory)
	cfg.Progress = func(lab.Stage) { once.Do(func() { close(began) }) }
	g, err := b.lab.NewGuest(ctx, cfg)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() { done <- g.Create(ctx) }()
	select {
	case <-began:
	case err := <-done:
		return fmt.Errorf("xl create ended: %w", err)
	}
	m, err := g.Stub.Expect(ctx, `^hello (\S+) .*$`)
	if err == nil {
		r.InitSeconds, err = strconv.ParseFloat(m[1], 64)
	}
	if created := <-done; created == nil {
		err = errors.Join(err, errors.New("xl create succeeded without a device model"))
	}
	return errors.Join(err, g.Destroy(ctx))
}

// memories finds the least stubdomain_memory of each flavour.
func (b *bench) memories(ctx context.Context, all []flavour, results []*Result) (err error) {
	for i, f := range all {
		if f.floor {
			continue
		}
		if results[i].LeastMiB, err = b.least(ctx, f); err != nil {
			return fmt.Errorf("%s: %w", f.name, err)
		}
	}
	return nil
}

// least finds the least stubdomain_memory that starts, in MiB: in steps that grow, from what mkinitramfs printed, until
// one has failed and one has started, and then by bisection.
func (b *bench) least(ctx context.Context, f flavour) (int, error) {
	mib, _, err := initramfs.ReportedLeast(filepath.Join(lab.Top(), f.dir))
	if err != nil {
		return 0, err
	}
	fails, starts, step := 0, 0, 4
	for {
		ok, err := b.starts(ctx, f, mib)
		if err != nil {
			return 0, err
		}
		fmt.Fprintf(os.Stderr, "bench: %s with %d MiB: %v\n", f.name, mib, ok)
		if ok {
			starts = mib
		} else if fails = mib; mib > f.memory {
			return 0, fmt.Errorf("does not start with %d MiB", mib)
		}
		switch {
		case fails == 0:
			mib, step = starts-step, 2*step
		case starts == 0:
			mib, step = fails+step, 2*step
		case starts-fails > 1:
			mib = (starts + fails) / 2
		default:
			return starts, nil
		}
	}
}

func (b *bench) starts(ctx context.Context, f flavour, mib int) (bool, error) {
	limit, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	g, destroy, err := b.create(limit, guest("least", f, 0, mib))
	ok := err == nil && !strings.Contains(g.Stub.Text(), "Out of memory")
	if err := destroy(); err != nil {
		return false, err
	}
	return ok, ctx.Err()
}

// scale starts one guest, and then several, which are all there at once.
func (b *bench) scale(ctx context.Context, f flavour) (*Scale, error) {
	mib, _, err := initramfs.ReportedLeast(filepath.Join(lab.Top(), f.dir))
	if err != nil {
		return nil, err
	}
	s := &Scale{Guests: b.o.guests, Creating: b.o.creating, MemoryMiB: mib}
	one, err := b.together(ctx, f, 1, s)
	if err != nil {
		return nil, err
	}
	s.OneSeconds = one.Seconds()
	many, err := b.together(ctx, f, s.Guests, s)
	s.AllSeconds = many.Seconds()
	return s, err
}

// together starts n guests, some at a time, and gives the time, by dom0's clock, until the last one's xl create has ended.
func (b *bench) together(ctx context.Context, f flavour, n int, s *Scale) (took time.Duration, err error) {
	guests := make([]*lab.Guest, n)
	defer func() {
		for _, g := range guests {
			if g != nil {
				err = errors.Join(err, g.Destroy(ctx))
			}
		}
	}()
	for i := range guests {
		cfg := guest(fmt.Sprintf("scale%d", i), f, i, s.MemoryMiB)
		cfg.Disks[0].File = fmt.Sprintf("/root/bench/disk%d", i)
		if _, err := b.lab.Run(ctx, `cp "$1" "$2"`, lab.GuestImage, cfg.Disks[0].File); err != nil {
			return 0, err
		}
		if guests[i], err = b.lab.NewGuest(ctx, cfg); err != nil {
			return 0, err
		}
	}
	errs := make([]error, n)
	turns := make(chan struct{}, s.Creating)
	var wg sync.WaitGroup
	for i, g := range guests {
		wg.Go(func() {
			turns <- struct{}{}
			errs[i] = g.Create(ctx)
			<-turns
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	var first, last time.Duration = 1<<63 - 1, 0
	for _, g := range guests {
		if _, err := g.Serial.Expect(ctx, `^stubinit-guest ready.*$`); err != nil {
			return 0, err
		}
		for _, stage := range g.Stages {
			switch stage.What {
			case "xl create began":
				first = min(first, stage.At)
			case "xl create ended":
				last = max(last, stage.At)
			}
		}
		out, err := b.lab.Run(ctx, `xl list "$1-dm"`, g.Name)
		if err != nil {
			return 0, err
		}
		m := regexp.MustCompile(`(?m)^\S+-dm +\d+ +(\d+) `).FindStringSubmatch(out) // Name, ID, Mem
		if m == nil {
			return 0, fmt.Errorf("xl list: %q", out)
		}
		mib, err := strconv.Atoi(m[1])
		if err != nil {
			return 0, err
		}
		s.DomainMiB = max(s.DomainMiB, mib)
		kib, err := b.dom0Memory(ctx, g)
		if err != nil {
			return 0, err
		}
		s.Dom0KiB = max(s.Dom0KiB, kib)
	}
	return last - first, nil
}

// dom0Memory is what a guest's stubdomain costs dom0, in KiB (proportional set size): the QEMU that serves its consoles, and the proxy
// to its QMP endpoint.
func (b *bench) dom0Memory(ctx context.Context, g *lab.Guest) (int, error) {
	out, err := b.lab.Run(ctx, "ps -eo pid=,args=")
	if err != nil {
		return 0, err
	}
	sum, found := 0, 0
	for line := range strings.Lines(out) {
		pid, args, _ := strings.Cut(strings.TrimSpace(line), " ")
		console := strings.Contains(args, "qemu-system") && strings.Contains(args, g.Name+"-dm")
		proxy := strings.Contains(args, "vchan-socket-proxy") && strings.Contains(args, fmt.Sprintf("/%d/", g.StubID))
		if !console && !proxy {
			continue
		}
		found++
		rollup, err := b.lab.Run(ctx, `cat "/proc/$1/smaps_rollup"`, pid)
		if err != nil {
			return 0, err
		}
		m := regexp.MustCompile(`(?m)^Pss: +(\d+) kB$`).FindStringSubmatch(rollup)
		if m == nil {
			return 0, fmt.Errorf("no Pss of process %s: %q", pid, rollup)
		}
		kib, err := strconv.Atoi(m[1])
		if err != nil {
			return 0, err
		}
		sum += kib
	}
	if found != 2 {
		return 0, fmt.Errorf("%s has %d processes in dom0, want its consoles' QEMU and the QMP proxy:\n%s", g.Name, found, out)
	}
	return sum, nil
}
