package qmpbridge

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"reflect"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

var (
	errToolstackClosed = errors.New("the toolstack closed the session")
	errQEMUClosed      = errors.New("QEMU closed its monitor")
)

// spaceMax is the largest request whose buffer is used again.
const spaceMax = 4096

// A request is one value from the toolstack.
type request struct {
	line     []byte // with its line end; what is left to write
	space    []byte // line's buffer, for the next request, unless it is large
	command  string
	oob      bool   // exec-oob: QEMU may answer it before others
	id       []byte // as the toolstack wrote it; nil without
	hostaddr string // of a device_add that may have to wait
	part     part
	save     bool      // QEMU gets it, and fdset 1 is prepared
	resumes  bool      // cont, after a save
	expected bool      // in inBand or outOfBand, or was
	sent     time.Time // only for the debug log

	// local is the answer when the request is not for QEMU; the session ends with
	// it if end is set.
	local []byte
	end   error
}

// An answer is one line for the toolstack.
type answer struct {
	line []byte // what is left to write
	text []byte // if line is QEMU's: that, to be released
	end  error  // ends the session once the line, if any, is written
	save *outcome
}

// An outcome is what became of a save.
type outcome struct {
	id    []byte // of its request
	good  bool   // QEMU saved
	cause error  // why not
	seen  time.Time
}

// A session is one toolstack connection and its own connection to QEMU. It has no
// goroutine of its own: whoever has news for it, most often the one that waits for
// both connections, calls kick, and step moves what can be moved. Nothing in step
// waits; what has to is done beside it, and comes back as a posted function.
type session struct {
	*Options
	saves     *interlock
	ctx       context.Context
	cancel    context.CancelCauseFunc
	ended     atomic.Bool // ctx has ended; to ask it costs more
	log       *slog.Logger
	debug     bool // log's level
	toolstack Stream
	qemu      Monitor
	serving   context.Context // of Serve
	done      chan struct{}   // closed when nothing of the session is left
	once      sync.Once       // closes done

	kicks atomic.Int32 // since step began; whoever makes it 1 runs step

	mu     sync.Mutex
	posted []func()

	// The rest is step's.
	requests    *splitter
	answers     *splitter
	toQEMU      outbox[*request]
	toToolstack outbox[answer]
	sending     *request // taken from toQEMU
	spare       *request // answered: for the next one
	delivering  answer   // taken from toToolstack, if out
	out         bool

	holding    bool     // sending waits for what is done beside step
	committing bool     // delivering does
	aborting   bool     // the session's end does
	saving     *request // prepared, and neither answered nor aborted
	saveFailed bool
	saved      *request // a save that QEMU has got; the requests after it wait until its answer has left

	inBand     []*request  // sent, not answered, in order
	first      [4]*request // inBand's place while it is short
	outOfBand  []*request
	unanswered int // bytes kept of both
	greeted    bool
	writeErr   error       // of writing to QEMU; what it has still sent is read
	gone       bool        // QEMU's monitor has closed, or was closed
	closed     bool        // the toolstack's connection was closed: the session is over
	limit      *time.Timer // of the wait for answers, or for the toolstack to take what is left

	events   int
	answered int
}

func serveSession(ctx context.Context, toolstack Stream, o *Options, saves *interlock, log *slog.Logger) {
	start := time.Now()
	defer toolstack.Close()
	qemu, err := o.Dial(ctx)
	if err != nil {
		log.Warn("QMP session refused: QEMU's monitor cannot be reached", "err", err)
		return
	}
	defer qemu.Close()

	s := newSession(ctx, toolstack, qemu, o, saves, log)
	defer s.end(nil)
	context.AfterFunc(s.ctx, func() { s.end(nil) })
	defer context.AfterFunc(ctx, s.kick)() // again, if the session is over by then
	if err := errors.Join(toolstack.Notify(s.kick), qemu.Notify(s.kick)); err != nil {
		s.end(err)
	}
	s.kick()
	<-s.done

	cause := context.Cause(s.ctx)
	level := slog.LevelWarn
	if errors.Is(cause, errToolstackClosed) || ctx.Err() != nil {
		level = slog.LevelDebug
	}
	log.Log(ctx, level, "QMP session ended", "cause", cause, "answers", s.answered,
		"events dropped", s.events, "took", time.Since(start))
}

func newSession(ctx context.Context, toolstack Stream, qemu Monitor, o *Options, saves *interlock, log *slog.Logger) *session {
	s := &session{
		Options: o, saves: saves, log: log, debug: log.Enabled(ctx, slog.LevelDebug), toolstack: toolstack, qemu: qemu,
		serving: ctx, done: make(chan struct{}),
		requests:    newSplitter(toolstack.TryRead, MaxRequest, false),
		answers:     newSplitter(qemu.TryRead, MaxAnswer, true),
		toQEMU:      outbox[*request]{limit: MaxRequest},
		toToolstack: outbox[answer]{limit: maxQueued},
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	return s
}

// end ends the session, for the first cause that it gets.
func (s *session) end(cause error) {
	s.cancel(cause)
	s.ended.Store(true)
	s.kick()
}

// kick has step run, now or again. It may be called by any goroutine and by step itself.
func (s *session) kick() {
	if s.kicks.Add(1) > 1 {
		return // whoever runs step runs it again
	}
	for n := int32(1); ; {
		s.guarded(s.step)
		if s.kicks.CompareAndSwap(n, 0) {
			return
		}
		n = s.kicks.Load()
	}
}

// guarded calls f. A panic, which is a defect, ends the session; on the goroutine that it runs on it would end the agent.
func (s *session) guarded(f func()) {
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("a defect of stubinit ends this QMP session: please report it with this log", "panic", r, "stack", string(debug.Stack()))
			s.end(fmt.Errorf("panic: %v", r))
			s.toolstack.Close()
			s.qemu.Close()
			s.once.Do(func() { close(s.done) })
		}
	}()
	f()
}

// post has step call f.
func (s *session) post(f func()) {
	s.mu.Lock()
	s.posted = append(s.posted, f)
	s.mu.Unlock()
	s.kick()
}

// beside does job, which waits, on a goroutine of its own; then step goes on with then.
func (s *session) beside(job func(), then func()) {
	go s.guarded(func() {
		job()
		s.post(then)
	})
}

func (s *session) over() bool { return s.ended.Load() }

// step moves all that can be moved. A peer that does not read never keeps it from
// reading the other.
func (s *session) step() {
	s.mu.Lock()
	posted := s.posted
	s.posted = nil
	s.mu.Unlock()
	for _, f := range posted {
		f()
	}
	for moved := true; moved && !s.over(); {
		moved = s.readToolstack()
		moved = s.send() || moved
		moved = s.readQEMU() || moved
		moved = s.deliver() || moved
	}
	if s.over() {
		s.finish()
	}
}

// finish ends what can be ended of a session that is over. QEMU (seen with 7.2)
// gives a command's answer to whoever is connected when the command is done, so the
// monitor's connection stays until all that was asked is answered: the next session
// would get it. It also stays until the greeting: QEMU listens with a backlog of 1,
// and connections that were closed before QEMU took them would fill that. Nobody
// loses by it, the next session's greeting could not come any sooner.
func (s *session) finish() {
	if !s.closed {
		s.closed = true
		s.toolstack.Close()
		if r := s.sending; r != nil && r.local == nil && !s.holding { // QEMU did not get it whole
			s.unexpect(r)
		}
	}
	for !s.gone && s.readQEMU() {
	}
	switch {
	case s.gone:
	case s.serving.Err() != nil, s.greeted && len(s.inBand) == 0 && len(s.outOfBand) == 0:
		s.hangUp()
	case s.greeted && s.limit == nil:
		s.limit = time.AfterFunc(answerLimit, func() { s.post(s.answersLate) })
	}
	switch {
	case !s.gone || s.holding || s.committing || s.aborting:
	case s.saving != nil:
		s.aborting = true
		cause := fmt.Errorf("the session ended during the save: %w", context.Cause(s.ctx))
		s.beside(func() { s.abort(cause) }, func() { s.saving, s.aborting = nil, false })
	default:
		if s.limit != nil {
			s.limit.Stop()
		}
		s.once.Do(func() { close(s.done) })
	}
}

// answersLate gives up QEMU's answers to a session that is over.
func (s *session) answersLate() {
	if s.gone {
		return
	}
	s.log.Warn("QEMU has not answered; the next session may get an answer that is not its own, and end",
		"requests", len(s.inBand)+len(s.outOfBand), "waited", answerLimit)
	s.hangUp()
}

// readToolstack takes one request into the queue toward QEMU, and says whether it did something.
func (s *session) readToolstack() bool {
	m, err := s.requests.next()
	if err == errNothingYet {
		return false
	}
	if err != nil {
		s.toolstackFailed(err)
		return true
	}
	r := s.parse(m)
	s.requests.drop(m)
	if !s.toQEMU.put(r, len(r.line)+itemOverhead) {
		s.end(fmt.Errorf("more than %d bytes of requests wait for QEMU, which does not read them", MaxRequest))
	}
	return true
}

// toolstackFailed takes an error of reading.
func (s *session) toolstackFailed(err error) {
	var bad *syntaxError
	if !errors.As(err, &bad) {
		s.end(toolstackError("read from", err))
		return
	}
	// The splitter only drops input from here on, and still sees the close.
	s.toQEMU.put(&request{
		local: errorLine(bad.id, bad.desc),
		end:   fmt.Errorf("the toolstack sent what is not QMP: %w", bad),
	}, 0)
}

func (s *session) parse(m *message) *request {
	r := s.spare
	if s.spare = nil; r == nil {
		r = new(request)
	}
	last := r.command
	*r = request{line: append(append(r.space[:0], m.text...), '\n')}
	if len(r.line) > spaceMax {
		r.id = bytes.Clone(m.raw(memberID)) // it stays until the answer, the line does not
	} else {
		r.space = r.line
		if id := m.spans[memberID]; m.has(memberID) {
			r.id = r.line[id.start:id.end:id.end]
		}
	}
	if !m.has(memberExecute) {
		r.command, r.oob = m.str(memberExecOOB, last), m.has(memberExecOOB)
		return r
	}
	r.command = m.str(memberExecute, last)
	if r.command == "device_add" && s.PCIReady != nil {
		r.hostaddr = m.hostaddr()
	}
	if s.Save != nil {
		r.part = m.part(r.command)
	}
	return r
}

// hostaddr gives the PCI device of a device_add; "" for another kind of device.
func (m *message) hostaddr() string {
	var arguments map[string]any
	if json.Unmarshal(m.raw(memberArguments), &arguments) != nil || arguments["driver"] != "xen-pci-passthrough" {
		return ""
	}
	addr, _ := arguments["hostaddr"].(string)
	return addr
}

// send writes requests to QEMU, in order, and says whether it did something.
func (s *session) send() (moved bool) {
	for !s.holding && s.saved == nil && !s.over() {
		r := s.sending
		if r == nil {
			var ok bool
			if r, ok = s.toQEMU.take(); !ok {
				return moved
			}
			s.sending, moved = r, true
			s.begin(r)
			continue
		}
		if !r.expected {
			r.expected = true
			if err := s.expect(r); err != nil {
				s.end(err)
				return true
			}
		}
		if r.local != nil || s.gone || s.writeErr != nil {
			s.sending = nil
			continue
		}
		n, err := s.qemu.TryWrite(r.line)
		r.line = r.line[n:]
		moved = moved || n > 0
		switch {
		case err != nil:
			// Its answer is readQEMU's error.
			s.writeErr = fmt.Errorf("write to QEMU's monitor: %w", err)
		case len(r.line) > 0:
			return moved
		default:
			s.qemu.Expect()
			if r.save {
				s.saved = r
			}
		}
		r.line, s.sending = nil, nil
	}
	return moved
}

// begin does what has to be done before QEMU may get r.
func (s *session) begin(r *request) {
	if r.part != noPart {
		s.interlock(r)
	}
	switch {
	case r.hostaddr != "":
		s.holding = true
		s.beside(func() { s.hold(r.hostaddr) }, func() { s.holding = false })
	case r.part == saveState && r.local == nil:
		s.holding, s.saving = true, r
		var err error
		s.beside(func() {
			if err = s.Save.Prepare(s.ctx); err != nil {
				err = fmt.Errorf("prepare to save the device state: %w", err)
				s.abort(err)
			}
		}, func() {
			s.holding = false
			if r.save = err == nil; err != nil {
				s.saving, r.local = nil, errorLine(r.id, err.Error())
			}
		})
	}
}

// hold waits for the PCI device of a device_add.
func (s *session) hold(hostaddr string) {
	ctx, cancel := context.WithTimeout(s.ctx, pciLimit)
	defer cancel()
	start := time.Now()
	err := s.PCIReady(ctx, hostaddr)
	log := s.log.With("hostaddr", hostaddr, "waited", time.Since(start))
	if err != nil && s.ctx.Err() == nil {
		log.Warn("device_add goes to QEMU, though its PCI device is not there", "err", err)
	} else if err == nil {
		log.Info("device_add goes to QEMU: its PCI device is there")
	}
}

// abort ends a save as failed.
func (s *session) abort(cause error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), abortLimit)
	defer cancel()
	s.log.Error("device state not saved", "err", cause)
	if err := s.Save.Abort(ctx, cause); err != nil {
		s.log.Error("the guest may stay paused after the failed save", "err", err)
	}
}

// expect notes that r will be answered.
func (s *session) expect(r *request) error {
	if s.debug {
		r.sent = time.Now()
	}
	waiting := len(s.inBand) + len(s.outOfBand)
	if s.unanswered += r.cost(); s.unanswered > maxUnanswered && waiting > 0 {
		return fmt.Errorf("QEMU has not answered %d requests", waiting)
	}
	if r.oob {
		s.outOfBand = append(s.outOfBand, r)
	} else {
		if len(s.inBand) == 0 {
			s.inBand = s.first[:0]
		}
		s.inBand = append(s.inBand, r)
	}
	return s.queueLocal()
}

// unexpect takes back the last expect, of a request that QEMU did not get whole.
func (s *session) unexpect(r *request) {
	s.saves.answered(r, false)
	isIt := func(q *request) bool { return q == r }
	s.inBand = slices.DeleteFunc(s.inBand, isIt)
	s.outOfBand = slices.DeleteFunc(s.outOfBand, isIt)
}

func (r *request) cost() int { return len(r.id) + len(r.command) + itemOverhead }

// queueLocal queues the bridge's own answers whose turn has come.
func (s *session) queueLocal() error {
	for len(s.inBand) > 0 && s.inBand[0].local != nil {
		r := s.inBand[0]
		s.inBand = s.inBand[1:]
		s.unanswered -= r.cost()
		if err := s.queue(answer{line: r.local, end: r.end}); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) queue(a answer) error {
	if s.over() {
		return nil
	}
	if !s.toToolstack.put(a, len(a.line)+itemOverhead) {
		return fmt.Errorf("the toolstack has not read %d bytes of answers", maxQueued)
	}
	return nil
}

// readQEMU takes one line of QEMU into the queue toward the toolstack, and says whether it did something.
func (s *session) readQEMU() bool {
	if s.gone {
		return false
	}
	m, err := s.answers.next()
	if err == errNothingYet && s.writeErr == nil {
		return false
	}
	if err != nil {
		s.qemuFailed(err)
		return true
	}
	good, failed := m.has(memberReturn), m.has(memberError)
	switch {
	case good != failed:
		err = s.readAnswer(m, good)
	case good: // and failed: nonsense
		err = fmt.Errorf("QEMU sent what is not QMP: %.100q", m.text)
	case m.has(memberEvent):
		s.events++
		s.answers.drop(m)
	case m.has(memberGreeting) && m.size <= MaxAnswer-2:
		s.greeted = true
		err = s.queue(s.answerLine(m))
	default:
		err = fmt.Errorf("QEMU sent what is not QMP: %.100q", m.text)
	}
	if err != nil {
		s.end(err)
	}
	return true
}

// qemuFailed takes an error of reading; errNothingYet when writing has failed and all that came has been read.
func (s *session) qemuFailed(err error) {
	var bad *syntaxError
	switch {
	case err == errNothingYet:
		s.qemuGone(s.writeErr)
	case errors.As(err, &bad):
		s.end(fmt.Errorf("QEMU sent what is not QMP: %w", bad))
	case errors.Is(err, io.EOF):
		s.qemuGone(err)
	default:
		s.qemuGone(fmt.Errorf("read from QEMU's monitor: %w", err))
	}
}

func (s *session) readAnswer(m *message, good bool) error {
	r, err := s.take(m, good)
	if err != nil {
		return err
	}
	s.answered++
	s.saves.answered(r, good)
	if s.debug { // the time alone costs as much as a system call, or is one
		s.log.Debug("QMP command answered", "command", r.command, "good", good, "took", time.Since(r.sent))
	}
	var a answer
	if m.size <= MaxAnswer-2 {
		a = s.answerLine(m)
	} else {
		a.line = errorLine(r.id, fmt.Sprintf("%s: QEMU's answer has %d bytes, the toolstack takes %d",
			r.command, m.size, MaxAnswer-2))
		s.answers.drop(m)
		s.log.Warn("QMP answer too large for the toolstack", "command", r.command, "bytes", m.size)
	}
	if r.save {
		a.save = &outcome{id: r.id, good: good, seen: time.Now()}
		if !good {
			a.save.cause = fmt.Errorf("QEMU: %.200s", m.raw(memberError))
		}
	} else if r != s.sending {
		s.spare = r
	}
	if err := s.queue(a); err != nil {
		return err
	}
	return s.queueLocal()
}

// take finds the request that m answers. QEMU answers in order, except exec-oob,
// where ids tell.
func (s *session) take(m *message, good bool) (*request, error) {
	id := m.raw(memberID)
	if id != nil {
		for i, r := range s.outOfBand {
			if sameJSON(r.id, id) {
				s.outOfBand = slices.Delete(s.outOfBand, i, i+1)
				s.unanswered -= r.cost()
				return r, nil
			}
		}
	}
	if len(s.inBand) == 0 {
		return nil, fmt.Errorf("QEMU answered a request that it did not get: %.100q", m.text)
	}
	r := s.inBand[0]
	// An error without id is QEMU's parser speaking; a discarded id is unknown.
	known := m.size == len(m.text) && (good || id != nil)
	if known && !sameJSON(r.id, id) {
		return nil, fmt.Errorf("QEMU answered request %.100q when %.100q was next", id, r.id)
	}
	s.inBand = s.inBand[1:]
	s.unanswered -= r.cost()
	return r, nil
}

// qemuGone answers what QEMU will not answer any more, and ends the session when
// that is written, or soon (drainLimit).
func (s *session) qemuGone(err error) {
	cause := errQEMUClosed
	if !errors.Is(err, io.EOF) {
		cause = fmt.Errorf("%w: %w", errQEMUClosed, err)
	}
	s.hangUp()
	if s.over() { // nobody is left to tell
		return
	}
	unanswered := append(s.outOfBand, s.inBand...)
	for _, r := range unanswered {
		a := answer{line: r.local}
		if r.local == nil {
			a.line = errorLine(r.id, r.command+": "+errQEMUClosed.Error())
		}
		if r.save {
			a.save = &outcome{id: r.id, cause: cause}
		}
		if s.queue(a) != nil {
			break
		}
	}
	s.inBand, s.outOfBand = nil, nil
	// libxl, which waits for an answer, looks for the connection's end first, and would not read the error: it has drainLimit to
	// close by itself. So it does with the answer of a save that is being handed over, or could not be: for that, QEMU's end may be the reason.
	if len(unanswered) == 0 && s.saving == nil && !s.saveFailed {
		s.toToolstack.put(answer{end: cause}, 0)
	}
	s.limit = time.AfterFunc(drainLimit, func() { s.end(cause) })
}

// hangUp closes QEMU's monitor.
func (s *session) hangUp() {
	s.gone = true
	s.qemu.Close()
}

// deliver writes answers to the toolstack, a save's only when the state has been handed over. It says whether it did something.
func (s *session) deliver() (moved bool) {
	for !s.committing && !s.over() {
		a := &s.delivering
		if !s.out {
			if *a, s.out = s.toToolstack.take(); !s.out {
				return moved
			}
			moved = true
			if a.save != nil {
				s.commit(a)
				continue
			}
		}
		if len(a.line) > 0 {
			n, err := s.toolstack.TryWrite(a.line)
			a.line = a.line[n:]
			moved = moved || n > 0
			if err != nil {
				s.end(toolstackError("write to", err))
				return true
			}
			if len(a.line) > 0 {
				return moved
			}
		}
		s.out = false
		s.delivered(a)
	}
	return moved
}

func (s *session) delivered(a *answer) {
	if a.text != nil {
		s.answers.release(a.text)
	}
	if a.save != nil {
		s.saving, s.saved = nil, nil
		if a.save.good {
			s.saves.saved()
			s.log.Info("device state saved", "took", time.Since(a.save.seen))
		}
	}
	if a.end != nil {
		s.end(a.end)
		return
	}
	s.qemu.Linger()
}

// commit hands a saved state over before its answer leaves, or ends a save that failed.
func (s *session) commit(a *answer) {
	s.committing = true
	save, line := a.save, a.line
	err := save.cause
	s.beside(func() {
		switch {
		case save.good:
			if err = s.Save.Commit(s.ctx); err != nil {
				err = fmt.Errorf("hand the device state to the toolstack: %w", err)
				line = errorLine(save.id, err.Error())
			}
		default:
			if why := s.Save.Explain(err); why != nil {
				err, line = why, errorLine(save.id, why.Error())
			}
		}
		if err != nil {
			s.abort(err)
		}
	}, func() {
		s.committing = false
		a.line, save.good = line, err == nil
		if err != nil {
			s.saving, s.saveFailed = nil, true
		}
	})
}

// toolstackError tells a toolstack that is gone, as it may be at any time, from
// a connection that failed.
func toolstackError(op string, err error) error {
	for _, gone := range []error{io.EOF, io.ErrUnexpectedEOF, io.ErrClosedPipe, net.ErrClosed, syscall.EPIPE, syscall.ECONNRESET} {
		if errors.Is(err, gone) {
			return errToolstackClosed
		}
	}
	return fmt.Errorf("%s the toolstack: %w", op, err)
}

// answerLine is m as a line for the toolstack.
func (s *session) answerLine(m *message) answer {
	s.answers.keep(m)
	l := append(m.text, "\r\n"...)
	if m.newlines { // pretty=on; a string holds no raw newline
		for i, c := range l[:len(l)-2] {
			if c == '\n' || c == '\r' {
				l[i] = ' '
			}
		}
	}
	return answer{line: l, text: l}
}

// errorLine is an error answer in QMP's form. An id that would make it too large
// for the toolstack is left out.
func errorLine(id []byte, desc string) []byte {
	type qmpError struct {
		Class string `json:"class"`
		Desc  string `json:"desc"`
	}
	e, err := json.Marshal(qmpError{"GenericError", desc})
	if err != nil { // two strings
		panic(err)
	}
	var b bytes.Buffer
	b.WriteByte('{')
	if id != nil && len(id)+len(e)+64 <= MaxAnswer {
		fmt.Fprintf(&b, `"id": %s, `, id)
	}
	fmt.Fprintf(&b, "\"error\": %s}\r\n", e)
	return b.Bytes()
}

// returnLine is the answer of a command that returns nothing.
func returnLine(id []byte) []byte {
	if id == nil {
		return []byte("{\"return\": {}}\r\n")
	}
	return fmt.Appendf(nil, "{\"return\": {}, \"id\": %s}\r\n", id)
}

// sameJSON says whether two values are equal: QEMU writes an id in its own way.
func sameJSON(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	var x, y any
	if json.Unmarshal(a, &x) != nil || json.Unmarshal(b, &y) != nil {
		return false
	}
	return reflect.DeepEqual(x, y)
}
