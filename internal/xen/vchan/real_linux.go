package vchan

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"strconv"

	"github.com/stubinit/stubinit/internal/fdio"
	"github.com/stubinit/stubinit/internal/xen/evtchn"
	"github.com/stubinit/stubinit/internal/xen/gntalloc"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

// Config says where a Listener listens and for whom.
type Config struct {
	// Client is the domain that may attach: 0, the toolstack's.
	Client uint16
	// Path is the directory of ring-ref and event-channel in xenstore, such
	// as "device-model/7/qmp-vchan": relative to this domain's own or
	// absolute.
	Path string
	// Store is used for publishing; the caller closes it, after the Listener.
	Store *xenstore.Client
	// Poller is what the Listener waits in: whatever else it watches is called
	// between events. The caller closes it, after the Listener.
	Poller *fdio.Poller
	Options
}

// Listen publishes a vchan for one client domain and listens on it. ctx limits
// the first publication only.
func Listen(ctx context.Context, cfg Config) (*Listener, error) {
	t, err := openXen(ctx, cfg)
	if err != nil {
		return nil, &net.OpError{Op: "listen", Net: "vchan", Addr: Addr(cfg.Path), Err: err}
	}
	return NewListener(ctx, t, cfg.Path, cfg.Options)
}

// xen is the Transport of a domain under Xen.
type xen struct {
	cfg    Config
	self   uint16
	events *evtchn.File
	ready  bool // there are events to take
	// published says that both nodes are there, with their permissions.
	published bool
}

func openXen(ctx context.Context, cfg Config) (*xen, error) {
	domid, err := cfg.Store.Read(ctx, "domid")
	if err != nil {
		return nil, err
	}
	self, err := strconv.ParseUint(domid, 10, 16)
	if err != nil {
		return nil, fmt.Errorf("this domain's id in xenstore node domid: %w", err)
	}
	events, err := evtchn.Open()
	if err != nil {
		return nil, err
	}
	x := &xen{cfg: cfg, self: uint16(self), events: events}
	if err := events.Watch(cfg.Poller, func() { x.ready = true }); err != nil {
		return nil, errors.Join(err, events.Close())
	}
	return x, nil
}

func (x *xen) Bind() (uint32, error)    { return x.events.BindUnbound(x.cfg.Client) }
func (x *xen) Unbind(port uint32) error { return x.events.Unbind(port) }
func (x *xen) Notify(port uint32) error { return x.events.Notify(port) }
func (x *xen) Interrupt()               { x.cfg.Poller.Interrupt() }

func (x *xen) Wait() error {
	for {
		err := x.cfg.Poller.Wait()
		came := false
		if err == nil && x.ready {
			x.ready = false
			came, err = x.events.Take()
		}
		switch {
		case errors.Is(err, fs.ErrClosed):
			return net.ErrClosed
		case errors.Is(err, evtchn.ErrOverflow):
			return nil // an event may be lost, so look as if there had been one
		case err != nil || came:
			return err
		}
	}
}

func (x *xen) Share(pages, live int, port uint32) (Memory, error) {
	p, err := gntalloc.Alloc(x.cfg.Client, pages, true)
	if err != nil {
		return Memory{}, err
	}
	if err := errors.Join(
		p.SetUnmapNotify(live, gntalloc.ClearByte|gntalloc.SendEvent, port),
		p.Detach(),
	); err != nil {
		return Memory{}, errors.Join(err, p.Close())
	}
	return Memory{Bytes: p.Mem, Refs: p.Refs, Free: p.Close}, nil
}

// Publish makes the nodes in one transaction, so that no watch fires between
// them. Only the client's domain may read them. Later it only writes the new
// values: a round trip to xenstored each, and every client's greeting waits.
func (x *xen) Publish(ctx context.Context, ref, port uint32) error {
	if !x.published {
		err := x.create(ctx, ref, port)
		x.published = err == nil
		return err
	}
	// In this order, as Transport says.
	err := x.cfg.Store.Write(ctx, x.cfg.Path+"/event-channel", strconv.FormatUint(uint64(port), 10))
	if err == nil {
		err = x.cfg.Store.Write(ctx, x.cfg.Path+"/ring-ref", strconv.FormatUint(uint64(ref), 10))
	}
	return err
}

func (x *xen) create(ctx context.Context, ref, port uint32) error {
	perms := []xenstore.Perm{
		{Dom: x.self, Access: xenstore.None},
		{Dom: x.cfg.Client, Access: xenstore.ReadOnly},
	}
	nodes := []struct {
		name  string
		value uint32
	}{{"ring-ref", ref}, {"event-channel", port}}
	return x.cfg.Store.Update(ctx, func(tx *xenstore.Tx) error {
		for _, n := range nodes {
			path := x.cfg.Path + "/" + n.name
			if err := tx.Write(ctx, path, strconv.FormatUint(uint64(n.value), 10)); err != nil {
				return err
			}
			if err := tx.SetPerms(ctx, path, perms...); err != nil {
				return err
			}
		}
		return nil
	})
}

// Unpublish removes what Publish has written.
func (x *xen) Unpublish(ctx context.Context) error {
	x.published = false
	err := x.cfg.Store.Remove(ctx, x.cfg.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // the toolstack was faster
	}
	return err
}

func (x *xen) Close() error {
	return x.events.Close()
}
