package netup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// A Store is what is needed of xenstore. A path that does not exist is an error that is fs.ErrNotExist. WaitFor calls ok with a
// node's value and whether it exists, now and after each change, until it is true or ctx ends.
type Store interface {
	WaitFor(ctx context.Context, path string, ok func(value string, exists bool) bool) (string, error)
	Read(ctx context.Context, path string) (string, error)
	Write(ctx context.Context, path, value string) error
	Remove(ctx context.Context, path string) error
}

// Options are what a [Network] is made from.
type Options struct {
	Log   *slog.Logger  // required
	Store Store         // required
	UID   int           // QEMU's user, who may attach to the taps; 0 leaves them without an owner
	GID   int           // QEMU's group, likewise
	Limit time.Duration // after which Run warns of vifs that are not up, and Unplug gives up waiting; 0: 30 s
	Sys   string        // where sysfs is mounted; empty: /sys

	// Up, if set, is told the ID of each NIC whose link comes up. There is one call at a time, which must not block.
	Up func(nicID string)
}

// A Network holds the links of QEMU's NICs. Its methods may be called from different goroutines. Everything happens in the network
// namespace of the thread that called New, which must be that of the threads that call Setup and Unplug.
type Network struct {
	opts     Options
	requests *nl.SocketHandle
	events   *nl.NetlinkSocket
	running  atomic.Bool
	unbinds  sync.WaitGroup // writes to sysfs that may be stuck in the kernel

	mu    sync.Mutex
	ports []*port // in the order of the plan
}

// A port is a NIC and how far its vif has come.
type port struct {
	NIC
	link      string // the vif's, for messages
	index     int    // of that link; 0 while it is not in the bridge
	running   bool   // that link has its carrier
	connected bool   // the vif's backend is in state Connected
	up        bool   // both, as the log has it
	unplugged bool
	unbinding *unbinding // under way or done; nil before
}

// ErrNoNIC is what Unplug returns for a device that is no planned NIC.
var ErrNoNIC = errors.New("no emulated NIC has this id")

// New opens the sockets of a network.
func New(opts Options) (*Network, error) {
	if opts.Limit == 0 {
		opts.Limit = 30 * time.Second
	}
	if opts.Sys == "" {
		opts.Sys = "/sys"
	}
	requests, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	events, err := nl.Subscribe(unix.NETLINK_ROUTE)
	if err != nil {
		requests.Close()
		return nil, fmt.Errorf("open rtnetlink: %w", err)
	}
	// The kernel's own words make "invalid argument" readable; without them the number has to do.
	_ = requests.SetExtAck(true)
	// The kernel answers a request before the send returns: this is only so that nothing can wait forever.
	_ = requests.SetReceiveTimeout(&unix.Timeval{Sec: 10})
	return &Network{opts: opts, requests: &nl.SocketHandle{Socket: requests}, events: events}, nil
}

// Close closes the sockets, which ends Run. It waits for writes to sysfs that Unplug has given up on: they end when the vif's
// backend answers. The links stay.
func (n *Network) Close() error {
	n.events.Close()
	n.requests.Close()
	n.unbinds.Wait()
	return nil
}

// Setup makes the NICs' bridges and taps, without waiting for any vif. What fails for one NIC does not keep the others from
// being set up; all errors are returned. It logs the plan's warnings. It may be called once.
func (n *Network) Setup(ctx context.Context, plan []NIC) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.ports != nil {
		return errors.New("set up the network: it has been set up before")
	}
	var errs []error
	failed := make(map[string]bool) // bridges and taps whose later operations are pointless
	for _, op := range Ops(plan) {
		if err := ctx.Err(); err != nil {
			return errors.Join(append(errs, fmt.Errorf("set up the network: %w", err))...)
		}
		if failed[op.Link] || failed[op.Bridge] && op.Bridge != "" {
			continue
		}
		if err := n.do(op); err != nil {
			failed[op.Link] = true
			errs = append(errs, err)
		}
	}
	for _, nic := range plan {
		n.ports = append(n.ports, &port{NIC: nic})
		if nic.Warning != "" {
			n.opts.Log.Warn("NIC will have no network", "nic", nic.ID, "tap", nic.Tap, "reason", nic.Warning)
		}
	}
	return errors.Join(errs...)
}

// do carries out one operation; its error names it.
func (n *Network) do(op Op) error {
	var err error
	switch op.Kind {
	case SetSysctl:
		err = writeFile(filepath.Join("/proc/sys", op.Link), strconv.Itoa(op.Value))
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
	case AddBridge:
		err = n.addBridge(op)
	case AddTap:
		err = addTap(op.Link, n.opts.UID, n.opts.GID)
	case SetDown:
		err = n.setDown(op)
	case SetPort:
		err = n.setPort(op)
	case DeleteBridge:
		err = n.deleteLink(op.Link)
	case DeleteTap:
		err = deleteTap(n.requests.Socket.GetFd(), op.Link)
	default:
		err = errors.ErrUnsupported
	}
	switch {
	case err == nil:
		return nil
	case op.Kind == AddBridge && errors.Is(err, unix.EOPNOTSUPP):
		return fmt.Errorf("%s: %w: the kernel needs the module bridge", op, err)
	case op.Kind == AddTap && (errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV)):
		return fmt.Errorf("%s: %w: the kernel needs the module tun", op, err)
	}
	return fmt.Errorf("%s: %w", op, err)
}

// addBridge makes a bridge with all its settings, and up, in one request.
func (n *Network) addBridge(op Op) error {
	req := n.request(unix.RTM_NEWLINK, unix.NLM_F_ACK|unix.NLM_F_CREATE|unix.NLM_F_EXCL)
	req.AddData(ifinfo(0, unix.IFF_UP))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(op.Link)))
	req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, op.MAC))
	info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
	info.AddRtAttr(nl.IFLA_INFO_KIND, []byte("bridge"))
	data := info.AddRtAttr(nl.IFLA_INFO_DATA, nil)
	data.AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(0))
	data.AddRtAttr(nl.IFLA_BR_FORWARD_DELAY, nl.Uint32Attr(0))
	data.AddRtAttr(nl.IFLA_BR_AGEING_TIME, nl.Uint32Attr(0))
	data.AddRtAttr(nl.IFLA_BR_GROUP_FWD_MASK, nl.Uint16Attr(groupFwdMask))
	data.AddRtAttr(nl.IFLA_BR_MCAST_SNOOPING, nl.Uint8Attr(0))
	req.AddData(info)
	return execute(req)
}

// setPort gives a link its address and MTU, adds it to its bridge and sets it up, in one request. The kernel does it in an order
// that works: address and MTU before up.
func (n *Network) setPort(op Op) error {
	bridge, err := ifindex(n.requests.Socket.GetFd(), op.Bridge)
	if err != nil {
		return err
	}
	req := n.request(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.AddData(ifinfo(0, unix.IFF_UP))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(op.Link)))
	req.AddData(nl.NewRtAttr(unix.IFLA_ADDRESS, op.MAC))
	if op.MTU != 0 {
		req.AddData(nl.NewRtAttr(unix.IFLA_MTU, nl.Uint32Attr(uint32(op.MTU))))
	}
	req.AddData(nl.NewRtAttr(unix.IFLA_MASTER, nl.Uint32Attr(uint32(bridge))))
	return execute(req)
}

func (n *Network) setDown(op Op) error {
	req := n.request(unix.RTM_SETLINK, unix.NLM_F_ACK)
	req.AddData(ifinfo(unix.IFF_UP, 0))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(op.Link)))
	return execute(req)
}

func (n *Network) deleteLink(name string) error {
	req := n.request(unix.RTM_DELLINK, unix.NLM_F_ACK)
	req.AddData(ifinfo(0, 0))
	req.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	return execute(req)
}

// links calls f for every link there is.
func (n *Network) links(f func(link)) error {
	req := n.request(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	req.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	msgs, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	// What changes during the dump comes as an event as well.
	if err != nil && !errors.Is(err, nl.ErrDumpInterrupted) {
		return fmt.Errorf("list links: %w", err)
	}
	for _, m := range msgs {
		if l, ok := parseLink(unix.RTM_NEWLINK, m); ok {
			f(l)
		}
	}
	return nil
}

// skipStats is RTEXT_FILTER_SKIP_STATS (linux/rtnetlink.h): a listing without counters is a fraction of the size.
const skipStats = 1 << 3

func (n *Network) request(kind, flags int) *nl.NetlinkRequest {
	req := nl.NewNetlinkRequest(kind, flags)
	req.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_ROUTE: n.requests}
	return req
}

func execute(req *nl.NetlinkRequest) error {
	_, err := req.Execute(unix.NETLINK_ROUTE, 0)
	return err
}

// ifinfo is the head of a link request that clears and sets flags (IFF_…) and leaves the others.
func ifinfo(clear, set uint32) *nl.IfInfomsg {
	m := nl.NewIfInfomsg(unix.AF_UNSPEC)
	m.Flags, m.Change = set, clear|set
	return m
}

// A link is what a message of rtnetlink says of one.
type link struct {
	index   int
	name    string
	mac     net.HardwareAddr
	mtu     int
	up      bool // set up (IFF_UP)
	running bool // and works (IF_OPER_UP of RFC 2863)
	gone    bool
}

const operUp = 6 // IF_OPER_UP (linux/if.h)

// parseLink reads the payload of an RTM_NEWLINK or RTM_DELLINK. ok is false for others, and for those of the bridge's family:
// there a deletion only means that a port has left.
func parseLink(kind uint16, b []byte) (l link, ok bool) {
	if kind != unix.RTM_NEWLINK && kind != unix.RTM_DELLINK || len(b) < unix.SizeofIfInfomsg {
		return link{}, false
	}
	msg := nl.DeserializeIfInfomsg(b)
	if msg.Family != unix.AF_UNSPEC {
		return link{}, false
	}
	attrs, err := nl.ParseRouteAttr(b[unix.SizeofIfInfomsg:])
	if err != nil {
		return link{}, false
	}
	l = link{
		index: int(msg.Index),
		up:    msg.Flags&unix.IFF_UP != 0,
		gone:  kind == unix.RTM_DELLINK,
	}
	for _, a := range attrs {
		switch a.Attr.Type {
		case unix.IFLA_IFNAME:
			l.name = unix.ByteSliceToString(a.Value)
		case unix.IFLA_ADDRESS:
			l.mac = a.Value
		case unix.IFLA_OPERSTATE:
			// IFF_RUNNING is set in the unknown state of a new link too, from which it may go down again.
			l.running = l.up && len(a.Value) == 1 && a.Value[0] == operUp
		case unix.IFLA_MTU:
			if len(a.Value) == 4 {
				l.mtu = int(nl.NativeEndian().Uint32(a.Value))
			}
		}
	}
	return l, true
}
