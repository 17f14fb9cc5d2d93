package main

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/qmp"
	"github.com/stubinit/stubinit/internal/xen/privcmd"
)

// Limits of the wait for libxl to resume a guest whose QEMU died during a save.
const (
	resumeLimit    = 30 * time.Second // for its cont
	shutDownAgain  = 100 * time.Millisecond
	shutDownsAfter = 20
)

// A lastMonitor answers the toolstack in the place of a QEMU that died while the guest was suspended for a save. Xen does not
// shut down such a guest: it has already, with reason suspend (domain_shutdown in xen/common/domain.c). libxl resumes it after the
// failed save, but only if QEMU has answered cont.
type lastMonitor struct {
	version qmp.Version
	cont    chan struct{} // closed when cont has been answered
	once    sync.Once
}

func newLastMonitor(version qmp.Version) *lastMonitor {
	return &lastMonitor{version: version, cont: make(chan struct{})}
}

// dial gives a connection that is served until its other end is closed.
func (m *lastMonitor) dial(p *fdio.Poller) (*fdio.Conn, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "last monitor")
	go func() {
		defer theirs.Close()
		_ = m.serve(theirs) // ends with the session
	}()
	return fdio.NewConn(p, fds[0], "last monitor")
}

func (m *lastMonitor) serve(conn io.ReadWriter) error {
	out := json.NewEncoder(conn)
	type object = map[string]any
	if err := out.Encode(object{"QMP": object{"version": m.version, "capabilities": []string{}}}); err != nil {
		return err
	}
	for in := json.NewDecoder(conn); ; {
		var r struct {
			Execute string          `json:"execute"`
			ID      json.RawMessage `json:"id"`
		}
		if err := in.Decode(&r); err != nil {
			return err
		}
		answer := object{}
		if r.ID != nil {
			answer["id"] = r.ID
		}
		switch r.Execute {
		case "qmp_capabilities", "xen-set-global-dirty-log", "cont":
			answer["return"] = object{}
		default:
			answer["error"] = qmp.Error{Class: "GenericError", Desc: errQEMUEnded.Error()}
		}
		if err := out.Encode(answer); err != nil {
			return err
		}
		if r.Execute == "cont" {
			m.once.Do(func() { close(m.cont) })
		}
	}
}

// dialMonitor connects a session of the toolstack to QEMU, which listens on path, or to who answers for it. libxl's cont can
// come before we know ourselves that QEMU has died.
func (a *agent) dialMonitor(path string) (*fdio.Conn, error) {
	if m := a.last.Load(); m != nil {
		return m.dial(a.poller)
	}
	conn, err := fdio.DialUnix(a.poller, path)
	if errors.Is(err, unix.ECONNREFUSED) && a.stopped.Load() { // nobody has the socket any more
		return a.answerForQEMU().dial(a.poller)
	}
	return conn, err
}

// answerForQEMU gives the one lastMonitor there is.
func (a *agent) answerForQEMU() *lastMonitor {
	a.last.CompareAndSwap(nil, newLastMonitor(a.monitor.Version()))
	return a.last.Load()
}

// shutDownSuspended ends a guest that was suspended when QEMU died: when libxl has resumed it.
func (a *agent) shutDownSuspended(m *lastMonitor) error {
	limit := time.NewTimer(resumeLimit)
	defer limit.Stop()
	select {
	case <-m.cont:
	case <-limit.C:
		return errors.New("the toolstack has not resumed it after the save")
	}
	// libxl resumes the guest soon after the answer; nothing tells us when. Until then Xen ignores this, and after it too.
	for range shutDownsAfter {
		time.Sleep(shutDownAgain)
		if err := privcmd.RemoteShutdown(a.cfg.target, privcmd.Crash); err != nil {
			return err
		}
	}
	return nil
}
