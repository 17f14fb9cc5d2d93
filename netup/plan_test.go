package netup

import (
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

func vif(id int, addr string) Vif {
	return Vif{ID: id, MAC: mac(addr), Backend: "/local/domain/0/backend/vif/8/" + string(rune('0'+id))}
}

func argv(s string) []string { return strings.Fields(s) }

func TestPlan(t *testing.T) {
	for _, tt := range []struct {
		name string
		vifs []Vif
		argv string
		want []string // one NIC a line
	}{
		{
			name: "one NIC as libxl writes it",
			vifs: []Vif{vif(0, "00:16:3e:00:00:01")},
			argv: "-name g -device e1000,id=nic0,netdev=net0,mac=00:16:3e:00:00:01 -netdev type=tap,id=net0,ifname=vif7.0-emu,script=no,downscript=no",
			want: []string{"nic0 net0 e1000 vif7.0-emu br0 vif 0"},
		},
		{
			name: "any order, implied keys, two dashes",
			vifs: []Vif{vif(1, "00:16:3e:00:00:02"), vif(0, "00:16:3e:00:00:01")},
			argv: "--netdev tap,ifname=b,id=n1 -netdev ifname=a,type=tap,id=n0 " +
				"-device mac=00:16:3e:00:00:01,driver=rtl8139,netdev=n0,id=x0 -device virtio-net-pci,netdev=n1,mac=00:16:3E:00:00:02,id=x1",
			want: []string{"x1 n1 virtio-net-pci b br0 vif 1", "x0 n0 rtl8139 a br1 vif 0"},
		},
		{
			name: "JSON",
			vifs: []Vif{vif(3, "00:16:3e:00:00:01")},
			argv: `-device {"driver":"e1000","id":"nic3","netdev":"net3","mac":"00:16:3e:00:00:01","bootindex":1,"rombar":true} ` +
				`-netdev {"type":"tap","id":"net3","ifname":"vif7.3-emu","script":"no"}`,
			want: []string{"nic3 net3 e1000 vif7.3-emu br0 vif 3"},
		},
		{
			name: "a PV only vif gets nothing",
			vifs: []Vif{vif(0, "00:16:3e:00:00:01"), vif(1, "00:16:3e:00:00:02")},
			argv: "-device e1000,id=nic1,netdev=net1,mac=00:16:3e:00:00:02 -netdev tap,id=net1,ifname=vif7.1-emu",
			want: []string{"nic1 net1 e1000 vif7.1-emu br0 vif 1"},
		},
		{
			name: "other netdevs and devices",
			argv: "-netdev user,id=u0 -device e1000,netdev=u0,id=x -netdev tap,id=t0,fd=9 -device e1000,netdev=t0,id=y -device usb-tablet -net none -vnc 127.0.0.1:0",
		},
		{
			name: "the guest's name is no option",
			argv: "-name -netdev -device VGA",
		},
		{
			name: "no vif in xenstore",
			argv: "-device e1000,id=nic0,netdev=net0,mac=00:16:3e:00:00:01 -netdev tap,id=net0,ifname=vif7.0-emu",
			want: []string{"nic0 net0 e1000 vif7.0-emu br0 no vif in xenstore (device/vif) has the MAC address 00:16:3e:00:00:01"},
		},
		{
			name: "no device, no address",
			vifs: []Vif{vif(0, "00:16:3e:00:00:01")},
			argv: "-netdev tap,id=net0,ifname=a -netdev tap,id=net1,ifname=b -device e1000,id=nic1,netdev=net1",
			want: []string{`- net0 - a br0 no -device uses netdev "net0"`, `nic1 net1 e1000 b br1 device "nic1" has no mac=, so no vif can be matched to it`},
		},
		{
			name: "equal addresses are paired in order",
			vifs: []Vif{vif(2, "00:16:3e:00:00:01"), vif(1, "00:16:3e:00:00:01")},
			argv: "-device e1000,id=nic1,netdev=net1,mac=00:16:3e:00:00:01 -netdev tap,id=net1,ifname=a " +
				"-device e1000,id=nic2,netdev=net2,mac=00:16:3e:00:00:01 -netdev tap,id=net2,ifname=b",
			want: []string{"nic1 net1 e1000 a br0 vif 1", "nic2 net2 e1000 b br1 vif 2"},
		},
		{
			name: "a tap that is called as a bridge would be",
			vifs: []Vif{vif(0, "00:16:3e:00:00:01")},
			argv: "-device e1000,id=nic0,netdev=net0,mac=00:16:3e:00:00:01 -netdev tap,id=net0,ifname=br0",
			want: []string{"nic0 net0 e1000 br0 br1 vif 0"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			nics, err := Plan(tt.vifs, argv(tt.argv))
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, n := range nics {
				end := n.Warning
				if n.Vif != NoVif {
					end += "vif " + string(rune('0'+n.Vif))
				}
				line := []string{n.ID, n.Netdev, n.Driver, n.Tap, n.Bridge, end}
				for i := range line {
					if line[i] == "" {
						line[i] = "-"
					}
				}
				got = append(got, strings.Join(line, " "))
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestPlanWhole(t *testing.T) {
	v := vif(0, "00:16:3e:00:00:01")
	v.MTU = 9000
	got, err := Plan([]Vif{v}, argv("-device e1000,id=nic0,netdev=net0,mac=00:16:3e:00:00:01 -netdev tap,id=net0,ifname=vif7.0-emu"))
	if err != nil {
		t.Fatal(err)
	}
	want := []NIC{{
		ID: "nic0", Netdev: "net0", Driver: "e1000", MAC: mac("00:16:3e:00:00:01"), Tap: "vif7.0-emu", Bridge: "br0",
		Vif: 0, Backend: "/local/domain/0/backend/vif/8/0", MTU: 9000,
		BridgeMAC: mac("fe:ff:00:00:00:01"), TapMAC: mac("fe:ff:00:00:00:02"), VifMAC: mac("fe:ff:00:00:00:03"),
	}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestPlanErrors(t *testing.T) {
	for _, tt := range []struct {
		argv []string
		want string
	}{
		{argv("-netdev tap,id=net0,ifname=vif12345.10-emux"), `ifname of netdev "net0": "vif12345.10-emux" is longer than 15 bytes`},
		{argv("-netdev tap,id=net0,ifname=../x"), "holds a byte that no link's name may hold"},
		{argv("-netdev tap,id=net0,ifname=vif%d"), "holds a byte that no link's name may hold"},
		{[]string{"-netdev", "tap,id=net0,ifname=a\xa0b"}, "holds a byte that no link's name may hold"},
		{[]string{"-netdev", "tap,id=net0,ifname=a b"}, "holds a byte that no link's name may hold"},
		{argv("-netdev tap,id=net0,ifname=.."), "cannot be a tap's name"},
		{argv("-netdev tap,id=net0,ifname=a -netdev tap,id=net1,ifname=a"), `ifname "a" of netdev "net1" is used twice`},
		{argv("-netdev tap,id=net0,ifname=a -netdev user,id=net0"), `id "net0" is used twice`},
		{argv("-netdev tap,ifname=a"), "it has no id"},
		{argv("-device e1000,id=a,netdev=net0 -device e1000,id=b,netdev=net0"), `devices "a" and "b" both use netdev "net0"`},
		{argv("-device e1000,netdev=net0,mac=00:16:3e"), `parse -device "e1000,netdev=net0,mac=00:16:3e": address 00:16:3e: invalid MAC address`},
		{argv("-device e1000,netdev=net0,mac=00:16:3e:00:00:00:00:01"), "not a 48-bit MAC address"},
		{argv("-netdev tap,=x"), "a value without a key"},
		{argv(`-netdev {"type":`), "unexpected end of JSON input"},
	} {
		if nics, err := Plan(nil, tt.argv); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("Plan(%q) = %v, %v; want an error with %q", tt.argv, nics, err, tt.want)
		}
	}
}

func TestPlanMTUErrors(t *testing.T) {
	for _, mtu := range []int{-1, 67, 65522} {
		v := vif(3, "00:16:3e:00:00:01")
		v.MTU = mtu
		if _, err := Plan([]Vif{v}, nil); err == nil || !strings.Contains(err.Error(), "device/vif/3/mtu is ") {
			t.Errorf("MTU %d: %v, want an error that names the node", mtu, err)
		}
	}
}

func TestParseOption(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want map[string]string
	}{
		{"", map[string]string{}},
		{"tap", map[string]string{"type": "tap"}},
		{"tap,id=a", map[string]string{"type": "tap", "id": "a"}},
		{"id=a,type=tap", map[string]string{"type": "tap", "id": "a"}},
		{"tap,ifname=a,,b,,,id=c", map[string]string{"type": "tap", "ifname": "a,b,", "id": "c"}},
		{"t,,p,id=a", map[string]string{"type": "t,p", "id": "a"}},
		{"tap,id=a,id=b", map[string]string{"type": "tap", "id": "b"}},
		{"tap,vhost,id=a", map[string]string{"type": "tap", "vhost": "on", "id": "a"}},
		{"tap,script=,id=a=b", map[string]string{"type": "tap", "script": "", "id": "a=b"}},
		{`{"type":"tap","a,b":"c,d","n":2,"f":false,"o":{}}`, map[string]string{"type": "tap", "a,b": "c,d", "n": "2", "f": "off"}},
	} {
		got, err := parseOption(tt.in, "type")
		if err != nil {
			t.Errorf("parseOption(%q): %v", tt.in, err)
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("parseOption(%q): %s", tt.in, d)
		}
	}
}

// A guest may have an address of ours; no port may then have it.
func TestOwnMACsAvoidGuests(t *testing.T) {
	nics, err := Plan([]Vif{vif(0, "fe:ff:00:00:00:02"), vif(1, "fe:ff:00:00:00:03")},
		argv("-device e1000,id=nic0,netdev=net0,mac=fe:ff:00:00:00:01 -netdev tap,id=net0,ifname=a"))
	if err != nil {
		t.Fatal(err)
	}
	got := []net.HardwareAddr{nics[0].BridgeMAC, nics[0].TapMAC, nics[0].VifMAC}
	want := []net.HardwareAddr{mac("fe:ff:00:00:00:04"), mac("fe:ff:00:00:00:05"), mac("fe:ff:00:00:00:06")}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestOps(t *testing.T) {
	jumbo := vif(1, "00:16:3e:00:00:02")
	jumbo.MTU = 9000
	nics, err := Plan([]Vif{vif(0, "00:16:3e:00:00:01"), jumbo},
		argv("-device e1000,id=nic0,netdev=net0,mac=00:16:3e:00:00:01 -netdev tap,id=net0,ifname=vif7.0-emu "+
			"-device e1000,id=nic1,netdev=net1,mac=00:16:3e:00:00:02 -netdev tap,id=net1,ifname=vif7.1-emu"))
	if err != nil {
		t.Fatal(err)
	}
	bridge := " stp_state 0 forward_delay 0 ageing_time 0 group_fwd_mask 0xfff8 mcast_snooping 0 up"
	for _, tt := range []struct {
		name string
		ops  []Op
		want []string
	}{
		{"setup", Ops(nics), []string{
			"sysctl net/ipv6/conf/all/disable_ipv6=1",
			"sysctl net/bridge/bridge-nf-call-arptables=0",
			"sysctl net/bridge/bridge-nf-call-iptables=0",
			"sysctl net/bridge/bridge-nf-call-ip6tables=0",
			"add bridge br0 address fe:ff:00:00:00:01" + bridge,
			"add tap vif7.0-emu vnet_hdr persist",
			"set vif7.0-emu address fe:ff:00:00:00:02 master br0 up",
			"add bridge br1 address fe:ff:00:00:00:04" + bridge,
			"add tap vif7.1-emu vnet_hdr persist",
			"set vif7.1-emu address fe:ff:00:00:00:05 mtu 9000 master br1 up",
		}},
		{"nothing to set up", Ops(nil), nil},
		{"join", nics[0].JoinOps("eth0", 1500, false), []string{"set eth0 address fe:ff:00:00:00:03 master br0 up"}},
		{"join carries the vif's MTU to the tap", nics[0].JoinOps("eth0", 9000, true), []string{
			"set vif7.0-emu address fe:ff:00:00:00:02 mtu 9000 master br0 up",
			"set eth0 down",
			"set eth0 address fe:ff:00:00:00:03 master br0 up",
		}},
		{"join carries xenstore's MTU to the vif", nics[1].JoinOps("eth1", 1500, false), []string{
			"set eth1 address fe:ff:00:00:00:06 mtu 9000 master br1 up",
		}},
		{"unplug", nics[1].UnplugOps(), []string{"delete bridge br1", "delete tap vif7.1-emu"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got []string
			for _, op := range tt.ops {
				got = append(got, op.String())
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

// Whatever a toolstack writes, the plan's names are fit for the kernel, and no two links share a name or an address.
func FuzzPlan(f *testing.F) {
	f.Add("-device\ne1000,id=nic0,netdev=net0,mac=00:16:3e:00:00:01\n-netdev\ntype=tap,id=net0,ifname=vif7.0-emu,script=no,downscript=no")
	f.Add("-netdev\n{\"type\":\"tap\",\"id\":\"a\",\"ifname\":\"b\"}\n-device\n{\"driver\":\"e1000\",\"netdev\":\"a\"}")
	f.Add("-netdev\ntap,id=a,ifname=b,,c\n-name\n-netdev\n-device\n,netdev=a,mac=fe-ff-00-00-00-01")
	f.Fuzz(func(t *testing.T, args string) {
		nics, err := Plan([]Vif{vif(0, "00:16:3e:00:00:01"), vif(1, "fe:ff:00:00:00:02")}, strings.Split(args, "\n"))
		if err != nil {
			if nics != nil {
				t.Errorf("%d NICs in spite of %v", len(nics), err)
			}
			return
		}
		seen := make(map[string]bool)
		once := func(s string) {
			if seen[s] {
				t.Errorf("%q is used twice", s)
			}
			seen[s] = true
		}
		vifs := make(map[int]bool)
		for _, n := range nics {
			for _, name := range []string{n.Tap, n.Bridge} {
				once(name)
				if err := checkIfname(name); err != nil {
					t.Error(err)
				}
			}
			for _, m := range []net.HardwareAddr{n.BridgeMAC, n.TapMAC, n.VifMAC} {
				once(m.String())
				if m.String() == n.MAC.String() {
					t.Errorf("a link has the guest's address %s", m)
				}
			}
			if (n.Vif == NoVif) != (n.Warning != "") {
				t.Errorf("vif %d, warning %q", n.Vif, n.Warning)
			}
			if n.Vif != NoVif && vifs[n.Vif] {
				t.Errorf("vif %d is used twice", n.Vif)
			}
			vifs[n.Vif] = true
		}
	})
}
