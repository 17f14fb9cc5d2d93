package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/qmp"
	"github.com/stubinit/stubinit/internal/xen/consring"
)

// stateSet is the fdset that libxl tells QEMU to save to: /dev/fdset/1
// (stubdom.txt, "Environment exposed by stubdomain to qemu").
const stateSet = 1

// Consoles of saved states (stubdom.txt: STUBDOM_CONSOLE_SAVE, STUBDOM_CONSOLE_RESTORE).
const (
	saveConsole    = 1
	restoreConsole = 2
)

// A stateSaver is the bridge's Saver. QEMU opens the file of a save for writing and truncates
// it, which a console cannot bear: so fdset 1 is a memfd with exactly that access mode. When QEMU
// has answered, Commit copies it to console 1, waits until dom0 has taken the last byte,
// and only then does the answer reach libxl, which reads its file at once.
type stateSaver struct {
	qmp    *qmp.Monitor
	log    *slog.Logger
	pid    int                             // QEMU's
	settle func(ctx context.Context) error // nil: do not wait for dom0's file

	saving atomic.Bool // from Prepare to the end of Commit or Abort

	state *os.File // the memfd behind fdset 1, for reading; nil when a save has used it
	most  int64    // bytes that it may have in this save
	spent bool     // dom0's file has a state, or a part of one

	open func(ctx context.Context) (*consring.Ring, error) // console 1's ring
}

// register gives QEMU an empty file as fdset 1.
func (s *stateSaver) register(ctx context.Context) error {
	fd, err := unix.MemfdCreate("state", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("memory file for the state: %w", err)
	}
	state := os.NewFile(uintptr(fd), "memfd:state")
	// A second open, because an access mode cannot be taken back: fdset members must have exactly the one asked for.
	out, err := os.OpenFile("/proc/self/fd/"+strconv.Itoa(fd), os.O_WRONLY, 0)
	if err != nil {
		state.Close()
		return err
	}
	defer out.Close()
	_, err = s.qmp.ExecuteWithFile(ctx, "add-fd", map[string]any{"fdset-id": stateSet, "opaque": "stubinit-state"}, out)
	if err != nil {
		state.Close()
		return fmt.Errorf("fdset %d: %w", stateSet, err)
	}
	s.state = state
	return nil
}

// unregister takes fdset 1 back, with the memory behind it.
func (s *stateSaver) unregister(ctx context.Context) error {
	if s.state != nil {
		_ = s.state.Truncate(0) // before 9.1, QEMU keeps a removed descriptor while the guest is stopped
		s.state.Close()
		s.state = nil
	}
	_, err := s.qmp.Execute(ctx, "remove-fd", map[string]any{"fdset-id": stateSet})
	var refused *qmp.Error
	if errors.As(err, &refused) { // there is none: just as well
		return nil
	}
	return err
}

// Prepare makes sure that fdset 1 is an empty file, and has room.
func (s *stateSaver) Prepare(ctx context.Context) error {
	s.saving.Store(true)
	if s.spent {
		return errSpent
	}
	if err := s.renew(ctx); err != nil {
		return err
	}
	return s.limit()
}

// errSpent is the end of a second save. libxl has dom0's QEMU open console 1's file once, and neither truncates nor
// removes it after a save: the file would hold two states, of which a restore takes the first.
var errSpent = errors.New("console 1 has carried a state already, and dom0 would add this one to it: restore or restart the guest before it is saved again")

// renew gives fdset 1 a new file.
func (s *stateSaver) renew(ctx context.Context) error {
	if err := s.unregister(ctx); err != nil {
		return err
	}
	return s.register(ctx)
}

// spareMemory is what a state must leave free, for QEMU and for us.
const spareMemory = 8 << 20

// limit lets QEMU's write fail with EFBIG when the state would take memory that the stubdomain lives on: the kernel
// would kill QEMU. A block device is no file in the limit's sense. QEMU inherits from PID 1 that SIGXFSZ is ignored.
func (s *stateSaver) limit() error {
	_, available, err := readMeminfo() // KiB
	if err != nil {
		return err
	}
	if s.most = int64(available)<<10 - spareMemory; s.most <= 0 {
		return fmt.Errorf("no room for a state: %d KiB of memory are free, %d must stay so: raise stubdomain_memory in xl.cfg", available, spareMemory>>10)
	}
	return s.setLimit(uint64(s.most))
}

func (s *stateSaver) setLimit(bytes uint64) error {
	if s.pid == 0 { // not in a stubdomain: a test
		return nil
	}
	err := unix.Prlimit(s.pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: bytes, Max: unix.RLIM_INFINITY}, nil)
	if err != nil && !errors.Is(err, unix.ESRCH) { // QEMU's end is seen elsewhere
		return fmt.Errorf("limit the state to %d bytes: %w", bytes, err)
	}
	return nil
}

// Explain says why QEMU could not save, if it was the limit: QEMU's own error does not.
func (s *stateSaver) Explain(refused error) error {
	if s.state == nil || s.most <= 0 {
		return nil
	}
	info, err := s.state.Stat()
	if err != nil || info.Size() < s.most {
		return nil
	}
	return fmt.Errorf("%w: the state is larger than the %d KiB of memory that are free for it: raise stubdomain_memory in xl.cfg", refused, s.most>>10)
}

// Commit copies the state to console 1. The memory is given back whatever comes.
func (s *stateSaver) Commit(ctx context.Context) error {
	defer s.saving.Store(false)
	start := time.Now()
	n, waited, err := s.copy(ctx)
	if e := s.unregister(ctx); err == nil {
		err = e
	}
	if err == nil {
		err = s.register(ctx) // for a toolstack that can save again
	}
	if err == nil {
		err = s.setLimit(unix.RLIM_INFINITY)
	}
	if err != nil {
		return err
	}
	took := time.Since(start)
	s.log.Info("state saved", "bytes", n, "took", took, "waited_for_dom0", waited, "kib_per_s", rate(n, took))
	return nil
}

// Abort drops the state and lets the guest go on.
func (s *stateSaver) Abort(ctx context.Context, cause error) error {
	defer s.saving.Store(false)
	if errors.Is(cause, errSpent) {
		s.log.Error("save refused", "err", cause) // QEMU has got nothing of it; libxl sends cont itself
		return nil
	}
	// libxl removes console 1's file after a failed save, and cannot open it after another.
	s.log.Error("save failed; the guest goes on, and must be restarted before libxl can save it", "err", cause)
	err := s.renew(ctx)
	if e := s.setLimit(unix.RLIM_INFINITY); err == nil {
		err = e
	}
	if _, e := s.qmp.Execute(ctx, "cont", nil); err == nil {
		err = e
	}
	return err
}

// copy says how many bytes it has copied, and for how long it has waited for dom0 to take them.
func (s *stateSaver) copy(ctx context.Context) (n int64, waited time.Duration, err error) {
	ring, err := s.open(ctx)
	if err != nil {
		return 0, 0, err
	}
	defer ring.Close()
	if _, err := s.state.Seek(0, io.SeekStart); err != nil {
		return 0, 0, err
	}
	n, err = send(ctx, ring, s.state)
	s.spent = n > 0 && ring.File
	switch {
	case err != nil:
		return n, ring.Waited, fmt.Errorf("copy the state to console 1: %w", err)
	case n == 0:
		return 0, 0, errors.New("QEMU saved an empty state")
	}
	if err := ring.Drain(ctx); err != nil {
		return n, ring.Waited, fmt.Errorf("console 1: the end of the state: %w", err)
	}
	if s.settle != nil {
		if err := s.settle(ctx); err != nil {
			s.log.Warn("the end of the state may not be in dom0's file yet", "err", err)
		}
	}
	return n, ring.Waited, nil
}

// send gives a state to console 1, and says how much of it went there.
func send(ctx context.Context, ring *consring.Ring, state io.Reader) (n int64, err error) {
	buf := make([]byte, 64<<10)
	for {
		m, err := state.Read(buf)
		k, werr := ring.Write(ctx, buf[:m])
		n += int64(k)
		switch {
		case werr != nil:
			return n, werr
		case err == io.EOF:
			return n, nil
		case err != nil:
			return n, err
		}
	}
}

// settleLimit is for a dom0 that does not read console 0.
const settleLimit = 2 * time.Second

// settle waits until dom0's QEMU has written what it has taken from console 1: it frees the ring first. One thread of
// it serves all consoles, so when it has taken a later line from console 0 it has.
func (a *agent) settle(ctx context.Context) error {
	if a.ring == nil {
		return errors.New("console 0's ring cannot be seen")
	}
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	a.log.Info("state is out of console 1's ring")
	if err := a.console.Flush(ctx); err != nil {
		return err
	}
	if err := consring.New(a.ring, nil).Drain(ctx); err != nil {
		return fmt.Errorf("console 0: %w", err)
	}
	return nil
}

// receive moves the state from console 2 to QEMU until ctx ends, or QEMU has closed its end: the state has no end that could
// be seen here. When nothing has come for silence, it says so.
func (a *agent) receive(ctx context.Context, ring *consring.Ring, qemu io.WriteCloser, silence time.Duration) {
	defer qemu.Close()                                      // before its time, it is an error that QEMU reports
	defer context.AfterFunc(ctx, func() { qemu.Close() })() // ends a write
	defer ring.Close()
	start := time.Now()
	var n int
	var took, waited time.Duration // until the last byte
	cut := time.AfterFunc(silence, func() {
		a.log.Warn("no more of the state comes; if QEMU still waits for it, it was cut off when it was saved: was dom0's /var/lib/xen full?", "for", silence)
	})
	defer cut.Stop()
	buf, have := make([]byte, incomingChunk), 0
	for {
		patience := incomingPatience
		if have == 0 {
			patience = 0
		}
		m, err := ring.Read(ctx, buf[have:], patience)
		if have += m; err == nil && (m == 0 || have == len(buf)) {
			if _, err = qemu.Write(buf[:have]); err == nil {
				n, have = n+have, 0
				took, waited = time.Since(start), ring.Waited
				cut.Reset(silence)
			}
		}
		switch {
		case err == nil:
			continue
		case ctx.Err() == nil && !errors.Is(err, unix.EPIPE):
			a.log.Error("the state breaks off", "bytes", n, "err", err)
		default:
			a.log.Info("state received", "bytes", n, "took", took, "waited_for_dom0", waited, "kib_per_s", rate(int64(n), took))
		}
		return
	}
}

const (
	// incomingChunk is how much QEMU gets at once (it reads as much): its way through its main loop costs as much time as 1 KiB of
	// state does.
	incomingChunk = 32 << 10
	// incomingPatience is how long what there is waits for more.
	incomingPatience = 5 * time.Millisecond
)

// incomingSilence is how long a state may pause before that is said. QEMU needs less to start.
const incomingSilence = 8 * time.Second

// rate is in KiB/s.
func rate(bytes int64, took time.Duration) int64 {
	return int64(float64(bytes) / 1024 / max(took, 1).Seconds())
}
