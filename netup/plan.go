// Package netup gives QEMU's emulated NICs their links: for each one a tap under the name that dm-argv wants, the
// stubdomain's vif of the same MAC address, and a bridge of those two.
//
// [Plan] is pure. A [Network] applies it over netlink: Setup makes bridges and taps before QEMU starts, Run adds each vif
// when its link comes and says when its backend has connected, and Unplug takes one NIC away.
//
// # Bridges
//
// A bridge with two ports needs no learning: ageing time 0 makes it flood, so a frame always goes to the other port, also
// after the guest's address was seen on the wrong one (its own broadcast coming back, or a migration). Spanning tree is off and
// the forward delay 0. group_fwd_mask 0xfff8 lets 802.1X and LLDP through; the kernel refuses the bits of the other three
// link-local addresses (BR_GROUPFWD_RESTRICTED in net/bridge/br_private.h), of which 01:80:c2:00:00:00 passes anyway while
// spanning tree is off. Multicast snooping is off, or the bridge would drop what nobody joined. No port has an address, and
// IPv6 is off in the whole network namespace. The ports' own MAC addresses are ours (fe:ff:…), because a bridge keeps frames to
// a port's address for itself; a vif comes with the guest's. Where the kernel has br_netfilter, it is told not to look at bridged
// packets: it drops what is no good IPv4 or IPv6, and puts fragments together.
//
// # Offloads
//
// No offload needs switching for checksums to survive. A frame from the vif may have its checksum still to be filled in
// (NETRXF_csum_blank) or be longer than the MTU (GSO); the kernel completes it before the tap unless the tap's user asked for such
// frames with TUNSETOFFLOAD, and QEMU asks only for what the guest's driver has negotiated (nothing for e1000 and rtl8139).
// The other way round the vif's features say what its backend takes. The bridge itself turns LRO off on its ports.
// The tap is made with IFF_VNET_HDR, as QEMU attaches to it; the kernel takes that flag from whoever attaches last.
//
// # Restore and reboot
//
// After a restore or migration QEMU announces the guest's MAC address, with an RARP frame through the tap, when Options.Up says
// that it can pass: nothing here does. A guest's reboot makes libxl build the stubdomain anew, which brings unplugged NICs back.
package netup

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
)

// A Vif is one PV network device of the stubdomain, as xenstore has it.
type Vif struct {
	ID      int              // the number in device/vif/<ID>
	MAC     net.HardwareAddr // device/vif/<ID>/mac
	MTU     int              // device/vif/<ID>/mtu, in bytes; 0 when the hotplug script wrote none
	Backend string           // device/vif/<ID>/backend, for messages
}

// NoVif is the Vif of a NIC for which xenstore has none.
const NoVif = -1

// A NIC is one emulated network card with the links it needs.
type NIC struct {
	ID     string           // id of the -device, "nic0": what DEVICE_DELETED names
	Netdev string           // id of the -netdev, "net0": what netdev_del takes
	Driver string           // "e1000"
	MAC    net.HardwareAddr // the guest's; nil when dm-argv gives none
	Tap    string           // name of the tap, from ifname=
	Bridge string

	Vif     int    // the number in device/vif/<Vif>, or NoVif
	Backend string // xenstore path of the vif's backend
	MTU     int    // in bytes; 0: the vif's own

	// Own addresses of the links, locally administered, each one different.
	BridgeMAC, TapMAC, VifMAC net.HardwareAddr

	// Warning says why the NIC will have no network though QEMU gets its tap. Empty when all is well.
	Warning string
}

// Plan finds the NICs that QEMU emulates in its arguments and gives each one the vif with its MAC address. NICs are in the order
// of their -netdev. A vif that no tap asks for belongs to a NIC that is PV only, and is left alone.
//
// Vifs with the same MAC address go to the NICs that have it in ascending order of their IDs, which is the order in which
// libxl writes both.
func Plan(vifs []Vif, dmArgv []string) ([]NIC, error) {
	taps, devices, err := parseArgv(dmArgv)
	if err != nil {
		return nil, err
	}
	byNetdev := make(map[string]nicArg)
	for _, d := range devices {
		if other, ok := byNetdev[d.netdev]; ok {
			return nil, fmt.Errorf("plan the network: devices %q and %q both use netdev %q", other.id, d.id, d.netdev)
		}
		byNetdev[d.netdev] = d
	}

	free := slices.SortedFunc(slices.Values(vifs), func(a, b Vif) int { return cmp.Compare(a.ID, b.ID) })
	var own macSource
	for _, d := range devices {
		own.avoid = append(own.avoid, d.mac)
	}
	for _, v := range vifs {
		if v.MTU != 0 && (v.MTU < minMTU || v.MTU > maxMTU) {
			return nil, fmt.Errorf("plan the network: device/vif/%d/mtu is %d, not between %d and %d", v.ID, v.MTU, minMTU, maxMTU)
		}
		own.avoid = append(own.avoid, v.MAC)
	}
	names := make(map[string]bool)
	for _, t := range taps {
		if err := checkIfname(t.ifname); err != nil {
			return nil, fmt.Errorf("plan the network: ifname of netdev %q: %w", t.id, err)
		}
		if names[t.ifname] {
			return nil, fmt.Errorf("plan the network: ifname %q of netdev %q is used twice", t.ifname, t.id)
		}
		names[t.ifname] = true
	}

	var nics []NIC
	bridge := 0
	for _, t := range taps {
		d := byNetdev[t.id]
		nic := NIC{ID: d.id, Netdev: t.id, Driver: d.driver, MAC: d.mac, Tap: t.ifname, Vif: NoVif}
		for nic.Bridge = ""; nic.Bridge == "" || names[nic.Bridge]; bridge++ {
			nic.Bridge = fmt.Sprintf("br%d", bridge)
		}
		nic.BridgeMAC, nic.TapMAC, nic.VifMAC = own.next(), own.next(), own.next()
		i := slices.IndexFunc(free, func(v Vif) bool { return nic.MAC != nil && bytes.Equal(v.MAC, nic.MAC) })
		switch {
		case i >= 0:
			nic.Vif, nic.Backend, nic.MTU = free[i].ID, free[i].Backend, free[i].MTU
			free = slices.Delete(free, i, i+1)
		case d.netdev == "":
			nic.Warning = fmt.Sprintf("no -device uses netdev %q", t.id)
		case nic.MAC == nil:
			nic.Warning = fmt.Sprintf("device %q has no mac=, so no vif can be matched to it", d.id)
		default:
			nic.Warning = fmt.Sprintf("no vif in xenstore (device/vif) has the MAC address %s", nic.MAC)
		}
		nics = append(nics, nic)
	}
	return nics, nil
}

// checkIfname refuses what the kernel would refuse (dev_valid_name in net/core/dev.c), and '%', from which TUNSETIFF would
// make a name of its own.
func checkIfname(name string) error {
	switch {
	case len(name) > 15:
		return fmt.Errorf("%q is longer than 15 bytes", name)
	case name == "." || name == ".." || name == "lo":
		return fmt.Errorf("%q cannot be a tap's name", name)
	case strings.ContainsAny(name, "/:% \t\n\v\f\r\x00") || strings.IndexByte(name, 0xa0) >= 0: // a space to the kernel
		return fmt.Errorf("%q holds a byte that no link's name may hold", name)
	case name == "":
		return errors.New("it is empty")
	}
	return nil
}

// macSource hands out locally administered addresses fe:ff:…, passing over those that somebody has.
type macSource struct {
	last  uint32
	avoid []net.HardwareAddr
}

func (s *macSource) next() net.HardwareAddr {
	for {
		s.last++
		mac := binary.BigEndian.AppendUint32(net.HardwareAddr{0xfe, 0xff}, s.last)
		if !slices.ContainsFunc(s.avoid, func(a net.HardwareAddr) bool { return bytes.Equal(a, mac) }) {
			return mac
		}
	}
}

// An OpKind says what an [Op] does.
type OpKind int

// The operations, in the order in which they come in a NIC's life.
const (
	SetSysctl    OpKind = iota // of the whole network namespace; one that the kernel lacks is nothing to set
	AddBridge                  // made up
	AddTap                     // persistent; its settings follow by a SetPort
	SetDown                    // the address of a link that is up cannot be changed
	SetPort                    // address, MTU, bridge and up in one
	DeleteBridge               // frees its ports too
	DeleteTap
)

// An Op is one operation on one link, or on a sysctl.
type Op struct {
	Kind   OpKind
	Link   string           // its name; of a sysctl, its path under /proc/sys
	Value  int              // of a sysctl
	MAC    net.HardwareAddr // the link's own
	MTU    int              // in bytes; 0 leaves it. A bridge follows its ports.
	Bridge string           // of a port
}

// String is the operation in the words of ip(8).
func (o Op) String() string {
	switch o.Kind {
	case SetSysctl:
		return fmt.Sprintf("sysctl %s=%d", o.Link, o.Value)
	case AddBridge:
		return fmt.Sprintf("add bridge %s address %s stp_state 0 forward_delay 0 ageing_time 0 group_fwd_mask %#x mcast_snooping 0 up",
			o.Link, o.MAC, groupFwdMask)
	case AddTap:
		return fmt.Sprintf("add tap %s vnet_hdr persist", o.Link)
	case SetDown:
		return fmt.Sprintf("set %s down", o.Link)
	case SetPort:
		mtu := ""
		if o.MTU != 0 {
			mtu = fmt.Sprintf(" mtu %d", o.MTU)
		}
		return fmt.Sprintf("set %s address %s%s master %s up", o.Link, o.MAC, mtu, o.Bridge)
	case DeleteBridge:
		return "delete bridge " + o.Link
	case DeleteTap:
		return "delete tap " + o.Link
	}
	return fmt.Sprintf("OpKind(%d)", o.Kind)
}

// groupFwdMask lets all link-local groups through that may be: bits 0 to 2 are refused.
const groupFwdMask = 0xfff8

// Ops returns what must be done before QEMU starts, in order.
func Ops(nics []NIC) []Op {
	if len(nics) == 0 {
		return nil
	}
	ops := []Op{
		// Before any link is up, or it would have an address already. "all" is for links that exist and for those to come.
		{Kind: SetSysctl, Link: "net/ipv6/conf/all/disable_ipv6", Value: 1},
		{Kind: SetSysctl, Link: "net/bridge/bridge-nf-call-arptables", Value: 0},
		{Kind: SetSysctl, Link: "net/bridge/bridge-nf-call-iptables", Value: 0},
		{Kind: SetSysctl, Link: "net/bridge/bridge-nf-call-ip6tables", Value: 0},
	}
	for _, n := range nics {
		ops = append(ops, n.setupOps()...)
	}
	return ops
}

func (n NIC) setupOps() []Op {
	return []Op{
		{Kind: AddBridge, Link: n.Bridge, MAC: n.BridgeMAC},
		{Kind: AddTap, Link: n.Tap},
		{Kind: SetPort, Link: n.Tap, MAC: n.TapMAC, MTU: n.MTU, Bridge: n.Bridge},
	}
}

// JoinOps returns what adds the vif to its bridge: link is its name, mtu what it has now in bytes, up whether it is up.
func (n NIC) JoinOps(link string, mtu int, up bool) []Op {
	var ops []Op
	if n.MTU == 0 && mtu != defaultMTU { // the tap was made before the vif's was known
		ops = append(ops, Op{Kind: SetPort, Link: n.Tap, MAC: n.TapMAC, MTU: mtu, Bridge: n.Bridge})
	}
	if up {
		ops = append(ops, Op{Kind: SetDown, Link: link})
	}
	return append(ops, Op{Kind: SetPort, Link: link, MAC: n.VifMAC, MTU: n.MTU, Bridge: n.Bridge})
}

// MTUs in bytes: a new tap's (ETH_DATA_LEN), the smallest (ETH_MIN_MTU) and a tap's largest (drivers/net/tun.c).
const (
	defaultMTU = 1500
	minMTU     = 68
	maxMTU     = 65535 - 14
)

// UnplugOps returns what takes the NIC's own links away.
func (n NIC) UnplugOps() []Op {
	return []Op{{Kind: DeleteBridge, Link: n.Bridge}, {Kind: DeleteTap, Link: n.Tap}}
}
