// Package media lets the toolstack change the medium of a CD-ROM drive: it keeps, for each removable vbd of the stubdomain,
// an fdset in QEMU that holds the block device open and is called "stub-devid:<devid>".
//
// libxl (from 4.20 on; libxl_disk.c, the cdrom_insert_* callbacks) ejects the medium, removes the fdset, detaches the PV
// disk, attaches the new one, then asks query-fdsets every 200 ms until the fdset is there again, and gives it to
// blockdev-change-medium. A detach fails after 10 s if anybody still has the device open. So each incarnation of a block device is given
// to QEMU exactly once, and our own descriptor is closed at once: a set that libxl has removed must not come back before the disk is another one.
//
// A QEMU that is stopped (QMP stop, as around a save; xl pause does not stop QEMU) closes a removed set's descriptors only from 9.1 on. An older one keeps them,
// and the PV detach then fails after its 10 s, whatever we do.
//
// stubdom.txt, "CD-ROM changing".
package media

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/uevent"
	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

// A Monitor is what the keeper needs of QEMU's QMP monitor.
type Monitor interface {
	Execute(ctx context.Context, name string, args any) (json.RawMessage, error)
	ExecuteWithFile(ctx context.Context, name string, args any, f *os.File) (json.RawMessage, error)
}

// Events are uevents; *uevent.Listener has them.
type Events interface {
	Next(ctx context.Context) (uevent.Event, error)
}

// A Keeper keeps the fdsets. Initial comes before QEMU's start, then Run.
type Keeper struct {
	Store  *xenstore.Client
	Events Events
	Log    *slog.Logger
	Dev    string // "/dev"
	Sys    string // "/sys"

	// given is, by devid, the incarnation that QEMU has been given. Entries stay when the vbd goes: its nodes and its disk come and go
	// at different times, and a set that libxl has removed must not come back in between.
	given map[int]string
	// plain are the vbds that are known to be no removable disks, so that each look does not ask for all of them again.
	plain map[int]bool
	// attached is, by devid, since when there is a vbd that QEMU has not been given.
	attached map[int]time.Time
	// followed are the backends of which Run follows the "online" node.
	followed map[string]bool
}

// A Set is an fdset for QEMU's command line.
type Set struct {
	Opaque string
	File   *os.File // the caller closes it once QEMU has started
}

// Opaque is how libxl finds the fdset of a vbd (libxl_disk.c).
func Opaque(devid int) string { return "stub-devid:" + strconv.Itoa(devid) }

// requestLimit bounds each QMP request: QEMU answers these in milliseconds, if at all.
const requestLimit = 10 * time.Second

// Initial opens the removable disks that are there already. One that cannot be opened is logged, and Run tries it again.
func (k *Keeper) Initial(ctx context.Context) ([]Set, error) {
	devids, err := k.removable(ctx)
	if err != nil {
		return nil, err
	}
	var sets []Set
	for _, devid := range devids {
		f, incarnation, err := k.openMedium(ctx, devid)
		if gone(err) {
			continue // not connected yet: Run sees it come
		}
		if err != nil {
			k.Log.Error("no fdset for removable disk at the start", "devid", devid, "err", err)
			continue
		}
		k.keep(devid, incarnation)
		if incarnation == empty {
			k.warnEmpty(devid)
		}
		sets = append(sets, Set{Opaque(devid), f})
	}
	return sets, nil
}

// Run gives QEMU the descriptor of each removable disk that appears, until ctx ends or a source of events fails. What
// fails for one disk is logged, and does not stop the others.
func (k *Keeper) Run(ctx context.Context, qmp Monitor) error {
	if err := preferXenbus("/proc"); err != nil {
		k.Log.Warn("xl cd-insert may time out: the kernel's xenstore threads have no priority", "err", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	watch, err := k.Store.Watch(ctx, "device/vbd")
	if err != nil {
		return err
	}
	defer watch.Close()

	// Both sources only say that it is time to look.
	look := make(chan struct{}, 1)
	failed := make(chan error, 2)
	source := func(next func() (relevant bool, err error)) {
		for {
			relevant, err := next()
			if err != nil {
				failed <- err
				return
			}
			if relevant {
				select {
				case look <- struct{}{}:
				default:
				}
			}
		}
	}
	k.attached = make(map[int]time.Time)
	k.followed = make(map[string]bool)
	var followers sync.WaitGroup
	defer followers.Wait()
	go source(func() (bool, error) {
		_, err := watch.Next(ctx)
		return true, err
	})
	go source(func() (bool, error) {
		e, err := k.Events.Next(ctx)
		if errors.Is(err, uevent.ErrLost) {
			return true, nil
		}
		return e.Vars["SUBSYSTEM"] == "block", err
	})
	defer func() { // both end with ctx
		cancel()
		<-failed
	}()
	for {
		select {
		case err := <-failed:
			return err
		case <-look:
			for devid, backend := range k.sync(ctx, qmp) {
				followers.Go(func() { k.follow(ctx, devid, backend) })
			}
		}
	}
}

// sync brings QEMU's fdsets up to date with the disks. It returns, by devid, the backends that are to be followed from now on.
func (k *Keeper) sync(ctx context.Context, qmp Monitor) (backends map[int]string) {
	start := time.Now()
	devids, err := k.removable(ctx)
	if err != nil {
		k.Log.Warn("cannot list removable disks", "err", err)
		return nil
	}
	absent := func(devid int) bool { return !slices.Contains(devids, devid) }
	maps.DeleteFunc(k.attached, func(devid int, _ time.Time) bool { return absent(devid) })
	// An empty drive has no disk that could outlive its nodes.
	maps.DeleteFunc(k.given, func(devid int, incarnation string) bool { return incarnation == empty && absent(devid) })
	backends = make(map[int]string)
	for _, devid := range devids {
		if _, ok := k.attached[devid]; !ok {
			k.attached[devid] = start
		}
		if err := k.give(ctx, qmp, devid, start); err != nil && ctx.Err() == nil {
			k.Log.Error("no fdset for removable disk: xl cd-insert of it will time out", "devid", devid, "err", err)
		}
		if backend := k.backend(ctx, devid); backend != "" && !k.followed[backend] {
			k.followed[backend], backends[devid] = true, backend
		}
	}
	return backends
}

// nodes is where a vbd's frontend has its nodes.
func nodes(devid int) string { return "device/vbd/" + strconv.Itoa(devid) }

// follow removes the nodes of a vbd as soon as libxl wants it gone, until ctx ends or xenstore fails.
func (k *Keeper) follow(ctx context.Context, devid int, backend string) {
	err := k.followOnline(ctx, devid, backend)
	if ctx.Err() == nil {
		k.Log.Warn("xl cd-insert may time out: detaches are not followed any more", "devid", devid, "err", err)
	}
}

// nextDiskLimit is how long after a detach the next disk may take. libxl attaches it within milliseconds.
const nextDiskLimit = 5 * time.Second

func (k *Keeper) followOnline(ctx context.Context, devid int, backend string) error {
	watch, err := k.Store.Watch(ctx, backend+"/online")
	if err != nil {
		return err
	}
	defer watch.Close()
	online := true
	for {
		limit, cancel := ctx, context.CancelFunc(func() {})
		if !online {
			limit, cancel = context.WithTimeout(ctx, nextDiskLimit)
		}
		_, err := watch.Next(limit)
		cancel()
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			k.warnMissing(devid)
			online = true // said once
			continue
		}
		if err != nil {
			return err
		}
		if online, err = k.dropDetached(ctx, devid, backend); err != nil {
			return err
		}
	}
}

// warnMissing tells that a detach was not followed by another disk. QEMU in dom0 looks at all vbds of this domain at each change of one
// (hw/xen/xen-bus.c, xen_bus_backend_changed). With about 30 of them that takes so long that libxl has the new disk's nodes in place when QEMU
// gives up the old disk, and with it removes whatever nodes are there (xen_device_unrealize).
func (k *Keeper) warnMissing(devid int) {
	k.Log.Warn("removable disk was detached, and no other has come in its place: an xl cd-insert that waits for it times out, but works when it is "+
		"tried again; with very many disks QEMU in dom0 removes the new disk's nodes together with the old one's", "devid", devid, "waited", nextDiskLimit)
}

// dropDetached removes the nodes of a vbd that libxl is detaching. libxl removes them itself when the backend has closed, and puts those
// of the next disk there within milliseconds. A kernel that looks only after that sees nodes that exist, keeps the
// old device, which is closed, and the new disk never comes (xenbus_dev_changed in drivers/xen/xenbus/xenbus_probe.c; Linux has it right from
// "xen/xenbus: better handle backend crash" on, February 2026). Removed here, they are missing for the whole of the backend's
// closing: to it, no frontend is one that has closed, for xen-blkback as for QEMU (xen_block_frontend_changed in hw/block/xen-block.c). It
// knows already that it is not online any more, since libxl writes that first.
//
// The look and the removal are one transaction, so that it is never the next disk's nodes that go.
//
// It returns whether the toolstack wants the vbd.
func (k *Keeper) dropDetached(ctx context.Context, devid int, backend string) (online bool, err error) {
	err = k.Store.Update(ctx, func(tx *xenstore.Tx) error {
		online, err := tx.Read(ctx, backend+"/online")
		if err != nil {
			return err
		}
		if online != "0" {
			return errOnline
		}
		return tx.Remove(ctx, nodes(devid))
	})
	switch {
	case err == nil:
		k.Log.Debug("removable disk is being detached: its nodes are gone", "devid", devid)
	case errors.Is(err, errOnline):
		return true, nil
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission): // the backend's nodes are gone, or their parent's
	default:
		return false, err
	}
	return false, nil
}

var errOnline = errors.New("the toolstack wants the backend online")

// give makes the fdset of one disk, unless QEMU had this incarnation already. start is when its event came.
func (k *Keeper) give(ctx context.Context, qmp Monitor, devid int, start time.Time) error {
	name, err := Name(devid)
	if err != nil {
		return err
	}
	incarnation, err := k.present(ctx, devid, name)
	if err == nil && k.given[devid] == incarnation {
		delete(k.attached, devid)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, requestLimit)
	defer cancel()
	f, incarnation, err := k.openMedium(ctx, devid)
	if gone(err) {
		return nil // an event follows
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := k.removeStale(ctx, qmp, devid); err != nil {
		return err
	}
	if _, err := qmp.ExecuteWithFile(ctx, "add-fd", map[string]any{"opaque": Opaque(devid)}, f); err != nil {
		return err
	}
	k.keep(devid, incarnation)
	k.Log.Info("fdset for removable disk", "devid", devid, "disk", name, "took", time.Since(start), "since_attach", time.Since(k.attached[devid]))
	delete(k.attached, devid)
	if incarnation == empty {
		k.warnEmpty(devid)
	}
	if k.Log.Enabled(ctx, slog.LevelDebug) {
		heap, descriptors := usage()
		k.Log.Debug("stubinit uses", "heap_kib", heap, "descriptors", descriptors, "all_descriptors", allDescriptors())
	}
	return nil
}

// warnEmpty tells that the drive stays empty. libxl detaches the empty disk before it attaches a medium (libxl_device.c,
// libxl__initiate_device_generic_remove): it sets the backend's state to Closing and waits 10 s for Closed, which nobody writes for a disk that
// QEMU in dom0 has not made. Were it written by hand, that QEMU would still make no disk of the next one: a
// backend that it failed to make counts as made (hw/xen/xen-backend.c, xen_backend_device_create).
func (k *Keeper) warnEmpty(devid int) {
	k.Log.Warn("drive is empty and stays so: QEMU in dom0, from 6.1 on, has no disk for it, and libxl can then put no medium in; "+
		"an image of no length is an empty drive that works", "devid", devid)
}

// usage is what this process holds: that a change of media leaves nothing behind shows from one to the next.
func usage() (heapKiB uint64, descriptors int) {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	if entries, err := os.ReadDir("/proc/self/fd"); err == nil {
		descriptors = len(entries) - 1 // the one that read them
	}
	return m.HeapAlloc / 1024, descriptors
}

// allDescriptors counts those of every process here, which are ours and QEMU's.
func allDescriptors() int {
	paths, _ := filepath.Glob("/proc/[1-9]*/fd/*") // fails for a bad pattern only
	return len(paths)
}

func (k *Keeper) keep(devid int, incarnation string) {
	if k.given == nil {
		k.given = make(map[int]string)
	}
	k.given[devid] = incarnation
}

// removeStale removes a set of the disk's former incarnation, which libxl
// removes itself unless it failed half-way: a name that two sets have would let it take the old one.
func (k *Keeper) removeStale(ctx context.Context, qmp Monitor, devid int) error {
	answer, err := qmp.Execute(ctx, "query-fdsets", nil)
	if err != nil {
		return err
	}
	var sets []struct {
		ID  int64 `json:"fdset-id"`
		FDs []struct {
			Opaque string `json:"opaque"`
		} `json:"fds"`
	}
	if err := json.Unmarshal(answer, &sets); err != nil {
		return fmt.Errorf("query-fdsets: %w", err)
	}
	for _, set := range sets {
		for _, fd := range set.FDs {
			if fd.Opaque == Opaque(devid) {
				if _, err := qmp.Execute(ctx, "remove-fd", map[string]any{"fdset-id": set.ID}); err != nil {
					return err
				}
				break
			}
		}
	}
	return nil
}

// removable lists the vbds whose device-type is cdrom, in xenstore's order.
func (k *Keeper) removable(ctx context.Context) ([]int, error) {
	names, err := k.Store.List(ctx, "device/vbd")
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var devids []int
	plain := make(map[int]bool)
	for _, name := range names {
		devid, err := strconv.Atoi(name)
		if err != nil {
			return nil, fmt.Errorf("xenstore device/vbd/%s: not a number", name)
		}
		if k.plain[devid] {
			plain[devid] = true
			continue
		}
		kind, err := k.Store.Read(ctx, "device/vbd/"+name+"/device-type")
		switch {
		case errors.Is(err, fs.ErrNotExist): // being removed
		case err != nil:
			return nil, err
		case kind == "cdrom":
			devids = append(devids, devid)
		default:
			plain[devid] = true
		}
	}
	k.plain = plain // one that is gone may come back as another
	return devids, nil
}

// empty is the incarnation of a drive without a medium.
const empty = "empty"

// incarnation tells one disk from the next under the same name: diskseq counts
// every disk that the kernel has ever added (Linux 5.15).
func (k *Keeper) incarnation(name string) (string, error) {
	b, err := os.ReadFile(filepath.Join(k.Sys, "block", name, "diskseq"))
	return strings.TrimSpace(string(b)), err
}

// present is the incarnation that is there, the empty drive included.
func (k *Keeper) present(ctx context.Context, devid int, name string) (string, error) {
	if k.isEmpty(ctx, devid) {
		return empty, nil
	}
	return k.incarnation(name)
}

// isEmpty says that the toolstack has put no medium in. The backend's params are then a format alone ("aio:"), and QEMU in dom0
// (from 6.1 on: "Could not stat file ”") makes no disk of it; libxl waits for its fdset all the same.
func (k *Keeper) isEmpty(ctx context.Context, devid int) bool {
	backend := k.backend(ctx, devid)
	if backend == "" {
		return false
	}
	params, err := k.Store.Read(ctx, backend+"/params")
	return err == nil && (params == "" || strings.HasSuffix(params, ":"))
}

// backend is the path of a vbd's backend; empty while there is none.
func (k *Keeper) backend(ctx context.Context, devid int) string {
	backend, err := k.Store.ReadString(ctx, nodes(devid)+"/backend")
	if err != nil {
		return ""
	}
	return backend
}

// gone says that an open failed because there is no disk, or none any more.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENXIO) }

// openMedium opens what goes into the fdset: of an empty drive /dev/null, which nobody reads.
func (k *Keeper) openMedium(ctx context.Context, devid int) (*os.File, string, error) {
	if k.isEmpty(ctx, devid) {
		f, err := os.Open(os.DevNull)
		return f, empty, err
	}
	return k.open(devid)
}

// open opens a disk the way QEMU wants the fdset's member: read-only, which is the access mode that it asks for.
func (k *Keeper) open(devid int) (f *os.File, incarnation string, err error) {
	name, err := Name(devid)
	if err != nil {
		return nil, "", err
	}
	if incarnation, err = k.incarnation(name); err != nil {
		return nil, "", err
	}
	f, err = os.OpenFile(filepath.Join(k.Dev, name), os.O_RDONLY, 0)
	if err != nil {
		return nil, "", err
	}
	// The disk may have been another one when it was opened.
	if now, err := k.incarnation(name); err != nil || now != incarnation {
		f.Close()
		return nil, "", fs.ErrNotExist
	}
	return f, incarnation, nil
}
