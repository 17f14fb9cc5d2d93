package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/console"
	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/modules"
	"github.com/stubinit/stubinit/internal/qemu"
	"github.com/stubinit/stubinit/internal/qmp"
	"github.com/stubinit/stubinit/internal/uevent"
	"github.com/stubinit/stubinit/internal/xen/consring"
	"github.com/stubinit/stubinit/internal/xen/frame"
	"github.com/stubinit/stubinit/internal/xen/vchan"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/media"
	"github.com/stubinit/stubinit/netup"
	"github.com/stubinit/stubinit/qmpbridge"
)

// A step is one part of the boot. Its name stands in the log and in
// xenstore's phase node: README.md, "Steps", explains each.
type step struct {
	name string
	run  func(*agent, context.Context) error
}

// sequence is the boot, in order. Nothing else starts anything.
var sequence = []step{
	{"mounts", (*agent).mountsStep},
	{"console", (*agent).consoleStep},
	{"modules", (*agent).modulesStep},
	{"config", (*agent).configStep},
	{"network", (*agent).networkStep},
	{"devices", (*agent).devicesStep},
	{"incoming", (*agent).incomingStep},
	{"endpoint", (*agent).endpointStep},
	{"qemu", (*agent).qemuStep},
	{"monitor", (*agent).monitorStep},
	{"bridge", (*agent).bridgeStep},
	{"running", (*agent).runningStep},
}

// Limits of the boot's waits. libxl gives the start 30 s, kernel included.
const (
	deviceLimit   = 15 * time.Second
	monitorLimit  = 60 * time.Second // TCG in a nested lab; QEMU's death ends it at once
	runningLimit  = 120 * time.Second
	xenstoreLimit = 10 * time.Second
)

// incomingPipe is how much of a state may wait for QEMU.
const incomingPipe = 1 << 20

// Where things are in the image and in /run.
const (
	bridgeSocket = "/run/qmp-bridge"
	agentSocket  = "/run/qmp-agent"
)

// An agent is the running stubinit. Each step fills in the fields below its name;
// later steps only read them.
type agent struct {
	params   params
	terminal lateTerminal
	console  *console.Log
	level    *slog.LevelVar
	log      *slog.Logger
	step     atomic.Value // string: the step that runs, or ran last
	failed   chan error   // a service that should go on for ever has ended

	// console
	xs  *xenstore.Client
	hvc *console.HVC
	// modules
	ring *frame.Frame // console 0's; nil if it cannot be seen
	// config
	cfg *config
	// network
	nics     []netup.NIC
	net      *netup.Network
	announce *announcer // nil if nothing is restored, or without NICs
	// devices
	media *media.Keeper
	discs []media.Set
	// incoming
	incoming *os.File // QEMU's end of the pipe; nil if nothing is restored
	received func()   // ends what fills it
	// endpoint
	poller   *fdio.Poller // of the toolstack's sessions, and of theirs to QEMU
	endpoint net.Listener
	// qemu
	reaper *qemu.Reaper
	qemu   *qemu.Process
	tail   qemu.Tail
	held   atomic.Bool   // the limit held back QEMU's last lines
	output chan struct{} // closed when the reader of QEMU's output has ended
	// monitor
	monitor *qmp.Monitor
	state   *stateSaver
	stopped atomic.Bool                 // QEMU's CPUs: the guest is suspended for a save, or an I/O error has stopped it
	last    atomic.Pointer[lastMonitor] // who answers for a QEMU that has died
}

// uptime is the time since the kernel's start, the clock of its log and ours.
func uptime() time.Duration {
	var ts unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts)
	return time.Duration(ts.Nano())
}

// A lateTerminal has no room until there is a console.
type lateTerminal struct{ hvc atomic.Pointer[console.HVC] }

func (l *lateTerminal) Room() int {
	if h := l.hvc.Load(); h != nil {
		return h.Room()
	}
	return 0
}

func (l *lateTerminal) Write(p []byte) (int, error) { return l.hvc.Load().Write(p) }

func newAgent() *agent {
	a := &agent{params: defaultParams(), failed: make(chan error, 8), level: new(slog.LevelVar)}
	a.step.Store("start")
	a.console = console.NewLog(&a.terminal)
	a.log = slog.New(console.NewHandler(a.console, a.level, uptime))
	return a
}

// runStep runs one step and logs how long it took.
func (a *agent) runStep(ctx context.Context, s step) (err error) {
	a.step.Store(s.name)
	a.publishPhase(ctx, s.name)
	start := time.Now()
	if err := s.run(a, ctx); err != nil {
		return err
	}
	a.log.Info("step done", "step", s.name, "took", time.Since(start))
	return nil
}

// service runs something that should go on for as long as QEMU does. Its end is logged, by a panic too, which would else be PID 1's and so the
// kernel's; the guest goes on without it.
func (a *agent) service(ctx context.Context, name string, run func(context.Context) error) {
	go func() {
		err := withoutPanic(func() error { return run(ctx) })
		if ctx.Err() == nil {
			a.failed <- fmt.Errorf("%s: %w", name, err)
		}
	}()
}

// mountsStep mounts what everything else needs and reads the kernel command line.
func (a *agent) mountsStep(context.Context) error {
	if err := mountAll(); err != nil {
		return err
	}
	if err := setSysctls(); err != nil {
		return err
	}
	text, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	var warnings []string
	a.params, warnings = parseCmdline(string(text))
	a.level.Set(a.params.log)
	a.log.Info("stubinit", "version", version, "time", time.Now().UTC().Format(time.RFC3339Nano)) // dom0's logs go by it
	for _, w := range warnings {
		a.log.Warn(w)
	}
	return nil
}

// consoleStep opens the log. QEMU from 8.2 on, as the backend of console 0,
// waits for a frontend state that the kernel never writes for this console;
// the node is ours, and 4 (Connected) makes the backend connect.
func (a *agent) consoleStep(ctx context.Context) error {
	hvc, err := console.OpenHVC("/dev/hvc0")
	if err != nil {
		return hint(err, "the kernel needs CONFIG_HVC_XEN")
	}
	a.hvc = hvc
	a.terminal.hvc.Store(hvc)
	if a.xs, err = xenstore.Open(); err != nil {
		return hint(err, "is this a Xen domain, and has its kernel CONFIG_XEN_XENBUS_FRONTEND?")
	}
	state, err := a.xs.Read(ctx, "console/state")
	switch {
	case err != nil:
		a.log.Debug("console 0 has no state of its own", "err", err) // a toolstack before 4.17's QEMU 8.2: nothing to do
	case state == "1" && a.params.consoleState:
		if err := a.xs.Write(ctx, "console/state", "4"); err != nil {
			a.log.Debug("console 0 keeps its state", "err", err)
		}
	}
	a.service(ctx, "console 0", a.followConsole)
	return nil
}

// followConsole tells the log whether dom0 reads console 0.
func (a *agent) followConsole(ctx context.Context) error {
	kind, err := a.xs.Read(ctx, "console/type")
	if err != nil || kind == "xenconsoled" { // which reads at all times, and keeps no state
		a.hvc.SetConnected(true)
		a.console.Kick()
		<-ctx.Done()
		return ctx.Err()
	}
	backend, err := a.xs.ReadString(ctx, "console/backend")
	if err != nil {
		return err
	}
	_, err = a.xs.WaitFor(ctx, backend+"/state", func(state string, exists bool) bool {
		a.hvc.SetConnected(exists && state == "4")
		a.console.Kick()
		return false
	})
	return err
}

// modulesStep loads the kernel's modules and checks that what QEMU needs is there.
func (a *agent) modulesStep(ctx context.Context) error {
	if err := checkUnpacked(""); err != nil {
		return err
	}
	if err := modules.Load(a.log); err != nil {
		return hint(err, "kernel and initrd must come from one mkinitramfs run")
	}
	if err := checkXenDevices(""); err != nil {
		return err
	}
	if err := checkUnrestricted(); err != nil {
		return err
	}
	// From here on the log can see how full console 0's ring is.
	if err := a.watchRing(ctx); err != nil {
		a.log.Debug("console 0's ring cannot be seen; the log goes by its backend's state", "err", err)
	}
	return nil
}

// watchRing gives the log a look at console 0's ring.
func (a *agent) watchRing(ctx context.Context) error {
	ref, err := a.xs.ReadString(ctx, "console/ring-ref") // for console 0 this is the frame's number
	if err != nil {
		return err
	}
	mfn, err := strconv.ParseUint(ref, 10, 64)
	if err != nil {
		return fmt.Errorf("xenstore console/ring-ref: %q is not a frame number", ref)
	}
	f, err := frame.Map(mfn)
	if err != nil {
		return err
	}
	a.ring = f
	ring := consring.New(f, nil)
	a.hvc.SetFree(ring.Free)
	a.console.Kick()
	return nil
}

// configStep reads what the toolstack wants.
func (a *agent) configStep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, xenstoreLimit)
	defer cancel()
	cfg, err := readConfig(ctx, a.xs)
	if err != nil {
		return err
	}
	a.cfg = cfg
	a.log.Info("config", "target", cfg.target, "args", len(cfg.dmArgv), "vifs", len(cfg.vifs), "vbds", len(cfg.vbds),
		"consoles", len(cfg.consoles), "restore", qemu.IsRestore(cfg.dmArgv))
	for i, arg := range cfg.dmArgv {
		a.log.Debug("dm-argv", "n", i+1, "arg", arg)
	}
	a.publish(ctx, "version", version)
	return checkAbsent(qemu.AbsentPath, cfg.dmArgv)
}

// networkStep makes bridges and taps, which QEMU opens; the vifs join when their backends connect.
func (a *agent) networkStep(ctx context.Context) error {
	var err error
	if a.nics, err = netup.Plan(a.cfg.vifs, a.cfg.dmArgv); err != nil {
		return err
	}
	opts := netup.Options{Log: a.log, Store: a.xs}
	if qemu.IsRestore(a.cfg.dmArgv) && len(a.nics) > 0 {
		a.announce = newAnnouncer(a.log, len(a.nics))
		opts.Up = a.announce.linkUp
	}
	if a.net, err = netup.New(opts); err != nil {
		return err
	}
	if err := a.net.Setup(ctx, a.nics); err != nil {
		return err
	}
	if len(a.nics) > 0 {
		a.service(ctx, "network", a.net.Run)
	}
	return nil
}

// devicesStep waits for the disks and consoles that QEMU's arguments name, and
// opens the removable disks that are there.
func (a *agent) devicesStep(ctx context.Context) error {
	if err := a.waitDevices(ctx, neededDevices(a.cfg.dmArgv)); err != nil {
		return err
	}
	events, err := uevent.Listen()
	if err != nil {
		return err
	}
	a.media = &media.Keeper{Store: a.xs, Events: events, Log: a.log, Dev: "/dev", Sys: "/sys"}
	a.discs, err = a.media.Initial(ctx)
	return err
}

// incomingStep begins to receive the state that QEMU restores from.
func (a *agent) incomingStep(ctx context.Context) error {
	if !qemu.IsRestore(a.cfg.dmArgv) {
		return nil
	}
	soon, cancel := context.WithTimeout(ctx, deviceLimit)
	defer cancel()
	switch err := consring.Wait(soon, a.xs, restoreConsole); {
	case err == nil:
	case soon.Err() != nil && ctx.Err() == nil:
		return hint(fmt.Errorf("nobody serves console %d after %v%s", restoreConsole, deviceLimit, a.backendState("/dev/hvc2")),
			"the log of dom0's QEMU is beside this one")
	default:
		return hint(fmt.Errorf("wait for console %d: %w", restoreConsole, err), "libxl makes the console's backend: run xl -vvv restore")
	}
	ring, err := consring.Open(ctx, a.xs, restoreConsole, toolstackDomain)
	if err != nil {
		return err
	}
	r, w, err := os.Pipe()
	if err != nil {
		ring.Close()
		return err
	}
	// What dom0 has ready comes in while QEMU starts.
	if err := setPipeSize(w, incomingPipe); err != nil {
		a.log.Debug("the pipe for the state keeps its size", "err", err)
	}
	a.incoming = r
	ctx, cancel = context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		a.receive(ctx, ring, w, incomingSilence)
	}()
	a.received = func() {
		cancel()
		<-done
	}
	return nil
}

func setPipeSize(pipe *os.File, bytes int) error {
	conn, err := pipe.SyscallConn() // not Fd, which would make it block
	if err != nil {
		return err
	}
	var failed error
	err = conn.Control(func(fd uintptr) { _, failed = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, bytes) })
	return errors.Join(err, failed)
}

// toolstackDomain is the domain that libxl runs in.
const toolstackDomain = 0

// endpointStep publishes the QMP endpoint. It is there, and lets a client wait, before QEMU is.
func (a *agent) endpointStep(ctx context.Context) error {
	var err error
	if a.poller, err = fdio.NewPoller(); err != nil {
		return err
	}
	a.endpoint, err = vchan.Listen(ctx, vchan.Config{
		Client:  toolstackDomain,
		Path:    a.cfg.devicePath() + "/qmp-vchan",
		Store:   a.xs,
		Poller:  a.poller,
		Options: vchan.Options{Marker: true, Log: a.log},
	})
	return err
}

// qemuStep starts QEMU. Its monitors are sockets that we listen on and QEMU
// inherits: a connection is there at once, and ends when QEMU does.
func (a *agent) qemuStep(context.Context) error {
	binary, err := findQEMU("")
	if err != nil {
		return err
	}
	features, err := qemu.LoadFeatures(qemu.FeaturesPath)
	if err != nil {
		return err
	}
	var files []*os.File // ours until QEMU has started
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	bridge, err := listenUnix(bridgeSocket)
	if err != nil {
		return err
	}
	files = append(files, bridge)
	agent, err := listenUnix(agentSocket)
	if err != nil {
		return err
	}
	files = append(files, agent)
	if a.incoming != nil {
		files = append(files, a.incoming)
	}
	var sets []qemu.FDSet
	for i, d := range a.discs {
		sets = append(sets, qemu.FDSet{Set: stateSet + 1 + i, Opaque: d.Opaque, File: d.File})
		files = append(files, d.File)
	}
	extra := features.Args()
	if a.announce != nil {
		extra = append(extra, announceArgs...)
	}
	cmd, err := qemu.NewCommand(qemu.Spec{
		Binary: binary, Args: a.cfg.dmArgv, Incoming: a.incoming,
		Bridge: bridge, Agent: agent, FDSets: sets, Extra: extra,
	})
	if err != nil {
		return err
	}
	out, err := a.openOutput()
	if err != nil {
		return err
	}
	files = append(files, out)
	// What the kernel starts by itself, with all rights, it looks for here (modprobe, request-key): QEMU shall not put it there.
	if err := readOnlyRoot(); err != nil {
		return err
	}
	a.reaper = qemu.NewReaper(nil)
	if a.qemu, err = a.reaper.Start(cmd, qemu.Stdio{Out: out, Err: out}); err != nil {
		return err
	}
	if a.params.shell {
		a.startShell()
	}
	if err := a.qemu.Unconfined(); err != nil {
		a.log.Warn("QEMU has more of root's rights than it needs", "err", err)
	}
	a.log.Info("QEMU started", "pid", a.qemu.PID(), "path", binary, "version", features.Version)
	// When memory runs out the kernel shall take QEMU, not PID 1.
	if err := a.qemu.SetOOMScoreAdj(1000); err != nil && !errors.Is(err, os.ErrProcessDone) {
		a.log.Warn("QEMU is not the OOM killer's first choice", "err", err)
	}
	return nil
}

// openOutput makes the pipe for QEMU's stdout and stderr and starts its reader:
// every line goes to the log, under the limit, and the last ones are kept for the report of QEMU's death.
func (a *agent) openOutput() (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	log := console.NewOutput(a.console, "qemu", uptime, a.params.qemuLimit)
	a.output = make(chan struct{})
	go func() {
		defer close(a.output)
		defer r.Close()
		_, _ = io.Copy(io.MultiWriter(log, &a.tail), r) // ends with QEMU, and with what QEMU has started
		a.held.Store(log.Held())
		_ = log.Close()
	}()
	return w, nil
}

// listenUnix listens on path and gives the descriptor, for QEMU alone.
func listenUnix(path string) (*os.File, error) {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	ln.SetUnlinkOnClose(false)
	defer ln.Close()
	return ln.File()
}

func dial(ctx context.Context, path string) (net.Conn, error) {
	var d net.Dialer
	return d.DialUnix(ctx, "unix", nil, &net.UnixAddr{Name: path, Net: "unix"}) // DialContext would bring a resolver
}

// findQEMU looks where distributions and our small image have it.
func findQEMU(root string) (string, error) {
	paths := []string{"/usr/bin/qemu-system-i386", "/usr/libexec/xen-qemu-system-i386", "/usr/lib/xen/bin/qemu-system-i386"}
	for _, p := range paths {
		if _, err := os.Stat(root + p); err == nil {
			return p, nil
		}
	}
	return "", hint(fmt.Errorf("no QEMU at %s", strings.Join(paths, ", ")), "build the image with mkinitramfs")
}

// monitorStep connects our own monitor, which stays connected for QEMU's life:
// without any, QEMU drops fdsets that nobody uses (before 9.1).
func (a *agent) monitorStep(ctx context.Context) error {
	ctx, cancel := a.whileQEMU(ctx, monitorLimit)
	defer cancel()
	defer a.reportOverdue("QEMU does not answer on its monitor")()
	conn, err := dial(ctx, agentSocket)
	if err != nil {
		return a.orEnd(err)
	}
	a.monitor = qmp.New(conn)
	if err := a.monitor.ConnectContext(ctx); err != nil {
		return a.orEnd(fmt.Errorf("QEMU's monitor: %w", err))
	}
	v := a.monitor.Version()
	a.log.Debug("monitor connected", "qemu", fmt.Sprintf("%d.%d.%d", v.QEMU.Major, v.QEMU.Minor, v.QEMU.Micro))
	a.state = &stateSaver{qmp: a.monitor, log: a.log, pid: a.qemu.PID(), settle: a.settle,
		open: func(ctx context.Context) (*consring.Ring, error) {
			return consring.Open(ctx, a.xs, saveConsole, toolstackDomain)
		}}
	if err := a.state.register(ctx); err != nil {
		return a.orEnd(err)
	}
	return nil
}

// bridgeStep serves the toolstack, and what goes on beside QEMU.
func (a *agent) bridgeStep(ctx context.Context) error {
	events, err := a.monitor.Events(ctx)
	if err != nil {
		return a.orEnd(err)
	}
	pci := &qmpbridge.PCI{Xenstore: a.xs}
	a.service(ctx, "QMP endpoint", func(ctx context.Context) error {
		return qmpbridge.Serve(ctx, a.endpoint, qmpbridge.Options{
			Dial:     func(context.Context) (qmpbridge.Monitor, error) { return a.dialMonitor(bridgeSocket) },
			PCIReady: pci.Ready,
			Save:     a.state,
			Log:      a.log,
		})
	})
	a.service(ctx, "removable disks", func(ctx context.Context) error { return a.media.Run(ctx, a.monitor) })
	fixed, err := a.fixedDisks(ctx)
	if err != nil {
		return err
	}
	a.service(ctx, "fixed disks", func(ctx context.Context) error { return a.followDisks(ctx, fixed) })
	if w := a.newStuckWatch(); w != nil {
		a.service(ctx, "watch over QEMU", w.run)
	}
	a.service(ctx, "memory pressure", a.followPressure)
	a.service(ctx, "QEMU's events", func(ctx context.Context) error { return a.followEvents(ctx, events) })
	return nil
}

// runningStep waits for QEMU to tell libxl that the device model runs.
func (a *agent) runningStep(ctx context.Context) error {
	life := ctx
	ctx, cancel := a.whileQEMU(ctx, runningLimit)
	defer cancel()
	defer a.reportOverdue("QEMU has not written \"running\" for the toolstack")()
	path := a.cfg.devicePath() + "/state"
	if _, err := a.xs.WaitFor(ctx, path, func(state string, exists bool) bool { return exists && state == "running" }); err != nil {
		return a.orEnd(fmt.Errorf("QEMU did not write \"running\": %w", err))
	}
	if a.received != nil {
		a.received()
	}
	if a.announce != nil {
		a.service(life, "announcements", func(ctx context.Context) error { return a.announce.run(ctx, a.monitor) })
	}
	debug.FreeOSMemory() // what the boot took and nothing needs again
	a.logMemory()
	return nil
}
