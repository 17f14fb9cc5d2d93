// Package xenstoretest is a xenstored in memory, behind a connection that
// behaves like the kernel's /dev/xen/xenbus: whole requests in one write, a
// byte stream back, refused watches as the write's errno. It keeps nodes with
// permissions, watches and transactions with real conflicts, and can be made to
// misbehave.
//
// Permissions are a little wider than libxl's, to keep tests short: the root's
// are "r0" (all may read, domain 0 may write) and those of /local/domain/<n>
// "r<n>" (all may read, n may write). New nodes take them over from their
// parent. Domain 0 may do everything.
package xenstoretest

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

// Faults are the ways in which the server misbehaves. The zero value is none.
type Faults struct {
	// Fail, if it returns an errno that is not 0, makes xenstored refuse a
	// request with it. op is "read", "write", "list", "mkdir", "remove",
	// "permissions" (get and set), "watch" or "commit" (path empty).
	Fail func(op, path string) syscall.Errno
	// WriteErrno is the same for the write itself: there is no answer then.
	WriteErrno func(op, path string) syscall.Errno
	// Late keeps back all answers, not events, until it is false again.
	Late bool
	// EventBeforeAck sends a watch's first event before its answer.
	EventBeforeAck bool
	// EventAfterUnwatch sends one more event after the answer to an unwatch.
	EventAfterUnwatch bool
	// Conflicts is the number of commits that find a conflict; each takes one off.
	Conflicts int
	// Chunk, if not 0, is the most bytes that a read gives.
	Chunk int
}

// node is one node of the store.
type node struct {
	value      string
	perms      []xenstore.Perm
	generation uint64 // of the last change of value, permissions or children
}

// tree holds nodes by absolute path; the root is "/".
type tree map[string]node

// Server is the store and its connections.
type Server struct {
	t testing.TB

	mu         sync.Mutex
	wake       *sync.Cond // something to read, or a connection ended
	nodes      tree
	generation uint64
	targets    map[uint16]uint16
	faults     Faults
	conns      []*Conn
	lastTx     uint32
}

// New makes a server with an empty store. It ends with the test.
func New(t testing.TB) *Server {
	s := &Server{
		t:       t,
		nodes:   tree{"/": {perms: []xenstore.Perm{{Dom: 0, Access: xenstore.ReadOnly}}}},
		targets: make(map[uint16]uint16),
	}
	s.wake = sync.NewCond(&s.mu)
	t.Cleanup(func() { s.hangup(func(*Conn) bool { return true }) })
	return s
}

// Dial connects as a domain. The client is closed at the test's end at the latest.
func (s *Server) Dial(domid uint16) *xenstore.Client {
	c := xenstore.NewClient(s.DialConn(domid))
	s.t.Cleanup(func() { c.Close() })
	return c
}

// DialConn is Dial without a client, for requests that none would make.
func (s *Server) DialConn(domid uint16) *Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := &Conn{s: s, domid: domid, transactions: make(map[uint32]*transaction)}
	s.conns = append(s.conns, c)
	s.create(s.nodes, 0, home(domid))
	return c
}

// SetFaults replaces the faults. Answers that were kept back are sent if Late is false.
func (s *Server) SetFaults(f Faults) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = f
	if !f.Late {
		for _, c := range s.conns {
			c.out = append(c.out, c.late...)
			c.late = nil
		}
	}
	s.wake.Broadcast()
}

// SetTarget gives a stubdomain all rights on its target's nodes, as XS_SET_TARGET does.
func (s *Server) SetTarget(domid, target uint16) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.targets[domid] = target
}

// Set writes a node (absolute path) as domain 0 and fires watches. The value
// may be anything, also what xenstored would not take.
func (s *Server) Set(path, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.write(s.nodes, 0, path, value)
	s.fire(path, false)
}

// SetPerms sets a node's permissions and fires watches. A missing node is made.
func (s *Server) SetPerms(path string, perms ...xenstore.Perm) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.create(s.nodes, 0, path)
	s.setPerms(s.nodes, path, perms)
	s.fire(path, false)
}

// Get returns a node's value and whether there is such a node.
func (s *Server) Get(path string) (string, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, ok := s.nodes[path]
	return n.value, ok
}

// Perms returns a node's permissions in the wire's form, such as ["n5" "r0"].
func (s *Server) Perms(path string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []string
	for _, p := range s.nodes[path].perms {
		list = append(list, p.String())
	}
	return list
}

// Remove removes a node with all below it, and fires watches.
func (s *Server) Remove(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.remove(s.nodes, path)
	s.fire(path, true)
}

// Fire sends events as if a node had changed.
func (s *Server) Fire(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fire(path, false)
}

// Watches returns how many watches a domain has.
func (s *Server) Watches(domid uint16) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.conns {
		if c.domid == domid && !c.ended {
			n += len(c.watches)
		}
	}
	return n
}

// Transactions returns how many transactions a domain has open.
func (s *Server) Transactions(domid uint16) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, c := range s.conns {
		if c.domid == domid && !c.ended {
			n += len(c.transactions)
		}
	}
	return n
}

// Inject sends bytes to all connections of a domain as they are.
func (s *Server) Inject(domid uint16, b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if c.domid == domid {
			c.out = append(c.out, b...)
		}
	}
	s.wake.Broadcast()
}

// Hangup ends all connections of a domain: they read what was sent, then EOF.
func (s *Server) Hangup(domid uint16) {
	s.hangup(func(c *Conn) bool { return c.domid == domid })
}

func (s *Server) hangup(which func(*Conn) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.conns {
		if which(c) {
			c.ended = true
		}
	}
	s.wake.Broadcast()
}

func home(domid uint16) string { return fmt.Sprintf("/local/domain/%d", domid) }

// homeOwner returns the domain whose folder path is.
func homeOwner(path string) (uint16, bool) {
	id, ok := strings.CutPrefix(path, "/local/domain/")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(id, 10, 16)
	return uint16(n), err == nil
}

func parent(path string) string {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		return path[:i]
	}
	return "/"
}

// under says whether path is dir or below it.
func under(path, dir string) bool {
	return path == dir || dir == "/" || strings.HasPrefix(path, dir+"/")
}

func (t tree) children(path string) []string {
	prefix := strings.TrimSuffix(path, "/") + "/"
	var names []string
	for p := range t {
		if name, ok := strings.CutPrefix(p, prefix); ok && name != "" && !strings.Contains(name, "/") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// touch notes a change of a node.
func (s *Server) touch(t tree, path string, change func(*node)) {
	s.generation++
	n := t[path]
	n.generation = s.generation
	change(&n)
	t[path] = n
}

// create makes a node and those above it.
func (s *Server) create(t tree, domid uint16, path string) {
	if _, ok := t[path]; ok {
		return
	}
	up := parent(path)
	s.create(t, domid, up)
	perms := slices.Clone(t[up].perms)
	if owner, ok := homeOwner(path); ok {
		perms = []xenstore.Perm{{Dom: owner, Access: xenstore.ReadOnly}}
	} else if domid != 0 {
		perms[0].Dom = domid
	}
	s.touch(t, path, func(n *node) { n.perms = perms })
	s.touch(t, up, func(*node) {})
}

func (s *Server) write(t tree, domid uint16, path, value string) {
	s.create(t, domid, path)
	s.touch(t, path, func(n *node) { n.value = value })
}

func (s *Server) setPerms(t tree, path string, perms []xenstore.Perm) {
	s.touch(t, path, func(n *node) { n.perms = slices.Clone(perms) })
}

func (s *Server) remove(t tree, path string) {
	if _, ok := t[path]; !ok {
		return
	}
	maps.DeleteFunc(t, func(p string, _ node) bool { return under(p, path) })
	s.touch(t, parent(path), func(*node) {})
}

// allowed says whether a domain may read (or write) a node; for one that does
// not exist its nearest ancestor counts.
func (s *Server) allowed(t tree, domid uint16, path string, write bool) bool {
	if domid == 0 {
		return true
	}
	n, ok := t[path]
	if !ok {
		return s.allowed(t, domid, parent(path), write)
	}
	target, hasTarget := s.targets[domid]
	is := func(dom uint16) bool { return dom == domid || hasTarget && dom == target }
	access := n.perms[0].Access
	for i, p := range n.perms {
		if is(p.Dom) {
			if i == 0 {
				return true
			}
			access = p.Access
			break
		}
	}
	if write {
		return access == xenstore.WriteOnly || access == xenstore.ReadWrite
	}
	return access == xenstore.ReadOnly || access == xenstore.ReadWrite
}

// fire sends events for a change of path to every watch at or above it, and
// for a removal to every watch below it.
func (s *Server) fire(path string, removed bool) {
	for _, c := range s.conns {
		for _, w := range c.watches {
			abs := c.absolute(w.path)
			switch {
			case under(path, abs):
				c.event(w, path)
			case removed && under(abs, path):
				c.event(w, abs)
			}
		}
	}
	s.wake.Broadcast()
}

// watch is a client's watch, its path as the client wrote it.
type watch struct{ path, token string }

// transaction is a copy of the store, with what it has looked at and done.
type transaction struct {
	start  tree // as it was
	nodes  tree // as the transaction sees it
	seen   map[string]struct{}
	redo   []func(tree)
	events []func()
}

// Conn is a client's end of a connection.
type Conn struct {
	s            *Server
	domid        uint16
	out          []byte // to be read
	late         []byte // kept back
	ended        bool   // by the server
	closed       bool   // by the client
	watches      []watch
	transactions map[uint32]*transaction
}

// Read reads what the server has sent. It is EOF after Hangup.
func (c *Conn) Read(b []byte) (int, error) {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	for len(c.out) == 0 && !c.ended && !c.closed {
		c.s.wake.Wait()
	}
	return c.take(b)
}
