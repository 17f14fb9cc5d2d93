package xenstoretest

import (
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
)

// take hands out bytes. s.mu is held.
func (c *Conn) take(b []byte) (int, error) {
	switch {
	case c.closed:
		return 0, fs.ErrClosed
	case len(c.out) == 0:
		return 0, io.EOF
	}
	if limit := c.s.faults.Chunk; limit != 0 && limit < len(b) {
		b = b[:limit]
	}
	n := copy(b, c.out)
	c.out = c.out[n:]
	return n, nil
}

// Close ends the connection with its watches and transactions.
func (c *Conn) Close() error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.closed {
		return fs.ErrClosed
	}
	c.closed = true
	c.watches = nil
	clear(c.transactions)
	c.s.wake.Broadcast()
	return nil
}

// Write takes one whole request. Anything else is the test's failure, as the
// kernel would mix it up with other requests.
func (c *Conn) Write(b []byte) (int, error) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	if c.closed || c.ended {
		return 0, fs.ErrClosed
	}
	r := bytes.NewReader(b)
	m, err := wire.Receive(r)
	if err != nil || r.Len() > 0 || len(b) > wire.MaxRequest {
		c.s.t.Errorf("a write of %d bytes is not one request: %v, %d bytes left", len(b), err, r.Len())
		return 0, syscall.EINVAL
	}
	op, path := describe(m)
	if f := c.s.faults.WriteErrno; f != nil {
		if errno := f(op, path); errno != 0 {
			return 0, errno
		}
	}
	var payload []byte
	var errno syscall.Errno
	if f := c.s.faults.Fail; f != nil {
		errno = f(op, path)
	}
	var after []watch // first events of a new watch
	if errno == 0 {
		payload, after, errno = c.serve(m)
	}
	if errno != 0 && m.Type == wire.Watch {
		return 0, errno // the kernel hands xenstored's refusal on in this way
	}
	answer := wire.Message{Type: m.Type, ReqID: m.ReqID, TxID: m.TxID, Payload: payload}
	if errno != 0 {
		answer.Type, answer.Payload = wire.Error, wire.Join(wire.ErrorName(errno))
	}
	if c.s.faults.EventBeforeAck {
		c.events(after)
	}
	if c.s.faults.Late {
		c.late = answer.Append(c.late)
	} else {
		c.out = answer.Append(c.out)
	}
	if !c.s.faults.EventBeforeAck {
		c.events(after)
	}
	c.s.wake.Broadcast()
	return len(b), nil
}

// describe names a request for Faults.
func describe(m wire.Message) (op, path string) {
	path, _, _ = strings.Cut(string(m.Payload), "\x00")
	switch m.Type {
	case wire.Directory, wire.DirectoryPart:
		return "list", path
	case wire.GetPerms, wire.SetPerms:
		return "permissions", path
	case wire.TransactionStart:
		return "start", ""
	case wire.TransactionEnd:
		if path == "T" {
			return "commit", ""
		}
		return "abort", ""
	}
	return m.Type.String(), path
}

func (c *Conn) absolute(path string) string {
	if strings.HasPrefix(path, "/") || strings.HasPrefix(path, "@") {
		return path
	}
	return home(c.domid) + "/" + path
}

func (c *Conn) events(list []watch) {
	for _, w := range list {
		c.event(w, c.absolute(w.path))
	}
}

// event sends an event whose path has the form that the watch was made with.
func (c *Conn) event(w watch, path string) {
	if !strings.HasPrefix(w.path, "/") {
		path = strings.TrimPrefix(path, home(c.domid)+"/")
	}
	// Request and transaction are undefined in an event: here they are nobody's.
	m := wire.Message{Type: wire.WatchEvent, ReqID: 0xdeadbeef, TxID: 0xdeadbeef, Payload: wire.Join(path, w.token)}
	c.out = m.Append(c.out)
}

var ok = wire.Join("OK")

// serve carries out a request. s.mu is held.
func (c *Conn) serve(m wire.Message) (answer []byte, after []watch, errno syscall.Errno) {
	switch m.Type {
	case wire.Watch, wire.Unwatch:
		return c.serveWatch(m)
	case wire.TransactionStart:
		c.s.lastTx++
		c.transactions[c.s.lastTx] = &transaction{
			start: maps.Clone(c.s.nodes),
			nodes: maps.Clone(c.s.nodes),
			seen:  make(map[string]struct{}),
		}
		return wire.Join(strconv.Itoa(int(c.s.lastTx))), nil, 0
	case wire.TransactionEnd:
		return ok, nil, c.endTransaction(m)
	}
	var tx *transaction
	if m.TxID != 0 {
		if tx = c.transactions[m.TxID]; tx == nil {
			return nil, nil, syscall.ENOENT
		}
	}
	answer, errno = c.serveNode(m, tx)
	return answer, nil, errno
}

func (c *Conn) serveWatch(m wire.Message) ([]byte, []watch, syscall.Errno) {
	list, err := wire.Split(m.Payload)
	if err != nil || len(list) != 2 || !validPath(list[0]) {
		return nil, nil, syscall.EINVAL
	}
	w := watch{path: list[0], token: list[1]}
	i := slices.Index(c.watches, w)
	if m.Type == wire.Watch {
		if i >= 0 {
			return nil, nil, syscall.EEXIST
		}
		c.watches = append(c.watches, w)
		return ok, []watch{w}, 0
	}
	if i >= 0 { // the kernel says OK to an unknown watch too
		c.watches = slices.Delete(c.watches, i, i+1)
		if c.s.faults.EventAfterUnwatch {
			return ok, []watch{w}, 0
		}
	}
	return ok, nil, 0
}

func (c *Conn) endTransaction(m wire.Message) syscall.Errno {
	tx := c.transactions[m.TxID]
	if tx == nil {
		return syscall.ENOENT
	}
	how := string(m.Payload)
	if how != "T\x00" && how != "F\x00" {
		return syscall.EINVAL
	}
	delete(c.transactions, m.TxID)
	if how == "F\x00" {
		return 0
	}
	if c.s.faults.Conflicts > 0 {
		c.s.faults.Conflicts--
		return syscall.EAGAIN
	}
	for path := range tx.seen {
		if c.s.nodes[path].generation != tx.start[path].generation {
			return syscall.EAGAIN
		}
	}
	for _, redo := range tx.redo {
		redo(c.s.nodes)
	}
	for _, event := range tx.events {
		event()
	}
	return 0
}

// validPath is xenstored's idea of a path: the characters of docs/misc/xenstore.txt,
// no empty part, no slash at the end.
func validPath(path string) bool {
	limit := wire.MaxRelPath
	if strings.HasPrefix(path, "/") {
		limit = wire.MaxAbsPath
	}
	if path == "" || len(path) > limit || strings.Contains(path, "//") || len(path) > 1 && strings.HasSuffix(path, "/") {
		return false
	}
	for _, b := range []byte(path) {
		if !(b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || strings.IndexByte("-/_@", b) >= 0) {
			return false
		}
	}
	return true
}

func (c *Conn) serveNode(m wire.Message, tx *transaction) ([]byte, syscall.Errno) {
	path, rest, found := strings.Cut(string(m.Payload), "\x00")
	if !found || !validPath(path) {
		return nil, syscall.EINVAL
	}
	path = c.absolute(path)
	nodes := c.s.nodes
	if tx != nil {
		nodes = tx.nodes
		tx.seen[path] = struct{}{}
	}
	n, exists := nodes[path]
	write := m.Type == wire.Write || m.Type == wire.Mkdir || m.Type == wire.Remove || m.Type == wire.SetPerms
	if !c.s.allowed(nodes, c.domid, path, write) {
		return nil, syscall.EACCES
	}
	if !exists && m.Type != wire.Write && m.Type != wire.Mkdir {
		if _, hasParent := nodes[parent(path)]; m.Type == wire.Remove && hasParent {
			return ok, 0 // xenstored: gone is gone
		}
		return nil, syscall.ENOENT
	}
	switch m.Type {
	case wire.Read:
		return []byte(n.value), 0
	case wire.Directory:
		return directory(nodes.children(path))
	case wire.DirectoryPart:
		return directoryPart(n.generation, nodes.children(path), rest)
	case wire.GetPerms:
		var list []string
		for _, p := range n.perms {
			list = append(list, p.String())
		}
		return wire.Join(list...), 0
	case wire.Write:
		c.change(tx, path, false, func(t tree) { c.s.write(t, c.domid, path, rest) })
	case wire.Mkdir:
		if !exists {
			c.change(tx, path, false, func(t tree) { c.s.create(t, c.domid, path) })
		}
	case wire.Remove:
		if path == "/" {
			return nil, syscall.EINVAL
		}
		c.change(tx, path, true, func(t tree) { c.s.remove(t, path) })
	case wire.SetPerms:
		perms, err := parsePerms(rest)
		if err != nil || c.domid != 0 && perms[0].Dom != n.perms[0].Dom {
			return nil, syscall.EINVAL
		}
		c.change(tx, path, false, func(t tree) { c.s.setPerms(t, path, perms) })
	default:
		return nil, syscall.ENOSYS
	}
	return ok, 0
}

// change makes a change and fires its watches: now, or at the transaction's commit.
func (c *Conn) change(tx *transaction, path string, removed bool, do func(tree)) {
	fire := func() { c.s.fire(path, removed) }
	if tx == nil {
		do(c.s.nodes)
		fire()
		return
	}
	do(tx.nodes)
	tx.redo = append(tx.redo, do)
	tx.events = append(tx.events, fire)
}

func directory(names []string) ([]byte, syscall.Errno) {
	list := wire.Join(names...)
	if len(list) > wire.MaxPayload {
		return nil, syscall.E2BIG
	}
	return list, 0
}

// directoryPart answers with the generation and as many whole names from an
// offset on as fit; an empty name ends the list.
func directoryPart(generation uint64, names []string, rest string) ([]byte, syscall.Errno) {
	list := wire.Join(names...)
	offset, err := strconv.Atoi(strings.TrimSuffix(rest, "\x00"))
	if err != nil || offset < 0 {
		return nil, syscall.EINVAL
	}
	b := wire.Join(strconv.FormatUint(generation, 10))
	list = list[min(offset, len(list)):]
	for len(list) > 0 {
		name := list[:bytes.IndexByte(list, 0)+1]
		if len(b)+len(name)+1 > wire.MaxPayload {
			return b, 0
		}
		b = append(b, name...)
		list = list[len(name):]
	}
	return append(b, 0), 0
}

func parsePerms(s string) ([]xenstore.Perm, error) {
	list, err := wire.Split([]byte(s))
	if err != nil || len(list) == 0 {
		return nil, fmt.Errorf("bad permissions %q", s)
	}
	var perms []xenstore.Perm
	for _, entry := range list {
		p, err := xenstore.ParsePerm(entry)
		if err != nil {
			return nil, err
		}
		perms = append(perms, p)
	}
	return perms, nil
}
