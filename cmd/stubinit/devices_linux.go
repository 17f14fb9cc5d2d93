package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/uevent"
	"github.com/stubinit/stubinit/media"
)

// neededDevices are the device files that QEMU's arguments name: disks
// (/dev/xvda…) and the consoles of the guest's serial ports (/dev/hvc3…).
// libxl_dm.c writes them inside longer arguments ("file=/dev/xvda,if=ide,…").
func neededDevices(dmArgv []string) []string {
	var need []string
	for i, arg := range dmArgv {
		if i > 0 && dmArgv[i-1] == "-name" {
			continue // the guest's, which may hold anything
		}
		for rest := arg; ; {
			i := strings.Index(rest, "/dev/")
			if i < 0 {
				break
			}
			rest = rest[i:]
			n := len("/dev/")
			for n < len(rest) && (rest[n] >= 'a' && rest[n] <= 'z' || rest[n] >= '0' && rest[n] <= '9') {
				n++
			}
			path := rest[:n]
			if (strings.HasPrefix(path, "/dev/xvd") || strings.HasPrefix(path, "/dev/hvc")) && !slices.Contains(need, path) {
				need = append(need, path)
			}
			rest = rest[n:]
		}
	}
	return need
}

// deviceReady says whether an open of the device would work. A disk's node
// comes with the disk. The nodes of hvc1 to hvc7 are there from the start; an
// open fails until the driver has bound the console, which sysfs shows.
func deviceReady(path string) bool {
	if n, isConsole := strings.CutPrefix(path, "/dev/hvc"); isConsole {
		if n == "0" {
			return true
		}
		_, err := os.Stat("/sys/bus/xen/drivers/xenconsole/console-" + n)
		return err == nil
	}
	var st unix.Stat_t
	return unix.Stat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK
}

// waitDevices waits for the devices for deviceLimit; the error names each one
// that did not come, with the state of its backend.
func (a *agent) waitDevices(ctx context.Context, paths []string) error {
	missing := func() []string {
		return slices.DeleteFunc(slices.Clone(paths), deviceReady)
	}
	first := missing()
	if len(first) == 0 {
		return nil
	}
	a.log.Info("waiting for devices", "devices", strings.Join(first, ","), "limit", deviceLimit)
	events, err := uevent.Listen()
	if err != nil {
		return err
	}
	defer events.Close()
	ctx, cancel := context.WithTimeout(ctx, deviceLimit)
	defer cancel()
	err = events.Until(ctx, func() bool { return len(missing()) == 0 })
	if err == nil {
		return nil
	}
	if ctx.Err() == nil || !errors.Is(err, ctx.Err()) {
		return err
	}
	var late []string
	for _, path := range missing() {
		late = append(late, path+a.backendState(path))
	}
	return hint(fmt.Errorf("no %s after %v", strings.Join(late, ", "), deviceLimit),
		"the backend in dom0 did not connect: look at its state and hotplug-status in xenstore, and at the disk's target")
}

// backendState describes a device's backend for an error: " (/local/domain/0/backend/vbd/5/51712 is in state 2)".
func (a *agent) backendState(path string) string {
	ctx, cancel := context.WithTimeout(context.Background(), xenstoreLimit)
	defer cancel()
	dir := ""
	if n, isConsole := strings.CutPrefix(path, "/dev/hvc"); isConsole {
		dir = "device/console/" + n
	} else {
		for _, devid := range a.cfg.vbds {
			if name, err := media.Name(devid); err == nil && "/dev/"+name == path {
				dir = "device/vbd/" + strconv.Itoa(devid)
			}
		}
	}
	if dir == "" {
		return " (not in xenstore)"
	}
	backend, err := a.xs.ReadString(ctx, dir+"/backend")
	if err != nil {
		return fmt.Sprintf(" (%v)", err)
	}
	state, err := a.xs.ReadString(ctx, backend+"/state")
	if err != nil {
		return fmt.Sprintf(" (%v)", err)
	}
	return fmt.Sprintf(" (%s is in state %s)", backend, state)
}

// fixedDisks are the vbds that are there for as long as the guest is: not the CD-ROMs, which the toolstack replaces.
func (a *agent) fixedDisks(ctx context.Context) ([]int, error) {
	var fixed []int
	for _, devid := range a.cfg.vbds {
		kind, err := a.xs.Read(ctx, fmt.Sprintf("device/vbd/%d/device-type", devid))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
		if kind != "cdrom" {
			fixed = append(fixed, devid)
		}
	}
	return fixed, nil
}

// followDisks logs each fixed disk that is detached from the stubdomain. Linux takes it away although QEMU has it open, and leaves a
// device of no size (__blk_mark_disk_dead in block/genhd.c), beyond whose end QEMU reads zeros: nothing else tells anybody.
func (a *agent) followDisks(ctx context.Context, disks []int) error {
	watch, err := a.xs.Watch(ctx, "device/vbd")
	if err != nil {
		return err
	}
	defer watch.Close()
	for {
		if _, err := watch.Next(ctx); err != nil {
			return err
		}
		there, err := readNumbers(ctx, a.xs, "device/vbd")
		if err != nil {
			return err
		}
		disks = slices.DeleteFunc(disks, func(devid int) bool {
			if slices.Contains(there, devid) {
				return false
			}
			name, err := media.Name(devid)
			if err != nil {
				name = "none of ours"
			}
			a.log.Error("a disk was detached from the stubdomain while QEMU has it open: the guest reads zeros from it; shut the guest down",
				"devid", devid, "disk", name)
			return true
		})
	}
}
