package netup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Run adds vifs to their bridges as they come, whenever that is, until the context ends (nil) or rtnetlink fails. A NIC is up when
// its vif's link has a carrier and its backend has connected: the carrier comes as soon as the frontend is ready (xennet_connect
// in drivers/net/xen-netfront.c), also while the backend still waits for its hotplug script. A NIC that is not up after
// Options.Limit is warned of once. Run is called once, after Setup.
func (n *Network) Run(ctx context.Context) error {
	if n.running.Swap(true) {
		return errors.New("run the network: it has run before")
	}
	start := time.Now()
	// Many links come at once at boot; what overflows all the same is made up for by a new listing.
	_ = n.events.SetReceiveBufferSize(1<<20, true)
	if err := unix.SetsockoptInt(n.events.GetFd(), unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, unix.RTNLGRP_LINK); err != nil {
		return fmt.Errorf("subscribe to link events: %w", err)
	}
	// Listed after the subscription: a vif is in the one or the other.
	if err := n.list(start); err != nil {
		return err
	}

	ctx, cancel := context.WithCancel(ctx)
	var backends sync.WaitGroup
	defer backends.Wait()
	defer cancel()
	for _, p := range n.ports {
		if p.Vif != NoVif {
			backends.Go(func() { n.followBackend(ctx, p, start) })
		}
	}
	links := make(chan link)
	lost := make(chan struct{})
	stop := make(chan struct{})
	ended := make(chan error, 1)
	go func() { ended <- readLinks(n.events, links, lost, stop) }()
	limit := time.NewTimer(n.opts.Limit)
	defer limit.Stop()
	for {
		var err error
		select {
		case l := <-links:
			n.see(l, start)
			continue
		case <-lost:
			if err = n.list(start); err == nil {
				continue
			}
		case <-limit.C:
			n.warnOfMissing()
			continue
		case err := <-ended:
			return fmt.Errorf("read link events: %w", err)
		case <-ctx.Done():
		}
		close(stop)
		n.events.Close()
		<-ended
		return err
	}
}

// list takes in all links that there are now, and that those of the ports which are not among them are gone.
func (n *Network) list(start time.Time) error {
	found := make(map[int]bool)
	err := n.links(func(l link) {
		found[l.index] = true
		n.see(l, start)
	})
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.ports {
		if p.index != 0 && !found[p.index] {
			n.follow(p, link{index: p.index, gone: true}, start)
		}
	}
	return nil
}

// readLinks sends what the socket tells until it is closed. It says so when the kernel had to drop events.
func readLinks(events *nl.NetlinkSocket, links chan<- link, lost chan<- struct{}, stop <-chan struct{}) error {
	for {
		msgs, _, err := events.Receive()
		switch {
		case errors.Is(err, unix.ENOBUFS):
			if err := drain(events); err != nil {
				return err
			}
			select {
			case lost <- struct{}{}:
			case <-stop:
				return nil
			}
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		}
		for _, m := range msgs {
			l, ok := parseLink(m.Header.Type, m.Data)
			if !ok {
				continue
			}
			select {
			case links <- l:
			case <-stop:
				return nil
			}
		}
	}
}

// drain drops what the socket still has. From a first dropped event on the kernel drops all, without a further word, until
// the socket is empty (NETLINK_S_CONGESTED, net/netlink/af_netlink.c): only then can a list be complete.
func drain(events *nl.NetlinkSocket) error {
	pause := unix.NsecToTimeval(drainPause.Nanoseconds())
	if err := events.SetReceiveTimeout(&pause); err != nil {
		return err
	}
	for end := time.Now().Add(drainLimit); time.Now().Before(end); {
		_, _, err := events.Receive()
		if errors.Is(err, unix.EAGAIN) {
			break
		}
		if err != nil && !errors.Is(err, unix.ENOBUFS) && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return events.SetReceiveTimeout(&unix.Timeval{})
}

const (
	drainPause = 10 * time.Millisecond // without an event: the socket is empty
	drainLimit = time.Second           // of events that never pause
)

// see takes in what is new about a link: a vif that has come, one of ours that has changed, or none of our business.
func (n *Network) see(l link, start time.Time) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.ports {
		if p.index == l.index {
			n.follow(p, l, start)
			return
		}
	}
	if l.gone {
		return
	}
	p := n.match(l)
	if p == nil {
		return
	}
	log := n.opts.Log.With("nic", p.ID, "link", l.name)
	for _, op := range p.JoinOps(l.name, l.mtu, l.up) {
		err := n.do(op)
		if errors.Is(err, unix.EINVAL) && op.Link == l.name && op.MTU != 0 {
			log.Warn("vif refuses the MTU; its backend has no scatter-gather", "mtu", op.MTU, "xenstore", p.Backend, "err", err)
			op.MTU = 0
			err = n.do(op)
		}
		if err != nil {
			// The next event of the link tries again.
			log.Error("vif cannot join its bridge", "bridge", p.Bridge, "err", err)
			return
		}
	}
	p.index, p.link = l.index, l.name
	log.Debug("vif has joined its bridge", "bridge", p.Bridge, "tap", p.Tap, "after", time.Since(start).Round(time.Millisecond))
}

// follow takes in news of a vif that is in its bridge.
func (n *Network) follow(p *port, l link, start time.Time) {
	p.running = l.running && !l.gone
	if !l.gone {
		n.report(p, start)
		return
	}
	if !p.unplugged {
		n.opts.Log.Warn("vif is gone", "nic", p.ID, "link", p.link, "xenstore", p.Backend)
	}
	p.index, p.up = 0, false
}

// followBackend follows the state of a vif's backend until the NIC is unplugged or ctx ends.
func (n *Network) followBackend(ctx context.Context, p *port, start time.Time) {
	_, err := n.opts.Store.WaitFor(ctx, p.Backend+"/state", func(state string, exists bool) bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		p.connected = exists && state == stateConnected
		n.report(p, start)
		return p.unplugged
	})
	if err != nil && ctx.Err() == nil {
		n.opts.Log.Warn("the state of a vif's backend cannot be followed", "nic", p.ID, "xenstore", p.Backend, "err", err)
	}
}

// report logs that a NIC has come up or gone down.
func (n *Network) report(p *port, start time.Time) {
	up := p.running && p.connected
	if up == p.up {
		return
	}
	p.up = up
	log := n.opts.Log.With("nic", p.ID, "link", p.link)
	switch {
	case p.unplugged:
	case up:
		log.Info("NIC's link is up", "tap", p.Tap, "bridge", p.Bridge, "after", time.Since(start).Round(time.Millisecond))
		if n.opts.Up != nil {
			n.opts.Up(p.ID)
		}
	default:
		log.Warn("NIC's link is down", "xenstore", p.Backend)
	}
}

// match returns the port that waits for this link, or nil.
func (n *Network) match(l link) *port {
	var waiting []*port
	shared := false // the address: then only sysfs knows which vif a link is
	for _, p := range n.ports {
		if p.Vif == NoVif || !bytes.Equal(p.MAC, l.mac) {
			continue
		}
		shared = shared || len(waiting) > 0
		if p.index != 0 || p.unplugged {
			shared = true
			continue
		}
		waiting = append(waiting, p)
	}
	if len(waiting) == 0 {
		return nil
	}
	if shared {
		// "../../../vif-1": the device's name on the bus "xen" (drivers/xen/xenbus/xenbus_probe_frontend.c).
		if dev, err := os.Readlink(filepath.Join(n.opts.Sys, "class/net", l.name, "device")); err == nil {
			for _, p := range waiting {
				if filepath.Base(dev) == busName(p.Vif) {
					return p
				}
			}
			return nil
		}
	}
	return waiting[0]
}

// busName is a vif's name on the kernel's bus "xen".
func busName(vif int) string { return fmt.Sprintf("vif-%d", vif) }

// warnOfMissing names the NICs whose link is not up.
func (n *Network) warnOfMissing() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.ports {
		switch {
		case p.Vif == NoVif || p.up || p.unplugged:
		case p.index == 0 || !p.connected:
			n.opts.Log.Warn("NIC still has no network: its vif's backend has not connected; look at its state and hotplug-status",
				"nic", p.ID, "mac", p.MAC, "after", n.opts.Limit, "xenstore", p.Backend)
		default:
			n.opts.Log.Warn("NIC still has no network: its vif has no carrier",
				"nic", p.ID, "mac", p.MAC, "after", n.opts.Limit, "xenstore", p.Backend)
		}
	}
}
