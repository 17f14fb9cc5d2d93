package qmpbridge

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/stubinit/stubinit/internal/uevent"
)

// PCI waits for devices that come through pcifront. The kernel makes their nodes
// in sysfs up to seconds after the toolstack sees the frontend connected.
type PCI struct {
	// Xenstore is read as the stubdomain.
	Xenstore PCIStore
	// Sysfs is where sysfs is mounted; "/sys" when empty.
	Sysfs string
	// Listen begins to listen for the kernel's uevents; uevent.Listen when nil.
	Listen func() (Uevents, error)
}

// PCIStore is what PCI needs of a xenstore client.
type PCIStore interface {
	Read(ctx context.Context, path string) (string, error)
	List(ctx context.Context, path string) ([]string, error)
	// WaitFor waits until ok is true of the node's value, and gives it.
	WaitFor(ctx context.Context, path string, ok func(value string, exists bool) bool) (string, error)
}

// Uevents is what PCI needs of a *uevent.Listener. sysfs has no inotify events.
type Uevents interface {
	// Until looks at ok now and after each uevent, until it is true or ctx ends.
	Until(ctx context.Context, ok func() bool) error
	Close() error
}

// Ready waits until the stubdomain has the device that the host knows as
// hostaddr ("0000:03:00.0" or "03:00.0"), up to its configuration space, which
// is what QEMU opens first. It is meant for Options.PCIReady.
func (p *PCI) Ready(ctx context.Context, hostaddr string) error {
	host, err := parseBDF(hostaddr)
	if err != nil {
		return err
	}
	here, err := p.address(ctx, host)
	if err != nil {
		return fmt.Errorf("PCI device %v: %w", host, err)
	}
	sysfs := p.Sysfs
	if sysfs == "" {
		sysfs = "/sys"
	}
	listen := p.Listen
	if listen == nil {
		listen = func() (Uevents, error) { return uevent.Listen() }
	}
	events, err := listen()
	if err != nil {
		return fmt.Errorf("PCI device %v: %w", host, err)
	}
	defer events.Close()
	node := filepath.Join(sysfs, "bus/pci/devices", here.String(), "config")
	err = events.Until(ctx, func() bool {
		_, err := os.Stat(node)
		return err == nil
	})
	if err != nil {
		return fmt.Errorf("PCI device %v: %s has not come: %w", host, node, err)
	}
	return nil
}

// address gives the address under which the stubdomain sees a device. The
// backend has dev-N, the host's, written by libxl, and vdev-N, the stubdomain's,
// written by xen-pciback (drivers/xen/xen-pciback/xenbus.c) before it connects.
func (p *PCI) address(ctx context.Context, host bdf) (bdf, error) {
	backend, err := p.Xenstore.Read(ctx, "device/pci/0/backend") // libxl makes one frontend a domain
	if err != nil {
		return bdf{}, err
	}
	if backend == "" {
		return bdf{}, errors.New("device/pci/0/backend is empty in xenstore")
	}
	nodes, err := p.Xenstore.List(ctx, backend)
	if err != nil {
		return bdf{}, err
	}
	for _, node := range nodes {
		n, ok := strings.CutPrefix(node, "dev-")
		if !ok {
			continue
		}
		value, err := p.Xenstore.Read(ctx, backend+"/"+node)
		if err != nil {
			return bdf{}, err
		}
		if dev, err := parseBDF(value); err != nil || dev != host {
			continue
		}
		value, err = p.Xenstore.WaitFor(ctx, backend+"/vdev-"+n, func(v string, exists bool) bool { return exists && v != "" })
		if err != nil {
			return bdf{}, err
		}
		return parseBDF(value)
	}
	return bdf{}, fmt.Errorf("not in xenstore: no dev-N of %s has it", backend)
}

// A bdf is a PCI address: domain, bus, device, function.
type bdf struct{ domain, bus, device, function uint64 }

func (a bdf) String() string {
	return fmt.Sprintf("%04x:%02x:%02x.%x", a.domain, a.bus, a.device, a.function)
}

// parseBDF reads "DDDD:BB:DD.F" and "BB:DD.F"; xen-pciback writes the function
// with two digits.
func parseBDF(s string) (a bdf, err error) {
	bad := fmt.Errorf("%q is not a PCI address such as 0000:03:00.0", s)
	parts := strings.Split(s, ":")
	if len(parts) == 2 {
		parts = append([]string{"0"}, parts...)
	}
	if len(parts) != 3 {
		return bdf{}, bad
	}
	device, function, _ := strings.Cut(parts[2], ".")
	for _, f := range []struct {
		text string
		bits int
		to   *uint64
	}{{parts[0], 32, &a.domain}, {parts[1], 8, &a.bus}, {device, 5, &a.device}, {function, 3, &a.function}} {
		if *f.to, err = strconv.ParseUint(f.text, 16, f.bits); err != nil {
			return bdf{}, bad
		}
	}
	return a, nil
}
