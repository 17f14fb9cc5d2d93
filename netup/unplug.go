package netup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// XenbusState… (xen/interface/io/xenbus.h).
const (
	stateConnected = "4"
	stateClosed    = "6"
)

// Unplug takes away what belongs to a NIC that QEMU has deleted (DEVICE_DELETED names nicID): its bridge and tap, and the vif, so
// that the guest's own PV NIC is the only one with that MAC address. The bridge goes first, which stops all traffic at once. The
// vif's frontend goes to Closed, with the handshake that its backend expects, and is removed from xenstore.
//
// The caller tells QEMU to let go of the tap first, with netdev_del of NIC.Netdev: deleting a device leaves its netdev. While QEMU
// has the tap open, Unplug does all else and returns an error that is EBUSY; calling it again does what is left. It waits for the
// backend no longer than ctx or Options.Limit. A device that is no NIC of the plan is ErrNoNIC.
func (n *Network) Unplug(ctx context.Context, nicID string) error {
	ctx, cancel := context.WithTimeout(ctx, n.opts.Limit)
	defer cancel()
	p := n.unplugged(nicID)
	if p == nil {
		return fmt.Errorf("unplug NIC %q: %w", nicID, ErrNoNIC)
	}
	var errs []error
	for _, op := range p.UnplugOps() {
		err := n.do(op)
		switch {
		case errors.Is(err, unix.ENODEV): // gone already
		case op.Kind == DeleteTap && errors.Is(err, unix.EBUSY):
			errs = append(errs, fmt.Errorf("%w: QEMU has it open until netdev_del of %q", err, p.Netdev))
		case err != nil:
			errs = append(errs, err)
		}
	}
	if p.Vif != NoVif {
		errs = append(errs, n.closeVif(ctx, p))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("unplug NIC %q: %w", nicID, err)
	}
	return nil
}

// unplugged finds the NIC and sees to it that its vif joins nothing any more.
func (n *Network) unplugged(nicID string) *port {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, p := range n.ports {
		if p.ID == nicID && nicID != "" {
			p.unplugged = true
			return p
		}
	}
	return nil
}

// closeVif closes the vif's frontend and removes it.
func (n *Network) closeVif(ctx context.Context, p *port) error {
	if err := n.unbind(ctx, p); err != nil {
		return err
	}
	return n.removeFrontend(ctx, p)
}

// removeFrontend removes the vif's frontend, in state Closed, from xenstore.
func (n *Network) removeFrontend(ctx context.Context, p *port) error {
	// The driver has left the frontend Closed; without a driver nobody has.
	frontend := fmt.Sprintf("device/vif/%d", p.Vif)
	state, err := n.opts.Store.Read(ctx, frontend+"/state")
	if err == nil && state != stateClosed {
		err = n.opts.Store.Write(ctx, frontend+"/state", stateClosed)
	}
	if err == nil {
		err = n.opts.Store.Remove(ctx, frontend)
	}
	// A toolstack may have kept the node for itself, or have removed it before us. Closed is what counts.
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("remove the frontend of vif %d: %w", p.Vif, err)
	}
	return nil
}

// unbind takes the vif from its driver. xen-netfront then goes through Closing to Closed in step with the backend, for as long as
// it takes the backend to answer (xennet_bus_close), and its link goes. xen-netback does not answer before its hotplug script has connected
// (backend_switch_state in drivers/net/xen-netback/xenbus.c). The write cannot be interrupted, so it has a goroutine,
// which Close waits for; there is one a NIC, however often Unplug is called. When the caller has given up, the goroutine does the rest.
func (n *Network) unbind(ctx context.Context, p *port) error {
	path := filepath.Join(n.opts.Sys, "bus/xen/drivers/vif/unbind")
	n.mu.Lock()
	u := p.unbinding
	if u == nil {
		u = &unbinding{done: make(chan struct{})}
		p.unbinding = u
		n.unbinds.Go(func() {
			err := writeFile(path, busName(p.Vif))
			n.mu.Lock()
			switch {
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENODEV):
				err = nil // no driver, or one that does not have this vif: nothing to unbind
			case err != nil:
				p.unbinding = nil // a later call tries again
			}
			u.err = err
			close(u.done)
			late := u.late
			n.mu.Unlock()
			if late && err == nil {
				n.closedLate(p)
			}
		})
	}
	n.mu.Unlock()
	select {
	case <-u.done:
	case <-ctx.Done():
		n.mu.Lock()
		defer n.mu.Unlock()
		select {
		case <-u.done:
		default:
			u.late = true
			return fmt.Errorf("unbind %s from its driver: the backend %s does not close: %w", busName(p.Vif), p.Backend, ctx.Err())
		}
	}
	if u.err != nil {
		return fmt.Errorf("unbind %s from its driver: %w", busName(p.Vif), u.err)
	}
	return nil
}

// closedLate ends an Unplug whose caller has given up.
func (n *Network) closedLate(p *port) {
	ctx, cancel := context.WithTimeout(context.Background(), n.opts.Limit)
	defer cancel()
	log := n.opts.Log.With("nic", p.ID, "xenstore", p.Backend)
	if err := n.removeFrontend(ctx, p); err != nil {
		log.Warn("the backend of an unplugged NIC has closed at last, and its vif stays", "err", err)
		return
	}
	log.Info("the backend of an unplugged NIC has closed at last; its vif is gone")
}

// An unbinding is a write to a driver's unbind file.
type unbinding struct {
	done chan struct{}
	err  error // once done is closed
	late bool  // a caller has given up; guarded by Network.mu
}

// writeFile writes a file of sysfs or procfs, which os.WriteFile would try to make if it were not there.
func writeFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
