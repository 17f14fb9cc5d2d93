package qmpbridge

import (
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"time"
)

var (
	errUnderWay = errors.New("another save or migration of this guest is under way, or has been killed: nothing is saved; when it is over, try again")
	errNotYours = errors.New("another save or migration of this guest is under way: the guest does not go on for one that was refused")
	errSpoiled  = errors.New("another save of this guest was begun meanwhile, and Xen's log of dirty memory was switched off when that was refused: the copy of its memory may lack what it has written since, so no state is saved; the guest goes on, and can be saved or migrated after a restart")
)

// refusedLimit is how long a refused save may take to send its cont. libxl sends it at once.
const refusedLimit = time.Minute

// An interlock keeps two saves or migrations of one guest apart. libxl does not, and all its connections look alike, so it
// goes by what each sends, in order (libxl_dom_save.c, xg_sr_save.c, xl_vmcontrol.c):
//
//	xen-set-global-dirty-log on · stop · xen-save-devices-state · (the guest's memory) · xen-set-global-dirty-log off
//
// and then cont, if the guest is to go on. A save whose first command is refused sends only cont, which would let the guest
// go on while the other save still reads its memory. After a failed cont libxl leaves the guest's CPUs as they are.
//
// A refused save also switches Xen's log of dirty memory off (cleanup in xg_sr_save.c), which may be the other's. To a live migration that
// looks at it later Xen says that nothing was written (paging_log_dirty_op), and the guest would go on elsewhere with old memory, without a word. So the
// other one is refused its state, if it has none yet. One that is not live loses it too: QMP does not tell them apart, and the endpoint
// has room for one connection, so that a refusal cannot wait.
//
// QEMU's dirty log is on or off; it aborts when a log that is off is switched off.
type interlock struct {
	mu        sync.Mutex
	spoiled   bool        // the save under way, which has no state yet: Xen's log is off
	logs      int         // switched on, and not off again
	dead      int         // of them, those of saves that seem to have been killed
	suspended bool        // by a good save, with no cont since
	refused   []time.Time // saves that were refused and have not sent their cont
}

// ask says what becomes of a request that may belong to a save: QEMU gets it (forward), or it is answered here, with an error
// if it is refused.
func (i *interlock) ask(r *request, now time.Time) (forward bool, err error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch r.part {
	case logOn:
		if i.suspended || i.logs > i.dead {
			i.refused = append(i.refused, now)
			i.spoiled = !i.suspended
			return false, errUnderWay
		}
		i.logs++
		i.spoiled = false
		return i.logs == 1, nil
	case logOff:
		if i.logs == 0 {
			return false, nil
		}
		i.logs--
		i.dead = min(i.dead, i.logs)
		i.spoiled = i.spoiled && i.logs > 0
		return i.logs == 0, nil
	case saveState:
		if i.suspended {
			i.refused = append(i.refused, now)
			return false, errUnderWay
		}
		if i.spoiled {
			i.spoiled = false
			return false, errSpoiled
		}
	case goOn:
		for len(i.refused) > 0 && now.Sub(i.refused[0]) > refusedLimit {
			i.refused = i.refused[1:]
		}
		if len(i.refused) > 0 {
			// A save that is killed leaves its log on. So whoever tries again after a refusal is believed.
			if i.refused = i.refused[1:]; len(i.refused) == 0 {
				i.dead = i.logs
			}
			return false, errNotYours
		}
		r.resumes, i.suspended = i.suspended, false
	}
	return true, nil
}

// answered notes what QEMU made of a request that was to reach it.
func (i *interlock) answered(r *request, good bool) {
	i.mu.Lock()
	defer i.mu.Unlock()
	switch {
	case r.part == logOn && !good:
		i.logs = max(0, i.logs-1)
		i.dead = min(i.dead, i.logs)
	case r.resumes && !good:
		i.suspended = true
	}
}

// saved notes that a save's answer, which was good, has left.
func (i *interlock) saved() {
	i.mu.Lock()
	i.suspended = true
	i.mu.Unlock()
}

// A part is what a request is in a save or migration.
type part int

const (
	noPart part = iota
	logOn
	logOff
	saveState
	goOn
)

// part says what a request is.
func (m *message) part(command string) part {
	var arguments struct {
		Enable   *bool
		Filename string
	}
	switch command {
	case "cont":
		return goOn
	case "xen-set-global-dirty-log", "xen-save-devices-state":
		if json.Unmarshal(m.raw(memberArguments), &arguments) != nil {
			return noPart // QEMU refuses it
		}
	}
	switch {
	case arguments.Filename == "/dev/fdset/1" && command == "xen-save-devices-state":
		return saveState
	case arguments.Enable == nil:
		return noPart
	case *arguments.Enable:
		return logOn
	}
	return logOff
}

// interlock answers r if it must not reach QEMU.
func (s *session) interlock(r *request) {
	forward, err := s.saves.ask(r, time.Now())
	if forward {
		return
	}
	if err == nil {
		r.local = returnLine(r.id)
		return
	}
	s.log.Log(s.ctx, slog.LevelWarn, "QMP command refused", "command", r.command, "err", err)
	r.local = errorLine(r.id, err.Error())
}
