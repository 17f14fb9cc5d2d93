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
	"os"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"
)

var (
	errToolstackClosed = errors.New("the toolstack closed the session")
	errQEMUClosed      = errors.New("QEMU closed its monitor")

	// errNoMore ends the reading of one side; the session goes on until what is
	// queued has been written.
	errNoMore = errors.New("nothing more to read")
)

// A request is one value from the toolstack.
type request struct {
	line     []byte // with its line end; nil once written
	command  string
	oob      bool   // exec-oob: QEMU may answer it before others
	id       []byte // as the toolstack wrote it; nil without
	hostaddr string // of a device_add that may have to wait
	part     part
	save     bool      // QEMU gets it, and fdset 1 is prepared
	resumes  bool      // cont, after a save
	sent     time.Time // only for the debug log

	// local is the answer when the request is not for QEMU; the session ends with
	// it if end is set.
	local []byte
	end   error

	released chan struct{} // of a save: closed when its answer has left
}

// An answer is one line for the toolstack.
type answer struct {
	line  []byte
	kept  bool  // line is a message's, to be released
	end   error // ends the session once the line, if any, is written
	save  *request
	good  bool  // QEMU saved
	cause error // why not
	seen  time.Time
}

// A session is one toolstack connection and its own connection to QEMU.
type session struct {
	*Options
	saves     *interlock
	ctx       context.Context
	end       context.CancelCauseFunc
	log       *slog.Logger
	debug     bool // log's level
	toolstack net.Conn
	qemu      net.Conn

	requests    *splitter
	answers     *splitter
	toQEMU      outbox[*request]
	toToolstack outbox[answer]

	mu         sync.Mutex
	inBand     []*request // sent, not answered, in order
	outOfBand  []*request
	unanswered int // bytes kept of both
	greeted    bool
	late       bool // the session is over, and answers have a deadline
	timedOut   bool // they did not come
	gone       bool
	saving     *request // prepared, and neither answered nor aborted

	events   int // counted by the reader of QEMU
	answered int
}

func serveSession(ctx context.Context, toolstack net.Conn, o *Options, saves *interlock, log *slog.Logger) {
	start := time.Now()
	defer toolstack.Close()
	qemu, err := o.Dial(ctx)
	if err != nil {
		log.Warn("QMP session refused: QEMU's monitor cannot be reached", "err", err)
		return
	}
	defer qemu.Close()

	s := &session{
		Options: o, saves: saves, log: log, debug: log.Enabled(ctx, slog.LevelDebug), toolstack: toolstack, qemu: qemu,
		requests:    newSplitter(toolstack, MaxRequest, false),
		answers:     newSplitter(qemu, MaxAnswer, true),
		toQEMU:      outbox[*request]{limit: MaxRequest},
		toToolstack: outbox[answer]{limit: maxQueued},
	}
	s.ctx, s.end = context.WithCancelCause(ctx)
	defer s.end(nil)

	var wg sync.WaitGroup
	wg.Go(func() {
		<-s.ctx.Done()
		s.close()
	})
	stop := context.AfterFunc(ctx, func() { qemu.Close() })
	defer stop()
	s.pump(&wg, s.readToolstack, func(pass func()) error {
		return s.toQEMU.flush(func(r *request) error { return s.send(r, pass) })
	})
	s.pump(&wg, s.readQEMU, s.flushToToolstack)
	wg.Wait()

	cause := context.Cause(s.ctx)
	if s.timedOut {
		log.Warn("QEMU has not answered; the next session may get an answer that is not its own, and end",
			"requests", len(s.inBand)+len(s.outOfBand), "waited", answerLimit)
	}
	if s.saving != nil {
		s.abort(fmt.Errorf("the session ended during the save: %w", cause))
	}
	level := slog.LevelWarn
	if errors.Is(cause, errToolstackClosed) || ctx.Err() != nil {
		level = slog.LevelDebug
	}
	log.Log(ctx, level, "QMP session ended", "cause", cause, "answers", s.answered,
		"events dropped", s.events, "took", time.Since(start))
}

// close ends what waits on a connection, once the session is over, but for what
// is still to come from QEMU. QEMU (seen with 7.2) gives a command's answer to
// whoever is connected when the command is done, so the monitor's connection
// stays until all that was asked is answered: the next session would get it. It
// also stays until the greeting: QEMU listens with a backlog of 1, and connections
// that were closed before QEMU took them would fill that. Nobody loses by it, the
// next session's greeting could not come any sooner.
func (s *session) close() {
	s.toolstack.Close()
	s.qemu.SetWriteDeadline(time.Unix(1, 0))
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closeIfAnswered()
}

// closeIfAnswered closes the monitor when the session is over and nothing is
// left to come. With s.mu held.
func (s *session) closeIfAnswered() {
	switch {
	case !s.over() || !s.greeted:
	case len(s.inBand) == 0 && len(s.outOfBand) == 0:
		s.qemu.Close()
	case !s.late:
		s.late = true
		s.qemu.SetReadDeadline(time.Now().Add(answerLimit))
	}
}

func (s *session) over() bool { return s.ctx.Err() != nil }

// pump moves values one way until read fails. The goroutine that has read a value
// writes it too, so that a round trip waits for no other one. Before it waits for
// anything else than its next value it passes the reading on to the second goroutine,
// so that a peer which does not read never keeps the bridge from reading the other.
func (s *session) pump(wg *sync.WaitGroup, read func() error, flush func(pass func()) error) {
	turn, stop := make(chan struct{}, 1), make(chan struct{})
	turn <- struct{}{}
	for range 2 {
		wg.Go(func() {
			reads := false // it is this one's turn
			pass := func() {
				if reads {
					reads = false
					turn <- struct{}{}
				}
			}
			for {
				if !reads {
					select {
					case <-turn:
						reads = true
					case <-stop:
						return
					}
				}
				err := read()
				if err != nil {
					reads = false
					close(stop)
				}
				if err != nil && err != errNoMore {
					s.end(err)
					return
				}
				if err := flush(pass); err != nil {
					s.end(err)
				}
				if err != nil {
					return
				}
			}
		})
	}
}

// write writes all of b. Before it has to wait it calls pass; for a connection that
// cannot tell, always.
func write(c net.Conn, b []byte, pass func()) error {
	if c, ok := c.(interface {
		TryWrite([]byte) (int, error) // writes what the peer takes at once
	}); ok {
		n, err := c.TryWrite(b)
		if err != nil || n == len(b) {
			return err
		}
		b = b[n:]
	}
	pass()
	_, err := c.Write(b)
	return err
}

// readToolstack takes one request into the queue toward QEMU.
func (s *session) readToolstack() error {
	m, err := s.requests.next()
	var bad *syntaxError
	switch {
	case errors.As(err, &bad):
		// The splitter only drops input from here on, and still sees the close.
		s.toQEMU.put(&request{
			local: errorLine(bad.id, bad.desc),
			end:   fmt.Errorf("the toolstack sent what is not QMP: %w", bad),
		}, 0)
		return nil
	case err != nil:
		return toolstackError("read from", err)
	}
	r := s.parse(&m)
	s.requests.drop(&m)
	if !s.toQEMU.put(r, len(r.line)+itemOverhead) {
		return fmt.Errorf("more than %d bytes of requests wait for QEMU, which does not read them", MaxRequest)
	}
	return nil
}

func (s *session) parse(m *message) *request {
	r := &request{line: line(m.text, "\n"), id: bytes.Clone(m.raw(memberID))}
	if !m.has(memberExecute) {
		r.command, r.oob = m.str(memberExecOOB), m.has(memberExecOOB)
		return r
	}
	r.command = m.str(memberExecute)
	var arguments map[string]any
	if r.command == "device_add" && s.PCIReady != nil && json.Unmarshal(m.raw(memberArguments), &arguments) == nil &&
		arguments["driver"] == "xen-pci-passthrough" {
		r.hostaddr, _ = arguments["hostaddr"].(string)
	}
	if s.Save != nil {
		r.part = m.part(r.command)
	}
	return r
}

// send writes one request to QEMU. The requests after it wait until it returns.
func (s *session) send(r *request, pass func()) error {
	if r.part != noPart {
		s.interlock(r)
	}
	switch {
	case r.hostaddr != "":
		pass()
		s.hold(r)
	case r.part == saveState && r.local == nil:
		pass()
		s.prepare(r)
	}
	if err := s.expect(r); err != nil {
		return err
	}
	if r.local != nil {
		return s.flushToToolstack(pass)
	}
	text := r.line
	r.line = nil
	if err := write(s.qemu, text, pass); err != nil {
		if s.over() {
			s.unexpect(r)
			return context.Cause(s.ctx)
		}
		s.qemuGone(fmt.Errorf("write to QEMU's monitor: %w", err))
		return s.flushToToolstack(pass)
	}
	if r.save {
		pass()
		select {
		case <-r.released:
		case <-s.ctx.Done():
			return context.Cause(s.ctx)
		}
	}
	return nil
}

// hold waits for the PCI device of a device_add.
func (s *session) hold(r *request) {
	ctx, cancel := context.WithTimeout(s.ctx, pciLimit)
	defer cancel()
	start := time.Now()
	err := s.PCIReady(ctx, r.hostaddr)
	log := s.log.With("hostaddr", r.hostaddr, "waited", time.Since(start))
	if err != nil && s.ctx.Err() == nil {
		log.Warn("device_add goes to QEMU, though its PCI device is not there", "err", err)
	} else if err == nil {
		log.Info("device_add goes to QEMU: its PCI device is there")
	}
}

// prepare starts a save; when that fails the request gets its answer here.
func (s *session) prepare(r *request) {
	s.saving = r
	r.save, r.released = true, make(chan struct{})
	if err := s.Save.Prepare(s.ctx); err != nil {
		err = fmt.Errorf("prepare to save the device state: %w", err)
		s.abort(err)
		r.save, r.local = false, errorLine(r.id, err.Error())
	}
}

// abort ends the save that is under way as failed.
func (s *session) abort(cause error) {
	s.saving = nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), abortLimit)
	defer cancel()
	s.log.Error("device state not saved", "err", cause)
	if err := s.Save.Abort(ctx, cause); err != nil {
		s.log.Error("the guest may stay paused after the failed save", "err", err)
	}
}

// expect notes that r will be answered.
func (s *session) expect(r *request) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over() {
		return context.Cause(s.ctx)
	}
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
		s.inBand = append(s.inBand, r)
	}
	return s.queueLocal()
}

// unexpect takes back the last expect, of a request that QEMU did not get whole.
func (s *session) unexpect(r *request) {
	s.saves.answered(r, false)
	s.mu.Lock()
	defer s.mu.Unlock()
	isIt := func(q *request) bool { return q == r }
	s.inBand = slices.DeleteFunc(s.inBand, isIt)
	s.outOfBand = slices.DeleteFunc(s.outOfBand, isIt)
	s.closeIfAnswered()
}

func (r *request) cost() int { return len(r.id) + len(r.command) + itemOverhead }

// queueLocal queues the bridge's own answers whose turn has come. With s.mu held.
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

// readQEMU takes one line of QEMU into the queue toward the toolstack.
func (s *session) readQEMU() error {
	m, err := s.answers.next()
	var bad *syntaxError
	switch {
	case errors.As(err, &bad):
		return fmt.Errorf("QEMU sent what is not QMP: %w", bad)
	case err != nil:
		if !errors.Is(err, io.EOF) {
			err = fmt.Errorf("read from QEMU's monitor: %w", err)
		}
		s.qemuGone(err)
		return errNoMore
	}
	good, failed := m.has(memberReturn), m.has(memberError)
	switch {
	case good != failed:
		return s.readAnswer(&m, good)
	case good: // and failed: nonsense
	case m.has(memberEvent):
		s.events++
		s.answers.drop(&m)
		return nil
	case m.has(memberGreeting) && m.size <= MaxAnswer-2:
		s.mu.Lock()
		defer s.mu.Unlock()
		s.greeted = true
		s.closeIfAnswered()
		return s.queue(answer{line: lineOut(&m), kept: m.kept})
	}
	return fmt.Errorf("QEMU sent what is not QMP: %.100q", m.text)
}

func (s *session) readAnswer(m *message, good bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
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
		a.line, a.kept = lineOut(m), m.kept
	} else {
		a.line = errorLine(r.id, fmt.Sprintf("%s: QEMU's answer has %d bytes, the toolstack takes %d",
			r.command, m.size, MaxAnswer-2))
		s.answers.drop(m)
		s.log.Warn("QMP answer too large for the toolstack", "command", r.command, "bytes", m.size)
	}
	if r.save {
		a.save, a.good, a.seen = r, good, time.Now()
		if !good {
			a.cause = fmt.Errorf("QEMU: %.200s", m.raw(memberError))
		}
	}
	if err := s.queue(a); err != nil {
		return err
	}
	err = s.queueLocal()
	s.closeIfAnswered()
	return err
}

// take finds the request that m answers. QEMU answers in order, except exec-oob,
// where ids tell. With s.mu held.
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
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.over() { // nobody is left to tell
		s.timedOut = errors.Is(err, os.ErrDeadlineExceeded)
		return
	}
	if s.gone {
		return
	}
	s.gone = true
	unanswered := append(s.outOfBand, s.inBand...)
	for _, r := range unanswered {
		a := answer{line: r.local, cause: cause}
		if r.local == nil {
			a.line = errorLine(r.id, r.command+": "+errQEMUClosed.Error())
		}
		if r.save {
			a.save = r
		}
		if s.queue(a) != nil {
			break
		}
	}
	s.inBand, s.outOfBand = nil, nil
	// libxl, which waits for an answer, looks for the connection's end first, and would not read the error: it has drainLimit to
	// close by itself.
	if len(unanswered) == 0 {
		s.toToolstack.put(answer{end: cause}, 0)
	}
	time.AfterFunc(drainLimit, func() { s.end(cause) })
}

func (s *session) flushToToolstack(pass func()) error {
	return s.toToolstack.flush(func(a answer) error { return s.deliver(a, pass) })
}

// deliver writes one line to the toolstack, a save's answer only when the state
// has been handed over.
func (s *session) deliver(a answer, pass func()) error {
	if a.save != nil {
		pass()
		s.commit(&a)
	}
	if len(a.line) > 0 {
		if err := write(s.toolstack, a.line, pass); err != nil {
			return toolstackError("write to", err)
		}
	}
	if a.kept {
		s.answers.release(a.line)
	}
	if a.save != nil {
		s.saving = nil
		if a.good {
			s.saves.saved()
		}
		close(a.save.released)
		if a.good {
			s.log.Info("device state saved", "took", time.Since(a.seen))
		}
	}
	return a.end
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

func (s *session) commit(a *answer) {
	if !a.good {
		if why := s.Save.Explain(a.cause); why != nil {
			a.cause, a.line = why, errorLine(a.save.id, why.Error())
		}
		s.abort(a.cause)
		return
	}
	if err := s.Save.Commit(s.ctx); err != nil {
		err = fmt.Errorf("hand the device state to the toolstack: %w", err)
		s.abort(err)
		a.good, a.line = false, errorLine(a.save.id, err.Error())
	}
}

// lineOut is m as a line for the toolstack, in m's own buffer if that is kept.
func lineOut(m *message) []byte {
	var l []byte
	if m.kept {
		l = append(m.text, "\r\n"...)
	} else {
		l = line(m.text, "\r\n")
	}
	if m.newlines { // pretty=on; a string holds no raw newline
		for i, c := range l[:len(l)-2] {
			if c == '\n' || c == '\r' {
				l[i] = ' '
			}
		}
	}
	return l
}

func line(text []byte, end string) []byte {
	l := make([]byte, 0, len(text)+len(end))
	return append(append(l, text...), end...)
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
