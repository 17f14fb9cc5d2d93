package xenstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"syscall"

	"github.com/stubinit/stubinit/internal/xen/xenstore/internal/wire"
)

const (
	// maxConflicts bounds the attempts at a transaction.
	maxConflicts = 32
	// maxRestarts bounds the attempts at a long directory that changes while it is read.
	maxRestarts = 32
)

// ErrNotText is wrapped by ReadString's error for a value that is not text.
var ErrNotText = errors.New("not printable ASCII")

// Access is what a domain may do with a node.
type Access byte

// The letters of docs/misc/xenstore.txt, "Permissions".
const (
	None      Access = 'n'
	ReadOnly  Access = 'r'
	WriteOnly Access = 'w'
	ReadWrite Access = 'b'
)

// Perm is one entry of a node's permissions. The first entry of a list names
// the owner, who may do everything, and the access of domains not listed.
type Perm struct {
	Dom    uint16
	Access Access
}

// String is the form on the wire, such as "r0".
func (p Perm) String() string { return string(rune(p.Access)) + strconv.Itoa(int(p.Dom)) }

// ParsePerm undoes Perm.String.
func ParsePerm(s string) (Perm, error) {
	if s == "" || !strings.ContainsRune("nrwb", rune(s[0])) {
		return Perm{}, fmt.Errorf("bad permission %q", s)
	}
	dom, err := strconv.ParseUint(s[1:], 10, 16)
	if err != nil {
		return Perm{}, fmt.Errorf("bad permission %q", s)
	}
	return Perm{Dom: uint16(dom), Access: Access(s[0])}, nil
}

// Tx is a transaction, valid inside the function given to Update.
type Tx struct {
	c  *Client
	id uint32 // 0 on the wire is no transaction
}

func (c *Client) plain() *Tx { return &Tx{c: c} }

// Read returns a node's value as it is. A missing node is fs.ErrNotExist.
func (c *Client) Read(ctx context.Context, path string) (string, error) {
	return c.plain().Read(ctx, path)
}

// ReadString is Read for values that are to be shown or parsed: one with a byte
// outside 0x20 to 0x7e is an error that is ErrNotText and names byte and offset.
func (c *Client) ReadString(ctx context.Context, path string) (string, error) {
	value, err := c.Read(ctx, path)
	if err != nil {
		return "", err
	}
	for i := range len(value) {
		if value[i] < 0x20 || value[i] > 0x7e {
			return "", &Error{Op: "read", Path: path, Err: fmt.Errorf("byte 0x%02x at offset %d of the value: %w", value[i], i, ErrNotText)}
		}
	}
	return value, nil
}

// Write sets a node's value; the node and those above it are made as needed.
func (c *Client) Write(ctx context.Context, path, value string) error {
	return c.plain().Write(ctx, path, value)
}

// Mkdir makes an empty node. One that exists is left as it is.
func (c *Client) Mkdir(ctx context.Context, path string) error { return c.plain().Mkdir(ctx, path) }

// Remove removes a node with all below it.
func (c *Client) Remove(ctx context.Context, path string) error { return c.plain().Remove(ctx, path) }

// List returns the names of a node's children.
func (c *Client) List(ctx context.Context, path string) ([]string, error) {
	return c.plain().List(ctx, path)
}

// Perms returns a node's permissions, the owner's entry first.
func (c *Client) Perms(ctx context.Context, path string) ([]Perm, error) {
	payload, err := c.plain().request(ctx, wire.GetPerms, path, wire.Join(path))
	if err != nil {
		return nil, err
	}
	list, err := wire.Split(payload)
	if err == nil && len(list) == 0 {
		err = errors.New("answer without an owner")
	}
	perms := make([]Perm, len(list))
	for i := range list {
		if err == nil {
			perms[i], err = ParsePerm(list[i])
		}
	}
	if err != nil {
		return nil, &Error{Op: wire.GetPerms.String(), Path: path, Err: err}
	}
	return perms, nil
}

// SetPerms replaces a node's permissions; the first entry names the owner.
func (c *Client) SetPerms(ctx context.Context, path string, perms ...Perm) error {
	return c.plain().SetPerms(ctx, path, perms...)
}

// Update runs fn in a transaction: what fn does through its Tx happens at once
// or not at all. When another writer got in between (EAGAIN), fn runs again, up
// to 32 times. If fn fails the transaction is given up and fn's error returned.
// If ctx ends after the commit was sent it is not known whether it took place.
func (c *Client) Update(ctx context.Context, fn func(*Tx) error) error {
	for range maxConflicts {
		err := c.attempt(ctx, fn)
		if err != errConflict {
			return err
		}
	}
	return &Error{Op: "transaction", Err: fmt.Errorf("in conflict with other writers %d times: %w", maxConflicts, syscall.EAGAIN)}
}

var errConflict = errors.New("conflict")

func (c *Client) attempt(ctx context.Context, fn func(*Tx) error) error {
	start := wire.Message{Type: wire.TransactionStart, Payload: wire.Join("")}
	payload, err := c.roundTrip(ctx, start, func(payload []byte) (wire.Message, bool) {
		id, err := parseTx(payload)
		return endTx(id, "F"), err == nil
	})
	var id uint32
	if err == nil {
		id, err = parseTx(payload)
	}
	if err != nil {
		return &Error{Op: wire.TransactionStart.String(), Err: err}
	}
	open := true
	defer func() { // also when fn panics
		if open {
			c.giveBack(endTx(id, "F")) // fn's error is the one to report
		}
	}()
	if err := fn(&Tx{c: c, id: id}); err != nil {
		return err
	}
	payload, err = c.roundTrip(ctx, endTx(id, "T"), nil)
	open = errors.Is(err, errNotSent)
	if err == nil {
		err = checkOK(payload)
	}
	switch {
	case errors.Is(err, syscall.EAGAIN):
		return errConflict
	case err != nil:
		return &Error{Op: wire.TransactionEnd.String(), Err: err}
	}
	return nil
}

func parseTx(payload []byte) (uint32, error) {
	if list, err := wire.Split(payload); err == nil && len(list) == 1 {
		if id, err := strconv.ParseUint(list[0], 10, 32); err == nil && id != 0 {
			return uint32(id), nil
		}
	}
	return 0, fmt.Errorf("bad transaction id %q in the answer", payload)
}

// endTx is the request that ends a transaction; how is "T" to commit, "F" to give up.
func endTx(id uint32, how string) wire.Message {
	return wire.Message{Type: wire.TransactionEnd, TxID: id, Payload: wire.Join(how)}
}

func checkOK(payload []byte) error {
	if string(payload) != "OK\x00" {
		return fmt.Errorf("answer %q instead of OK", payload)
	}
	return nil
}

// request is a round trip about a path, with that path in its errors.
func (t *Tx) request(ctx context.Context, typ wire.Type, path string, payload []byte) ([]byte, error) {
	err := checkPath(path)
	if err == nil {
		payload, err = t.c.roundTrip(ctx, wire.Message{Type: typ, TxID: t.id, Payload: payload}, nil)
	}
	if err != nil {
		return nil, &Error{Op: typ.String(), Path: path, Err: err}
	}
	return payload, nil
}

func (t *Tx) requestOK(ctx context.Context, typ wire.Type, path string, payload []byte) error {
	answer, err := t.request(ctx, typ, path, payload)
	if err == nil {
		if err = checkOK(answer); err != nil {
			err = &Error{Op: typ.String(), Path: path, Err: err}
		}
	}
	return err
}

// checkPath refuses what would be another message on the wire; xenstored checks the rest.
func checkPath(path string) error {
	limit := wire.MaxRelPath
	if strings.HasPrefix(path, "/") {
		limit = wire.MaxAbsPath
	}
	switch {
	case path == "":
		return fmt.Errorf("empty path: %w", syscall.EINVAL)
	case strings.Contains(path, "\x00"):
		return fmt.Errorf("path with a NUL byte: %w", syscall.EINVAL)
	case len(path) > limit:
		return fmt.Errorf("path of %d bytes, the limit is %d: %w", len(path), limit, syscall.ENAMETOOLONG)
	}
	return nil
}

// Read is Client.Read inside the transaction.
func (t *Tx) Read(ctx context.Context, path string) (string, error) {
	payload, err := t.request(ctx, wire.Read, path, wire.Join(path))
	return string(payload), err
}

// Write is Client.Write inside the transaction.
func (t *Tx) Write(ctx context.Context, path, value string) error {
	return t.requestOK(ctx, wire.Write, path, append(wire.Join(path), value...))
}

// Mkdir is Client.Mkdir inside the transaction.
func (t *Tx) Mkdir(ctx context.Context, path string) error {
	return t.requestOK(ctx, wire.Mkdir, path, wire.Join(path))
}

// Remove is Client.Remove inside the transaction.
func (t *Tx) Remove(ctx context.Context, path string) error {
	return t.requestOK(ctx, wire.Remove, path, wire.Join(path))
}

// SetPerms is Client.SetPerms inside the transaction.
func (t *Tx) SetPerms(ctx context.Context, path string, perms ...Perm) error {
	list := []string{path}
	for _, p := range perms {
		list = append(list, p.String())
	}
	return t.requestOK(ctx, wire.SetPerms, path, wire.Join(list...))
}

// List is Client.List inside the transaction.
func (t *Tx) List(ctx context.Context, path string) ([]string, error) {
	payload, err := t.request(ctx, wire.Directory, path, wire.Join(path))
	if errors.Is(err, syscall.E2BIG) {
		return t.listParts(ctx, path)
	}
	if err != nil {
		return nil, err
	}
	names, err := wire.Split(payload)
	if err != nil {
		return nil, &Error{Op: wire.Directory.String(), Path: path, Err: err}
	}
	return names, nil
}

// listParts reads a directory that is too large for one answer. Each part
// names the node's generation; a new one means that the offsets are worth
// nothing any more.
func (t *Tx) listParts(ctx context.Context, path string) ([]string, error) {
	fail := func(err error) ([]string, error) {
		return nil, &Error{Op: wire.DirectoryPart.String(), Path: path, Err: err}
	}
	var names []string
	var generation string
	offset, restarts := 0, 0
	for {
		payload, err := t.request(ctx, wire.DirectoryPart, path, wire.Join(path, strconv.Itoa(offset)))
		if err != nil {
			return nil, err
		}
		part, err := wire.Split(payload)
		if err != nil {
			return fail(err)
		}
		if len(part) < 2 || part[0] == "" {
			return fail(fmt.Errorf("answer %q without a generation and a name", payload))
		}
		if offset != 0 && part[0] != generation {
			if restarts++; restarts == maxRestarts {
				return fail(fmt.Errorf("changed %d times while it was read: %w", restarts, syscall.EAGAIN))
			}
			names, offset = nil, 0
			continue
		}
		generation = part[0]
		for i, name := range part[1:] {
			if name == "" { // the end of the whole list
				if i != len(part)-2 {
					return fail(fmt.Errorf("answer %q with an empty name", payload))
				}
				return names, nil
			}
			names = append(names, name)
			offset += len(name) + 1
		}
	}
}

// WaitFor waits until ok accepts the node's value (exists is false, and value
// empty, while there is no node) and returns that value. It looks once at the
// start and again at each change, and ends with ctx.
func (c *Client) WaitFor(ctx context.Context, path string, ok func(value string, exists bool) bool) (value string, err error) {
	w, err := c.Watch(ctx, path)
	if err != nil {
		return "", err
	}
	defer w.Close() // a late answer of xenstored to the unwatch does not undo what was seen
	for {
		if _, err := w.Next(ctx); err != nil {
			return "", err
		}
		value, err := c.Read(ctx, path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
		if ok(value, err == nil) {
			return value, nil
		}
	}
}
