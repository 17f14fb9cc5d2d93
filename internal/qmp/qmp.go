// Package qmp speaks the QEMU Machine Protocol over one connection. Its Monitor implements go-qemu's qmp.Monitor interface and, unlike
// go-qemu's own SocketMonitor, takes lines of any length up to MaxLine, many commands at once, contexts, and descriptors.
//
// The protocol is QEMU's docs/interop/qmp-spec: a greeting, then one JSON object a line in each direction. A command carries an id, its answer
// repeats it; events come in between at any time.
package qmp

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	goqmp "github.com/digitalocean/go-qemu/qmp"
	"golang.org/x/sys/unix"
)

const (
	// MaxLine is the longest line, in bytes with its line end, that is taken from QEMU. A longer one ends the connection.
	MaxLine = 16 << 20
	// MaxQueue bounds what is kept for one subscriber that does not read: the bytes of the events' lines plus 64 for each. It is room for
	// about 40 000 events such as STOP. See Monitor.Events.
	MaxQueue = 8 << 20
	// MaxUnanswered is how many commands may wait for their answer, those whose caller has given up included.
	MaxUnanswered = 1024
	// ConnectLimit is how long Connect waits, RunLimit how long Run does: go-qemu's interface has no context for them.
	ConnectLimit = 30 * time.Second
	RunLimit     = 10 * time.Minute

	eventOverhead = 64
)

// ErrClosed is in every error that the end of the connection causes; the cause is wrapped beside it.
var ErrClosed = errors.New("connection closed")

var errDisconnected = errors.New("Disconnect was called")

// Event is an event as go-qemu defines it.
type Event = goqmp.Event

// Version is QEMU's version as go-qemu defines it.
type Version = goqmp.Version

// Error is QEMU's own error answer to a command.
type Error struct {
	Class string `json:"class"` // GenericError, CommandNotFound, DeviceNotFound … (QapiErrorClass)
	Desc  string `json:"desc"`  // for humans
}

func (e *Error) Error() string {
	if e.Class == "" || e.Class == "GenericError" {
		return e.Desc
	}
	return e.Class + ": " + e.Desc
}

// Stats counts what a Monitor has thrown away.
type Stats struct {
	DroppedEvents uint64 // events that a subscriber lost because its queue was at MaxQueue
	StrayReplies  uint64 // answers to no command of ours
}

// Monitor is a QMP client on one connection. Its methods may be called from any goroutine, from a loop over Events too.
type Monitor struct {
	conn net.Conn

	writing  chan struct{} // holds a token while a line is written
	fileBusy chan struct{} // holds a token while a descriptor is on its way, see ExecuteWithFile
	greeted  chan struct{} // closed by the reader at the greeting
	done     chan struct{} // closed when the connection has ended; err is set before
	leave    chan struct{} // closed by Disconnect: subscribers stop too

	goroutines sync.WaitGroup

	mu           sync.Mutex
	started      bool // the reader runs
	ready        bool // capabilities are negotiated
	disconnected bool
	version      Version
	calls        map[string]*call // by id, in flight
	subscribers  map[*subscriber]struct{}
	stats        Stats
	err          error
}

var _ goqmp.Monitor = (*Monitor)(nil)

// call is a command in flight. It stays until its answer comes, even when nobody waits any more.
type call struct {
	reply    chan message // room for the one answer, so that the reader never waits
	withFile bool
}

// message is any line from QEMU. For an event the embedded Event is filled.
type message struct {
	Event
	Greeting *struct {
		Version Version `json:"version"`
	} `json:"QMP"`
	Return json.RawMessage `json:"return"`
	Error  *Error          `json:"error"`
	ID     json.RawMessage `json:"id"`
}

// New makes a Monitor that owns conn. Nothing is read or written before Connect.
func New(conn net.Conn) *Monitor {
	return &Monitor{
		conn:        conn,
		writing:     make(chan struct{}, 1),
		fileBusy:    make(chan struct{}, 1),
		greeted:     make(chan struct{}),
		done:        make(chan struct{}),
		leave:       make(chan struct{}),
		calls:       make(map[string]*call),
		subscribers: make(map[*subscriber]struct{}),
	}
}

// Connect is ConnectContext with ConnectLimit.
func (m *Monitor) Connect() error {
	ctx, cancel := context.WithTimeout(context.Background(), ConnectLimit)
	defer cancel()
	return m.ConnectContext(ctx)
}

// ConnectContext waits for QEMU's greeting and negotiates capabilities (none; out-of-band execution is not used). It can be called once; when it
// fails the connection is closed.
func (m *Monitor) ConnectContext(ctx context.Context) error {
	m.mu.Lock()
	if m.err != nil {
		defer m.mu.Unlock()
		return fmt.Errorf("qmp connect: %w", m.err)
	}
	if m.started {
		m.mu.Unlock()
		return errors.New("qmp connect: already connected")
	}
	m.started = true
	m.goroutines.Go(m.read)
	m.mu.Unlock()

	select {
	case <-m.greeted:
	case <-m.done:
		return fmt.Errorf("qmp connect: %w", m.Err())
	case <-ctx.Done():
		err := fmt.Errorf("qmp connect: no greeting from QEMU: %w", ctx.Err())
		m.end(err)
		return err
	}
	if _, err := m.do(ctx, "qmp_capabilities", command("qmp_capabilities", nil), nil); err != nil {
		m.end(err)
		return err
	}
	m.mu.Lock()
	m.ready = true
	m.mu.Unlock()
	return nil
}

// Disconnect closes the connection, wakes everyone who waits on it, closes the channels of Events and waits for the Monitor's goroutines.
func (m *Monitor) Disconnect() error {
	err := m.end(errDisconnected)
	m.mu.Lock()
	if !m.disconnected {
		m.disconnected = true
		close(m.leave)
	}
	m.mu.Unlock()
	m.goroutines.Wait()
	if err != nil {
		return fmt.Errorf("qmp disconnect: %w", err)
	}
	return nil
}

// Version is QEMU's version from the greeting, zero before it.
func (m *Monitor) Version() Version {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.version
}

// Done is closed when the connection has ended.
func (m *Monitor) Done() <-chan struct{} { return m.done }

// Err says why the connection ended (ErrClosed and the cause), nil while it has not.
func (m *Monitor) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Stats returns the counts so far.
func (m *Monitor) Stats() Stats {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stats
}

// Run sends a command given as a JSON object and returns the whole answer, as go-qemu's interface wants. The command's own id, if it has one, comes
// back in the answer. An error answer is an *Error. Run waits RunLimit at most.
func (m *Monitor) Run(line []byte) ([]byte, error) {
	ctx, cancel := context.WithTimeout(context.Background(), RunLimit)
	defer cancel()
	var cmd map[string]json.RawMessage
	if err := json.Unmarshal(line, &cmd); err != nil {
		return nil, fmt.Errorf("qmp run: command is not a JSON object: %w", err)
	}
	var name string
	if err := json.Unmarshal(cmd["execute"], &name); err != nil {
		return nil, errors.New(`qmp run: command has no "execute" with a name`)
	}
	id, hasID := cmd["id"]
	result, err := m.execute(ctx, name, cmd, nil)
	if err != nil {
		return nil, err
	}
	answer := append([]byte(`{"return": `), result...)
	if hasID {
		answer = append(append(answer, `, "id": `...), id...)
	}
	return append(answer, '}'), nil
}

// Execute sends a command and returns the value of its answer. args is marshalled with encoding/json to an object; nil means none. When ctx ends first
// QEMU may still carry the command out; its answer is dropped. Errors wrap *Error, ErrClosed, or ctx's error.
func (m *Monitor) Execute(ctx context.Context, name string, args any) (json.RawMessage, error) {
	arguments, err := marshalArgs(name, args)
	if err != nil {
		return nil, err
	}
	return m.execute(ctx, name, command(name, arguments), nil)
}

// ExecuteWithFile is Execute with a descriptor sent along (SCM_RIGHTS), for add-fd and getfd. The connection must be a Unix socket. f stays the
// caller's and its file modes are not changed. QEMU keeps only the latest descriptor that it has received, so a second call waits for the answer to the first.
func (m *Monitor) ExecuteWithFile(ctx context.Context, name string, args any, f *os.File) (json.RawMessage, error) {
	arguments, err := marshalArgs(name, args)
	if err != nil {
		return nil, err
	}
	if f == nil {
		return nil, fmt.Errorf("qmp %s: no descriptor to send: %w", name, os.ErrInvalid)
	}
	if _, ok := m.conn.(*net.UnixConn); !ok {
		return nil, fmt.Errorf("qmp %s: descriptors can only be sent over a Unix socket, not %T", name, m.conn)
	}
	return m.execute(ctx, name, command(name, arguments), f)
}

func marshalArgs(name string, args any) (json.RawMessage, error) {
	if args == nil {
		return nil, nil
	}
	b, err := json.Marshal(args)
	if err != nil {
		return nil, fmt.Errorf("qmp %s: arguments: %w", name, err)
	}
	if b[0] != '{' {
		return nil, fmt.Errorf("qmp %s: arguments: %T does not make a JSON object", name, args)
	}
	return b, nil
}

func command(name string, arguments json.RawMessage) map[string]json.RawMessage {
	quoted, err := json.Marshal(name)
	if err != nil {
		panic(err) // a string always marshals
	}
	cmd := map[string]json.RawMessage{"execute": quoted}
	if arguments != nil {
		cmd["arguments"] = arguments
	}
	return cmd
}

func (m *Monitor) execute(ctx context.Context, name string, cmd map[string]json.RawMessage, f *os.File) (json.RawMessage, error) {
	m.mu.Lock()
	ready, err := m.ready, m.err
	m.mu.Unlock()
	switch {
	case err != nil:
		return nil, fmt.Errorf("qmp %s: %w", name, err)
	case !ready:
		return nil, fmt.Errorf("qmp %s: not connected: call Connect first", name)
	}
	return m.do(ctx, name, cmd, f)
}

// lastID makes ids unique in the process: an answer that QEMU owes to an earlier connection of ours on the same chardev cannot be taken for this one's.
var lastID atomic.Uint64

func (m *Monitor) do(ctx context.Context, name string, cmd map[string]json.RawMessage, f *os.File) (json.RawMessage, error) {
	id := "stubinit-" + strconv.FormatUint(lastID.Add(1), 10)
	cmd["id"] = json.RawMessage(`"` + id + `"`)
	line, err := json.Marshal(cmd)
	if err != nil {
		return nil, fmt.Errorf("qmp %s: %w", name, err)
	}
	c := &call{reply: make(chan message, 1), withFile: f != nil}
	if c.withFile {
		if err := m.acquire(ctx, m.fileBusy); err != nil {
			return nil, fmt.Errorf("qmp %s: not sent: %w", name, err)
		}
	}
	if err := m.register(id, c); err != nil {
		m.release(c)
		return nil, fmt.Errorf("qmp %s: %w", name, err)
	}
	if err := m.send(ctx, append(line, '\n'), f); err != nil {
		m.forget(id, c)
		return nil, fmt.Errorf("qmp %s: not sent: %w", name, err)
	}

	var reply message
	select {
	case reply = <-c.reply:
	case <-ctx.Done():
		return nil, fmt.Errorf("qmp %s: no answer: %w", name, ctx.Err())
	case <-m.done:
		// The answer may have been the last thing that came.
		select {
		case reply = <-c.reply:
		default:
			return nil, fmt.Errorf("qmp %s: %w", name, m.Err())
		}
	}
	if reply.Error != nil {
		return nil, fmt.Errorf("qmp %s: %w", name, reply.Error)
	}
	return reply.Return, nil
}

func (m *Monitor) register(id string, c *call) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	if len(m.calls) >= MaxUnanswered {
		return fmt.Errorf("QEMU has not answered %d commands", len(m.calls))
	}
	m.calls[id] = c
	return nil
}

// forget undoes register for a command that QEMU has not seen.
func (m *Monitor) forget(id string, c *call) {
	m.mu.Lock()
	_, ours := m.calls[id]
	delete(m.calls, id)
	m.mu.Unlock()
	if ours {
		m.release(c)
	}
}

func (m *Monitor) release(c *call) {
	if c.withFile {
		<-m.fileBusy
	}
}

func (m *Monitor) acquire(ctx context.Context, token chan struct{}) error {
	select {
	case token <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-m.done:
		return m.Err()
	}
}

// send writes one line, with f attached if there is one.
func (m *Monitor) send(ctx context.Context, line []byte, f *os.File) error {
	if f == nil {
		return m.write(ctx, line, nil)
	}
	// Not f.Fd(): it would make the file blocking for its owner.
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var writeErr error
	if err := raw.Control(func(fd uintptr) { writeErr = m.write(ctx, line, unix.UnixRights(int(fd))) }); err != nil {
		return fmt.Errorf("descriptor of %s: %w", f.Name(), os.ErrClosed) // Control's one error, which os does not translate
	}
	return writeErr
}

// write writes one line; rights go with its first byte. When ctx ends in the middle of the line the connection is of no use any more and is closed.
func (m *Monitor) write(ctx context.Context, line, rights []byte) error {
	if err := m.acquire(ctx, m.writing); err != nil {
		return err
	}
	defer func() { <-m.writing }()
	if err := ctx.Err(); err != nil {
		return err
	}

	expired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		m.conn.SetWriteDeadline(time.Unix(1, 0)) // a moment that has passed: Write returns
		close(expired)
	})
	var n int
	var err error
	if rights != nil {
		n, _, err = m.conn.(*net.UnixConn).WriteMsgUnix(line, rights, nil) // checked by ExecuteWithFile
	}
	if err == nil && n < len(line) {
		var more int
		more, err = m.conn.Write(line[n:])
		n += more
	}
	if !stop() {
		<-expired
		m.conn.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return nil
	case ctx.Err() == nil:
		m.end(err)
	case n == 0 && errors.Is(err, os.ErrDeadlineExceeded):
		return ctx.Err()
	default:
		m.end(fmt.Errorf("%w after %d of %d bytes of a command", ctx.Err(), n, len(line)))
	}
	return m.Err()
}

// end closes the connection for a cause. Only the first call counts; it returns the error of closing.
func (m *Monitor) end(cause error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return nil
	}
	m.err = fmt.Errorf("%w: %w", ErrClosed, cause)
	close(m.done)
	return m.conn.Close()
}

// read is the one reader of the connection, until its end.
func (m *Monitor) read() {
	r := bufio.NewReaderSize(m.conn, 64<<10)
	for {
		line, err := readLine(r)
		if err == nil && len(line) != 0 {
			err = m.route(line)
		}
		if err != nil {
			m.end(err)
			return
		}
	}
}

// readLine returns the next line in memory of its own, without white space around it.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > MaxLine {
			return nil, fmt.Errorf("line from QEMU is longer than %d bytes", MaxLine)
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return bytes.TrimSpace(line), nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF) && len(line) > 0:
			return nil, fmt.Errorf("%w in the middle of a line", io.ErrUnexpectedEOF)
		default:
			return nil, err
		}
	}
}

// route hands a line to whoever waits for it. An error means that what QEMU sends cannot be trusted any more.
func (m *Monitor) route(line []byte) error {
	var msg message
	if err := json.Unmarshal(line, &msg); err != nil {
		return fmt.Errorf("line from QEMU is not QMP: %q: %w", excerpt(line), err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.isGreeted() {
		if msg.Greeting == nil {
			return fmt.Errorf("no greeting: QEMU's first line is %q", excerpt(line))
		}
		m.version = msg.Greeting.Version
		close(m.greeted)
		return nil
	}
	switch {
	case msg.Event.Event != "":
		for s := range m.subscribers {
			m.stats.DroppedEvents += s.put(line)
		}
		return nil
	case msg.Return != nil || msg.Error != nil:
		return m.answer(msg)
	}
	return fmt.Errorf("line from QEMU is neither answer nor event: %q", excerpt(line))
}

func (m *Monitor) isGreeted() bool {
	select {
	case <-m.greeted:
		return true
	default:
		return false
	}
}

// answer gives a reply to its call. m.mu is held.
func (m *Monitor) answer(msg message) error {
	var id string
	if msg.ID != nil {
		if json.Unmarshal(msg.ID, &id) != nil {
			id = "" // not one of ours
		}
	} else {
		// QEMU leaves the id out when it could not parse the command; that is ours only if there is no choice.
		if len(m.calls) > 1 {
			return fmt.Errorf("answer without id while %d commands wait", len(m.calls))
		}
		for id = range m.calls {
		}
	}
	c, ok := m.calls[id]
	if !ok {
		m.stats.StrayReplies++
		return nil
	}
	delete(m.calls, id)
	c.reply <- msg
	m.release(c)
	return nil
}

func excerpt(line []byte) []byte {
	const most = 80
	return line[:min(len(line), most)]
}
