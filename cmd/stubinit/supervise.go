package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/stubinit/stubinit/internal/console"
	"github.com/stubinit/stubinit/internal/qemu"
	"github.com/stubinit/stubinit/internal/qmp"
	"github.com/stubinit/stubinit/internal/xen/privcmd"
	"github.com/stubinit/stubinit/netup"
)

// errQEMUEnded is the cause of contexts that QEMU's end has ended.
var errQEMUEnded = errors.New("QEMU has ended")

// whileQEMU is ctx with a limit, that also ends when QEMU does.
func (a *agent) whileQEMU(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	ctx, cancelLimit := context.WithTimeout(ctx, limit)
	ctx, cancel := context.WithCancelCause(ctx)
	over := make(chan struct{})
	go func() {
		select {
		case <-a.qemu.Done():
			cancel(errQEMUEnded)
		case <-over:
		}
	}()
	return ctx, func() {
		close(over)
		cancel(nil)
		cancelLimit()
	}
}

// deathNotice is how long after a broken connection QEMU may take to be reaped:
// the kernel closes a dying process's sockets first.
const deathNotice = time.Second

// orEnd is err, or QEMU's end if that is what is behind it.
func (a *agent) orEnd(err error) error {
	late := time.NewTimer(deathNotice)
	defer late.Stop()
	select {
	case <-a.qemu.Done():
		return a.qemuEnd()
	case <-late.C:
		return err
	}
}

// lastOutputLimit is how long after QEMU's end its output may take to be read. A process that QEMU has left behind can hold it open for ever.
const lastOutputLimit = 200 * time.Millisecond

// qemuEnd says how QEMU ended, nil for an end that the guest asked for, which no end during the boot is. It is called after the end.
func (a *agent) qemuEnd() error {
	last := time.NewTimer(lastOutputLimit)
	defer last.Stop()
	select {
	case <-a.output: // its last words
	case <-last.C: // some other process has the pipe
		a.held.Store(true) // who knows
	}
	exit := a.qemu.Exit()
	if exit.Success() && a.step.Load() == "supervise" {
		a.log.Info("QEMU ended", "how", exit, "max_rss_kib", exit.MaxRSS)
		return nil
	}
	a.log.Info("QEMU's memory", "max_rss_kib", exit.MaxRSS)
	if a.held.Load() {
		for _, line := range a.tail.Lines() {
			a.log.Error("QEMU's last lines", "line", line)
		}
	}
	said := ""
	if lines := a.tail.Lines(); len(lines) > 0 {
		said = ": its last line: " + lines[len(lines)-1]
	}
	err := fmt.Errorf("QEMU ended: %v%s", exit, said)
	if exit.Signal == syscall.SIGKILL && oomKills() > 0 {
		a.logMemory()
		return hint(fmt.Errorf("%w: the kernel ran out of memory while QEMU used %d MiB", err, exit.MaxRSS>>10), "raise stubdomain_memory in xl.cfg")
	}
	return hint(err, "QEMU's own messages stand above, as lines \"qemu\"")
}

// supervise waits for QEMU's end and says how it came.
func (a *agent) supervise(ctx context.Context) error {
	a.step.Store("supervise")
	for {
		select {
		case err := <-a.failed:
			select {
			case <-a.qemu.Done(): // which ends its monitors first
			case <-time.After(deathNotice):
				a.log.Error("a service has ended; the guest goes on without it", "err", err)
			}
		case <-a.qemu.Done():
			if err := a.qemuEnd(); err != nil {
				return &stepError{"supervise", err}
			}
			a.shutDownGuest(privcmd.Poweroff)
			return nil
		}
	}
}

// followEvents takes QEMU's events: an unplugged NIC's links go. Each NIC has a goroutine, as a backend that does not answer takes
// netup.Options.Limit; all have ended when it returns.
func (a *agent) followEvents(ctx context.Context, events <-chan qmp.Event) error {
	var unplugs sync.WaitGroup
	defer unplugs.Wait()
	for e := range events {
		a.log.Debug("QEMU event", "event", e.Event, "data", e.Data)
		switch e.Event {
		case "STOP": // at a save's beginning, when libxl has suspended the guest
			a.stopped.Store(true)
		case "RESUME":
			a.stopped.Store(false)
		}
		if e.Event != "DEVICE_DELETED" {
			continue
		}
		id, _ := e.Data["device"].(string)
		i := slices.IndexFunc(a.nics, func(n netup.NIC) bool { return id != "" && n.ID == id })
		if i < 0 {
			continue
		}
		unplugs.Go(func() {
			start := time.Now()
			// A netdev outlives a device_del, and QEMU keeps the tap open for it. The unplug protocol deletes both.
			_, err := a.monitor.Execute(ctx, "netdev_del", map[string]string{"id": a.nics[i].Netdev})
			if refused := new(qmp.Error); errors.As(err, &refused) && refused.Class == "DeviceNotFound" {
				err = nil
			}
			if err = errors.Join(err, a.net.Unplug(ctx, id)); err != nil {
				a.log.Error("unplugged NIC: something of it stays", "nic", id, "err", err)
				return
			}
			a.log.Info("NIC unplugged; its vif, bridge and tap are gone", "nic", id, "took", time.Since(start).Round(time.Millisecond))
		})
	}
	return a.monitor.Err()
}

// libxl destroys the stubdomain, and with it what could be asked, when the device model does not run 30 s after the unpause
// (libxl_internal.h, LIBXL_STUBDOM_START_TIMEOUT), which is when the kernel's clock starts.
const (
	overdueAt    = 25 * time.Second // by uptime
	overdueLeast = 5 * time.Second  // of the wait itself
)

// reportOverdue logs what a QEMU that does not get ready is doing, before it is too late to ask. The returned function ends it.
func (a *agent) reportOverdue(what string) (stop func()) {
	return a.reportAfter(max(overdueAt-uptime(), overdueLeast), what)
}

func (a *agent) reportAfter(wait time.Duration, what string) (stop func()) {
	t := time.AfterFunc(wait, func() {
		a.log.Error(what+" yet; libxl gives up 30 s after the start", "waited", wait)
		for _, line := range qemu.StuckReport(os.DirFS("/proc"), a.qemu.PID()) {
			a.log.Error("late QEMU", "proc", line)
		}
	})
	return func() { t.Stop() }
}

// Limits of the parting words: the guest waits for its shutdown meanwhile.
const (
	partingLimit = 500 * time.Millisecond
	partingBytes = 8 << 10 // of older lines that go before them
)

// fatal says why the stubdomain ends: on console 0, and in xenstore's error node.
// The guest cannot go on without its device model, and nothing in libxl notices: it is shut down with reason crash, so
// that its on_crash applies. That makes xl destroy this domain too, so the words come first.
func (a *agent) fatal(err error) {
	var last *lastMonitor
	if a.stopped.Load() && a.qemu != nil {
		last = a.answerForQEMU()
	}
	a.console.Shed(partingBytes)
	a.log.Error(err.Error())
	said, cancel := context.WithTimeout(context.Background(), partingLimit)
	a.publish(said, "error", publishable(err.Error()))
	cancel()
	if a.hvc != nil {
		a.hvc.AllowLastWords(lastWordsBytes)
		a.console.Kick()
	}
	said, cancel = context.WithTimeout(context.Background(), partingLimit)
	_ = a.console.Flush(said)
	cancel()
	if a.qemu != nil {
		_ = a.qemu.Kill(syscall.SIGKILL)
	}
	a.shutDownGuest(privcmd.Crash)
	if last != nil {
		a.log.Info("the guest is suspended: waiting for the toolstack to resume it after its failed save", "limit", resumeLimit)
		if err := a.shutDownSuspended(last); err != nil {
			a.log.Error("the guest stays suspended: destroy it with xl destroy", "domid", a.cfg.target, "err", err)
		}
	}
}

// shutDownGuest ends the target. A guest that has ended by itself keeps its own reason.
func (a *agent) shutDownGuest(reason privcmd.Reason) {
	ctx, cancel := context.WithTimeout(context.Background(), partingLimit)
	defer cancel()
	target, ok := a.targetDomain(ctx)
	if !ok {
		return
	}
	if err := privcmd.RemoteShutdown(target, reason); err != nil {
		a.log.Error("the guest could not be shut down and hangs: destroy it with xl destroy", "domid", target, "err", err)
		return
	}
	a.log.Info("guest shut down", "domid", target, "reason", reason)
}

// targetDomain is the guest, also before the configuration was read; false as long as nobody can say.
func (a *agent) targetDomain(ctx context.Context) (uint16, bool) {
	switch {
	case a.cfg != nil:
		return a.cfg.target, true
	case a.xs == nil:
		return 0, false
	}
	target, err := readDomid(ctx, a.xs, "target")
	if err != nil {
		a.log.Debug("the guest is not known", "err", err)
	}
	return target, err == nil
}

// longestValue of ours in xenstore: the daemon refuses more than 2048 bytes from a domain, names and permissions counted (xenstored's quota "entry-size").
const longestValue = console.MaxLine

// publishable is text for xenstore: QEMU's last line may hold any byte, and a panic's stack has no end.
func publishable(text string) string {
	b := console.Escape(nil, []byte(text))
	if len(b) > longestValue {
		b = append(b[:longestValue-3], "..."...)
	}
	return string(b)
}

// publish writes a node of device-model/<g>/stubinit, for whoever looks with xenstore-ls.
func (a *agent) publish(ctx context.Context, node, value string) {
	ctx, cancel := context.WithTimeout(ctx, xenstoreLimit)
	defer cancel()
	target, ok := a.targetDomain(ctx)
	if !ok {
		return
	}
	if err := a.xs.Write(ctx, fmt.Sprintf("device-model/%d/stubinit/%s", target, node), value); err != nil {
		a.log.Debug("not published", "node", node, "err", err)
	}
}

func (a *agent) publishPhase(ctx context.Context, phase string) { a.publish(ctx, "phase", phase) }
