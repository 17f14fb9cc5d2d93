package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/stubinit/stubinit/internal/qemu"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
	"github.com/stubinit/stubinit/netup"
)

// A config is what the toolstack wants of this stubdomain: read once, before
// anything is set up, and never changed. Whatever comes later (hot-plugged vbds
// and PCI devices) has a watch of its own.
type config struct {
	self     uint16   // our own domid
	target   uint16   // the guest's
	dmArgv   []string // QEMU's arguments, in order, without argv[0]
	vifs     []netup.Vif
	vbds     []int // device/vbd/<devid>
	consoles []int // device/console/<n>, 0 not among them
}

// devicePath is where we and the toolstack meet: /local/domain/<s>/device-model/<g>.
func (c *config) devicePath() string {
	return fmt.Sprintf("/local/domain/%d/device-model/%d", c.self, c.target)
}

// domidLimit is the first reserved domid (xen.h, DOMID_FIRST_RESERVED).
const domidLimit = 0x7ff0

// readConfig reads the toolstack's part of xenstore. Each error names the path.
// Paths without a leading slash are below /local/domain/<s>.
func readConfig(ctx context.Context, xs *xenstore.Client) (*config, error) {
	c := new(config)
	var err error
	if c.self, err = readDomid(ctx, xs, "domid"); err != nil {
		return nil, err
	}
	if c.target, err = readDomid(ctx, xs, "target"); err != nil {
		return nil, hint(err, "was this domain created by xl, with device_model_stubdomain_override=1 for an HVM guest?")
	}
	if c.dmArgv, err = readDMArgv(ctx, xs, c.target); err != nil {
		return nil, err
	}
	if c.vifs, err = readVifs(ctx, xs); err != nil {
		return nil, err
	}
	if c.vbds, err = readNumbers(ctx, xs, "device/vbd"); err != nil {
		return nil, err
	}
	if c.consoles, err = readNumbers(ctx, xs, "device/console"); err != nil {
		return nil, err
	}
	return c, nil
}

func readDomid(ctx context.Context, xs *xenstore.Client, path string) (uint16, error) {
	v, err := xs.ReadString(ctx, path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(v, 10, 16)
	if err != nil || n >= domidLimit {
		return 0, fmt.Errorf("xenstore %s: %q is not a domid", path, v)
	}
	return uint16(n), nil
}

// maxArgs bounds dm-argv; libxl writes three-digit names.
const maxArgs = 999

// readDMArgv reads /vm/<uuid>/image/dm-argv/NNN (libxl_dm.c,
// libxl__write_stub_linux_dm_argv): one argument a node, any byte in it, ordered by number.
func readDMArgv(ctx context.Context, xs *xenstore.Client, target uint16) ([]string, error) {
	vmPath := fmt.Sprintf("/local/domain/%d/vm", target)
	vm, err := xs.ReadString(ctx, vmPath)
	if err != nil {
		return nil, hint(err, "the stubdomain may not read the guest's node, or the guest is gone")
	}
	if !strings.HasPrefix(vm, "/vm/") {
		return nil, fmt.Errorf("xenstore %s: %q does not start with /vm/", vmPath, vm)
	}
	dir := vm + "/image/dm-argv"
	numbers, err := readNumberNames(ctx, xs, dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if len(numbers) == 0 {
		return nil, hint(fmt.Errorf("xenstore %s: no arguments for QEMU", dir),
			"the toolstack writes them for device_model_version=\"qemu-xen\"; it is written as one string in image/dmargs for qemu-xen-traditional, which Linux stubdomains do not run")
	}
	if len(numbers) > maxArgs {
		return nil, fmt.Errorf("xenstore %s: %d arguments, more than %d", dir, len(numbers), maxArgs)
	}
	args := make([]string, len(numbers))
	for i, n := range numbers {
		if n.number != i+1 {
			return nil, fmt.Errorf("xenstore %s: argument %03d is missing", dir, i+1)
		}
		path := dir + "/" + n.name
		if args[i], err = xs.Read(ctx, path); err != nil {
			return nil, err
		}
		if strings.IndexByte(args[i], 0) >= 0 {
			return nil, fmt.Errorf("xenstore %s: a NUL byte in an argument: %q", path, args[i])
		}
	}
	return args, nil
}

// checkAbsent refuses arguments with which QEMU would end for want of a library that the image leaves out; list names those.
func checkAbsent(list string, args []string) error {
	absent, err := qemu.LoadAbsent(list)
	if err != nil {
		return err
	}
	err = absent.Check(args)
	var refused *qemu.AbsentError
	if errors.As(err, &refused) {
		return hint(err, fmt.Sprintf("%s in the guest's configuration, or build the image from a manifest without the line \"absent %s\"",
			refused.Instead, refused.Library))
	}
	return err
}

func readVifs(ctx context.Context, xs *xenstore.Client) ([]netup.Vif, error) {
	ids, err := readNumbers(ctx, xs, "device/vif")
	if err != nil {
		return nil, err
	}
	vifs := make([]netup.Vif, 0, len(ids))
	for _, id := range ids {
		dir := fmt.Sprintf("device/vif/%d", id)
		v := netup.Vif{ID: id}
		mac, err := xs.ReadString(ctx, dir+"/mac")
		if err != nil {
			return nil, err
		}
		if v.MAC, err = net.ParseMAC(mac); err != nil || len(v.MAC) != 6 {
			return nil, fmt.Errorf("xenstore %s/mac: %q is not an Ethernet address", dir, mac)
		}
		if v.Backend, err = xs.ReadString(ctx, dir+"/backend"); err != nil {
			return nil, err
		}
		mtu, err := xs.ReadString(ctx, dir+"/mtu")
		switch {
		case errors.Is(err, fs.ErrNotExist): // the kernel's netfront default then
		case err != nil:
			return nil, err
		default:
			if v.MTU, err = strconv.Atoi(mtu); err != nil || v.MTU < 68 || v.MTU > 65535 {
				return nil, fmt.Errorf("xenstore %s/mtu: %q is not an MTU", dir, mtu)
			}
		}
		vifs = append(vifs, v)
	}
	return vifs, nil
}

// readNumbers lists a device directory's numeric children in ascending order; no directory means none.
func readNumbers(ctx context.Context, xs *xenstore.Client, dir string) ([]int, error) {
	names, err := readNumberNames(ctx, xs, dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	ids := make([]int, len(names))
	for i, n := range names {
		ids[i] = n.number
	}
	return ids, nil
}

type numberName struct {
	number int
	name   string // as in xenstore: "001"
}

func readNumberNames(ctx context.Context, xs *xenstore.Client, dir string) ([]numberName, error) {
	names, err := xs.List(ctx, dir)
	if err != nil {
		return nil, err
	}
	out := make([]numberName, 0, len(names))
	for _, name := range names {
		n, err := strconv.ParseUint(name, 10, 31)
		if err != nil {
			return nil, fmt.Errorf("xenstore %s/%s: %q is not a number", dir, name, name)
		}
		out = append(out, numberName{int(n), name})
	}
	slices.SortFunc(out, func(a, b numberName) int { return a.number - b.number })
	for i := 1; i < len(out); i++ {
		if out[i].number == out[i-1].number {
			return nil, fmt.Errorf("xenstore %s: %s and %s are the same number", dir, out[i-1].name, out[i].name)
		}
	}
	return out, nil
}
