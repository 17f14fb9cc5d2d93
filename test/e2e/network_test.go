//go:build lab

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/test/guest/peer"
	"github.com/stubinit/stubinit/test/lab"
)

// The host beyond dom0's bridge, and the guest's NICs, whose addresses end in 10 and on. dom0 itself is 192.0.2.1.
const (
	lanIP    = "192.0.2.100"
	jumboIP  = "192.0.2.101"
	peerFile = "/root/peer"
)

func nicIP(i int) string  { return fmt.Sprintf("192.0.2.%d", 10+i) }
func nicMAC(i int) string { return fmt.Sprintf("00:16:3e:00:01:%02x", i) }

// models are the NICs that QEMU emulates for the test guest, with the largest MTU that the guest's driver takes.
var models = []struct {
	name string
	mtu  int
}{{"e1000", 9000}, {"rtl8139", 1500}, {"virtio-net", 9000}}

// vifs is n NICs for xl.cfg.
func vifs(n int) []string {
	var list []string
	for i := range n {
		list = append(list, fmt.Sprintf("mac=%s,model=%s,bridge=xenbr0", nicMAC(i), models[i%len(models)].name))
	}
	return list
}

// The numbers of a guest's vifs in xl.cfg after those of models.
const (
	pvOnly = 3 + iota
	unconnected
)

// networkHook does what Debian's vif-bridge does about the MTU, and keeps the backend of one of the stubdomain's vifs waiting.
var networkHook = fmt.Sprintf(`
[ "$1 $2" = "vif online" ] || exit 0
front=$(xenstore-read "$XENBUS_PATH/frontend")
IFS=/ read -r _ _ _ s _ _ n <<<"$front"
[[ $(xenstore-read "/local/domain/$s/name") = *-dm ]] || exit 0
xenstore-write "$front/mtu" 9000
[ "$n" = %d ] || exit 0
setsid bash -c 'while read -r _; do
	[ "$(xenstore-read "$1" 2>/dev/null)" = connected ] || continue
	xenstore-rm "$1"
	exit
done < <(exec xenstore-watch "$1")' hook "$XENBUS_PATH/hotplug-status" </dev/null >/dev/null 2>&1 &`, unconnected)

// networkGuest is a guest with a NIC of each model, one that is PV only, and one whose backend does not connect, before a host on a link of
// its own in dom0's bridge.
func networkGuest(t *testing.T, ctx context.Context, name string) (*lab.Lab, *lab.Guest, *dialogue) {
	t.Helper()
	l := boot(t)
	host := startLAN(t, ctx, l)
	setHook(t, ctx, l, networkHook)
	cfg := config(name)
	cfg.VIFs = append(vifs(len(models)),
		fmt.Sprintf("mac=%s,type=vif,bridge=xenbr0", nicMAC(pvOnly)),
		fmt.Sprintf("mac=%s,model=e1000,bridge=xenbr0", nicMAC(unconnected)))
	cfg.Stubdom.Cmdline = lab.DefaultCmdline + " stubinit.log=debug"
	g := create(t, ctx, cfg)
	ready(t, ctx, g)
	linksUp(t, ctx, g)
	return l, g, host
}

// The guest's NICs through the stubdomain, the bridges in it and dom0's.
func TestNetwork(t *testing.T) {
	ctx := limit(t, 4*time.Minute)
	l, g, host := networkGuest(t, ctx, "net")
	t.Run("three at once", func(t *testing.T) {
		checkFields(t, ask(t, ctx, g, "nic list"), map[string]string{"count": "4"})
		for i, m := range models {
			checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d up %s", i, nicIP(i))), map[string]string{"model": m.name, "mac": nicMAC(i)})
		}
		for i := range models {
			checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d ping %s 56 3", i, lanIP)), map[string]string{"received": "3", "bad": "0"})
			host.ask(t, ctx, "ping "+nicIP(i))
		}
	})
	t.Run("PV only", func(t *testing.T) {
		if n := strings.Count(g.Stub.Text(), "vif has joined its bridge"); n != 4 {
			t.Errorf("%d vifs have joined bridges: want 4", n)
		}
		frames, err := l.Run(ctx, `cat "/sys/class/net/vif$1.$2/statistics/rx_packets"`, strconv.Itoa(g.StubID), strconv.Itoa(pvOnly))
		if err != nil || strings.TrimSpace(frames) != "0" {
			t.Errorf("frames of the stubdomain through the vif of a NIC that is PV only: %q, %v: want none", frames, err)
		}
	})
	t.Run("UDP checksums", func(t *testing.T) { testChecksums(t, ctx, l, g, host) })
	t.Run("frames", func(t *testing.T) { testFrames(t, ctx, g, host) })
	t.Run("unconnected backend", func(t *testing.T) { testUnconnected(t, ctx, l, g, host) })
	t.Run("unplug", func(t *testing.T) { testUnplug(t, ctx, l, g, host) })
}

// The guest's NICs come with it, or back.
func TestNetworkRestore(t *testing.T) {
	ctx := limit(t, 5*time.Minute)
	l, g, host := networkGuest(t, ctx, "net-restore")
	t.Run("restore", func(t *testing.T) { testRestore(t, ctx, l, g, host) })
	t.Run("reboot", func(t *testing.T) {
		ask(t, ctx, g, "unplug nics")
		for range len(models) + 1 {
			expect(t, ctx, g.Stub, `info NIC unplugged.* nic=nic[0-9] `)
		}
		serial := testReboot(t, ctx, l, g, host)
		// A backend answers nobody before its hotplug script has connected: nobody waits for it, and its vif goes then.
		serial.ask(t, ctx, "unplug nics")
		for range models {
			expect(t, ctx, g.Stub, `info NIC unplugged.* nic=nic[0-9] `)
		}
		connect(t, ctx, l, g)
		expect(t, ctx, g.Stub, fmt.Sprintf(`info (NIC unplugged|the backend of an unplugged NIC has closed at last).* nic=nic%d\b`, unconnected))
	})
}

// Much data, and large frames; as much through a QEMU in dom0, for comparison.
func TestNetworkTransfer(t *testing.T) {
	ctx := limit(t, 5*time.Minute)
	var ours, theirs rates
	t.Run("stubdomain", func(t *testing.T) {
		l, g, host := networkGuest(t, ctx, "net-bulk")
		t.Run("bulk", func(t *testing.T) { ours = testBulk(t, ctx, g, host) })
		t.Run("jumbo frames", func(t *testing.T) { testJumbo(t, ctx, l, g) })
	})
	t.Run("QEMU in dom0", func(t *testing.T) {
		host := startLAN(t, ctx, boot(t))
		cfg := config("net-dom0")
		cfg.VIFs, cfg.Stubdom = vifs(len(models)), nil
		g := create(t, ctx, cfg)
		ready(t, ctx, g)
		theirs = testBulk(t, ctx, g, host)
	})
	if !t.Failed() {
		t.Logf("\n%s", compare(ours, theirs))
	}
}

// linksUp waits until the log has said of each NIC but the unconnected one that it is up.
func linksUp(t *testing.T, ctx context.Context, g *lab.Guest) {
	t.Helper()
	waited := map[string]bool{}
	for i := range models {
		waited[fmt.Sprintf("nic%d", i)] = true
	}
	for len(waited) > 0 {
		nic := expect(t, ctx, g.Stub, `info NIC's link is up nic=(\w+)`)[1]
		if !waited[nic] {
			t.Fatalf("the link of %s is said to be up: want those of %v\n%s", nic, waited, g.Stub.Tail(40))
		}
		delete(waited, nic)
	}
}

// testUnconnected is about the NIC whose backend waits since the start. What went before it has shown that nobody else does.
func testUnconnected(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest, host *dialogue) {
	stub, vif := strconv.Itoa(g.StubID), strconv.Itoa(unconnected)
	m := expect(t, ctx, g.Stub, fmt.Sprintf(`(warn NIC still has no network: .*backend has not connected|info NIC's link is up).* nic=nic%d\b.*`, unconnected))
	if want := "xenstore=/local/domain/0/backend/vif/" + stub + "/" + vif; !strings.HasPrefix(m[1], "warn") || !strings.Contains(m[0], want) {
		t.Errorf("the log says %q: want a warning with %s", m[0], want)
	}
	connect(t, ctx, l, g)
	expect(t, ctx, g.Stub, fmt.Sprintf(`info NIC's link is up nic=nic%d\b`, unconnected))
	// It is the guest's fourth: the one between has no emulated NIC.
	const fourth = 3
	ask(t, ctx, g, fmt.Sprintf("nic %d up %s", fourth, nicIP(unconnected))) // the host remembers whose an address is
	host.ask(t, ctx, "ping "+nicIP(unconnected))
	ask(t, ctx, g, fmt.Sprintf("nic %d down", fourth))
}

// connect says what the hotplug script of the unconnected NIC says at its end.
func connect(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest) {
	t.Helper()
	const connected = `stub=$(xl domid "$1-dm") && xenstore-write "/local/domain/0/backend/vif/$stub/$2/hotplug-status" connected`
	if _, err := l.Run(ctx, connected, g.Name, strconv.Itoa(unconnected)); err != nil {
		t.Fatal(err)
	}
}

// testChecksums sends datagrams of odd and even sizes. Those of dom0's own stack come with their checksum still to be made.
func testChecksums(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest, host *dialogue) {
	for i := range models {
		for _, size := range []int{1, 1472} {
			checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d udp %s 7 %d 3", i, lanIP, size)), map[string]string{"echoed": "1", "bad": "0", "bad_sum": "0"})
			host.ask(t, ctx, fmt.Sprintf("udp %s %d 4", nicIP(i), size))
		}
		const text = "a datagram of dom0's own"
		got, err := l.Run(ctx, `printf %s "$2" | socat -t 5 STDIO "UDP4:$1:7"`, nicIP(i), text)
		if err != nil || got != text {
			t.Errorf("%s answers dom0's datagram with %q, %v", models[i].name, got, err)
		}
		checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d stats", i)), map[string]string{"bad_ip": "0", "bad_sum": "0", "errors": "0"})
	}
	checkFields(t, host.ask(t, ctx, "stats"), map[string]string{"bad_sum": "0", "malformed": "0"})
}

// testFrames sends what is not IP, each way.
func testFrames(t *testing.T, ctx context.Context, g *lab.Guest, host *dialogue) {
	for _, f := range []struct{ name, to, rest string }{
		{"802.1X", "0180c2000003", "888e" + "0100"},
		{"LLDP", "0180c200000e", "88cc" + "0207"},
		{"VLAN", "ffffffffffff", "8100" + "0064" + "0800" + "1234"},
	} {
		t.Run(f.name, func(t *testing.T) {
			const length = 80
			whole := func(from string) string {
				head := f.to + from + f.rest
				return head + strings.Repeat("00", length-len(head)/2)
			}
			fromHost := whole("020000000a0a")
			host.ask(t, ctx, "raw "+fromHost)
			for i, m := range models {
				// All are in one network, so that each NIC has the frames of the others too: the host's comes before them.
				want := fmt.Sprintf("length=%d hex=%s", length, fromHost)
				if got := lastFrame(t, ctx, g, i, f.rest[:4]); got != want {
					t.Errorf("%s has the host's frame as\n%s, want\n%s", m.name, got, want)
				}
			}
			for i, m := range models {
				sent := whole(strings.ReplaceAll(nicMAC(i), ":", ""))
				ask(t, ctx, g, fmt.Sprintf("nic %d raw %s", i, sent))
				if diff := cmp.Diff(fmt.Sprintf("length=%d hex=%s", length, sent), host.ask(t, ctx, "frame 0x"+f.rest[:4])); diff != "" {
					t.Errorf("%s's frame in dom0 (-want +got):\n%s", m.name, diff)
				}
			}
		})
	}
}

// lastFrame is the last frame of an EtherType that a NIC has received, once there is one.
func lastFrame(t *testing.T, ctx context.Context, g *lab.Guest, nic int, etherType string) string {
	t.Helper()
	for range 50 {
		if err := g.Serial.Send(fmt.Sprintf("nic %d last 0x%s\n", nic, etherType)); err != nil {
			t.Fatal(err)
		}
		m := expect(t, ctx, g.Serial, `^(ok|err) nic ([^\r\n]*)\r?\n`)
		if m[1] == "ok" {
			return m[2]
		}
		ask(t, ctx, g, "sleep 20")
	}
	t.Errorf("NIC %d does not receive the frame of EtherType 0x%s", nic, etherType)
	return ""
}

// bulkSize is what a transfer has: no segment divides it.
const bulkSize = 1<<19 + 12345

// rates are bytes a second of dom0's clock, by model and direction.
type rates map[string]float64

var directions = []string{"to guest", "from guest"}

// testBulk transfers each way through each NIC, which is set up anew with an MTU of 1500.
func testBulk(t *testing.T, ctx context.Context, g *lab.Guest, host *dialogue) rates {
	r := rates{}
	for i, m := range models {
		ask(t, ctx, g, fmt.Sprintf("nic %d up %s", i, nicIP(i)))
		r[m.name+directions[0]], r[m.name+directions[1]] = transfer(t, ctx, g, host, i, lanIP, bulkSize)
	}
	return r
}

// transfer transfers to the guest and from it, and gives the rates.
func transfer(t *testing.T, ctx context.Context, g *lab.Guest, host *dialogue, nic int, ip string, size uint32) (to, from float64) {
	t.Helper()
	const seedTo, seedFrom = 21, 22
	want := func(seed uint32) string { return fmt.Sprintf("%08x", peer.PatternCRC(seed, 0, uint64(size))) }
	rate := func(answer string, seed uint32) float64 {
		checkFields(t, answer, map[string]string{"bytes": fmt.Sprint(size), "crc": want(seed)})
		ms, err := strconv.ParseFloat(fieldsOf(answer)["ms"], 64)
		if err != nil || ms <= 0 {
			t.Errorf("transfer %q: no time", answer)
			return 0
		}
		return float64(size) / ms * 1000
	}
	ask(t, ctx, g, fmt.Sprintf("nic %d recv 7001 bg", nic))
	to = rate(host.ask(t, ctx, fmt.Sprintf("send %s 7001 %d %d", nicIP(nic), size, seedTo)), seedTo)
	checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d wait", nic)), map[string]string{
		"received": fmt.Sprint(size), "received_state": "done", "received_crc": want(seedTo)})

	host.send(t, "recv 7002")
	checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d send %s 7002 %d %d", nic, ip, size, seedFrom)), map[string]string{
		"sent": fmt.Sprint(size), "sent_state": "done", "sent_crc": want(seedFrom)})
	from = rate(host.answer(t, ctx, "recv"), seedFrom)
	return to, from
}

func compare(ours, theirs rates) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%-12s %-12s %14s %14s %8s\n", "NIC", "direction", "dom0 KiB/s", "stubdom KiB/s", "ratio")
	for _, m := range models {
		for _, d := range directions {
			o, d0 := ours[m.name+d], theirs[m.name+d]
			fmt.Fprintf(&b, "%-12s %-12s %14.0f %14.0f %8.2f\n", m.name, d, d0/1024, o/1024, o/d0)
		}
	}
	return b.String()
}

func testJumbo(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest) {
	host := startPeer(t, l, jumboIP, "02:73:74:75:62:02", 9000)
	for i, m := range models {
		if m.mtu <= 1500 {
			continue
		}
		t.Run(m.name, func(t *testing.T) {
			ask(t, ctx, g, fmt.Sprintf("nic %d up %s %d", i, nicIP(i), m.mtu))
			checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d ping %s %d 2", i, jumboIP, m.mtu-28)), map[string]string{"received": "2", "bad": "0"})
			host.ask(t, ctx, fmt.Sprintf("ping %s %d", nicIP(i), m.mtu-28))
			checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d udp %s 7 %d 5", i, jumboIP, m.mtu-28)), map[string]string{"echoed": "1", "bad": "0", "bad_sum": "0"})
			transfer(t, ctx, g, host, i, jumboIP, 300_001)
			checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d stats", i)), map[string]string{"bad_ip": "0", "bad_sum": "0", "fragments": "0", "errors": "0"})
		})
	}
	checkFields(t, host.ask(t, ctx, "stats"), map[string]string{"bad_sum": "0", "malformed": "0"})
}

// testRestore saves and restores the guest. Its NICs go on where they were, and the network has been told once where each is now.
func testRestore(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest, host *dialogue) {
	const file = "/root/net.save"
	for i := range models {
		ask(t, ctx, g, fmt.Sprintf("nic %d up %s", i, nicIP(i)))
	}
	if out, err := l.Run(ctx, `xl save "$1" "$2" 2>&1`, g.Name, file); err != nil {
		t.Fatalf("xl save: %v\n%s", err, out)
	}
	checkFields(t, host.ask(t, ctx, "frames 0x8035"), map[string]string{"count": "0"})
	before := fieldsOf(host.ask(t, ctx, "stats"))["arp"]
	if err := g.Restore(ctx, file); err != nil {
		t.Fatal(err)
	}
	linksUp(t, ctx, g)
	// Nobody announces by ARP what QEMU announces by RARP.
	checkFields(t, host.ask(t, ctx, "stats"), map[string]string{"arp": before})
	for i := range models {
		host.ask(t, ctx, "ping "+nicIP(i))
		checkFields(t, ask(t, ctx, g, fmt.Sprintf("nic %d ping %s 56 3", i, lanIP)), map[string]string{"received": "3", "bad": "0"})
	}
	// A reverse ARP request of a NIC for its own address (hw/net/announce, RFC 903), padded to the least that Ethernet has.
	want, got := map[string]int{}, map[string]int{}
	announced := func(nic int) {
		mac := strings.ReplaceAll(nicMAC(nic), ":", "")
		frame := "ffffffffffff" + mac + "8035" + "0001080006040003" + mac + "00000000" + mac + "00000000"
		want[frame+strings.Repeat("00", 60-len(frame)/2)] = 1
	}
	for i := range models {
		announced(i)
	}
	// QEMU by itself would announce for more than a second: until a second brings none.
	collect := func() {
		for more := true; more; {
			ask(t, ctx, g, "sleep 1000")
			frames := strings.Fields(host.ask(t, ctx, "frames 0x8035"))[1:]
			for _, frame := range frames {
				got[frame]++
			}
			more = len(frames) > 0
		}
	}
	collect()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("announcements (-want +got):\n%s", diff)
	}
	// One whose link comes late is announced then.
	clear(want)
	clear(got)
	announced(unconnected)
	connect(t, ctx, l, g)
	expect(t, ctx, g.Stub, fmt.Sprintf(`info NIC's link is up nic=nic%d\b`, unconnected))
	collect()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("announcements of a late NIC (-want +got):\n%s", diff)
	}
	if _, err := l.Run(ctx, `rm "$1"`, file); err != nil { // dom0 has it in memory
		t.Error(err)
	}
}

// bridgeScript prints what there is of the vifs of stubdomain $1 and guest $2: frontends, states of backends, links that work in the
// bridge, and addresses that the bridge has learnt from the stubdomain.
const bridgeScript = `
for n in $(xenstore-list "/local/domain/$1/device/vif" 2>/dev/null); do echo "frontend $n"; done
for d in $1 $2; do
	for n in $(xenstore-list "/local/domain/0/backend/vif/$d"); do
		who=stub; [ "$d" = "$1" ] || who=guest
		echo "$who $n state $(xenstore-read "/local/domain/0/backend/vif/$d/$n/state")$([ ! -d "/sys/class/net/xenbr0/brif/vif$d.$n" ] || echo " port")"
	done
done
bridge fdb show br xenbr0 | grep -E "^00:16:3e:00:01:.* dev vif$1\." | sed 's/^/learnt /'
exit 0`

func testUnplug(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest, host *dialogue) {
	for i := range models {
		host.ask(t, ctx, "ping "+nicIP(i)) // so that dom0's bridge knows it
	}
	ask(t, ctx, g, "unplug nics")
	for range len(models) + 1 {
		expect(t, ctx, g.Stub, `info NIC unplugged.* nic=nic[0-9] `)
	}
	var want []string
	want = append(want, fmt.Sprintf("frontend %d", pvOnly))
	for n := range unconnected + 1 {
		if n == pvOnly {
			want = append(want, fmt.Sprintf("stub %d state 4 port", n))
		} else {
			want = append(want, fmt.Sprintf("stub %d state 6", n)) // Closed, and its link in dom0 is gone
		}
	}
	for n := range unconnected + 1 {
		want = append(want, fmt.Sprintf("guest %d state 2 port", n)) // waits for the guest's driver
	}
	got, err := l.Run(ctx, bridgeScript, strconv.Itoa(g.StubID), strconv.Itoa(g.ID))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, strings.Split(strings.TrimSpace(got), "\n")); diff != "" {
		t.Errorf("dom0 after the unplug (-want +got):\n%s", diff)
	}
	answer, err := g.QMP(ctx, `{"execute":"human-monitor-command","arguments":{"command-line":"info network"}}`)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(answer[0]), "tap") {
		t.Errorf("QEMU still has taps: %s", answer[0])
	}
}

// rebootScript waits until guest $1, which was domain $2, has come back, and is its serial port then.
const rebootScript = `
until
	id=$(xl domid "$1" 2>/dev/null) && [ "$id" != "$2" ] &&
	s=$(xl domid "$1-dm" 2>/dev/null) && tty=$(xenstore-read "/local/domain/$s/device/console/3/tty" 2>/dev/null) && [ -n "$tty" ]
do sleep 0.2; done
exec socat STDIO "FILE:$tty,rawer"`

// testReboot returns the rebooted guest's serial port.
func testReboot(t *testing.T, ctx context.Context, l *lab.Lab, g *lab.Guest, host *dialogue) *dialogue {
	t.Helper()
	serial := converse(t, l, rebootScript, g.Name, strconv.Itoa(g.ID))
	if err := g.Serial.Send("reboot\n"); err != nil {
		t.Fatal(err)
	}
	linksUp(t, ctx, g) // the log is the new stubdomain's
	serial.line(t, ctx, "stubinit-guest ready ")
	checkFields(t, serial.ask(t, ctx, "nic list"), map[string]string{"count": "4"})
	for i := range models {
		serial.ask(t, ctx, fmt.Sprintf("nic %d up %s", i, nicIP(i)))
		host.ask(t, ctx, "ping "+nicIP(i))
	}
	return serial
}

// Eight NICs, which is as many as QEMU has for a guest, cost little more than one.
func TestEightNICs(t *testing.T) {
	ctx := limit(t, 5*time.Minute)
	host := startLAN(t, ctx, boot(t))
	type start struct{ running, network time.Duration }
	started := func(t *testing.T, n int) (g *lab.Guest, s start) {
		cfg := config(fmt.Sprintf("net-%d", n))
		cfg.VIFs = vifs(n)
		// libxl leaves 1 MiB (LIBXL_MAXMEM_CONSTANT) for option ROMs of 256 KiB each: with five NICs QEMU, in dom0 as here, fails to populate ram.
		for _, driver := range []string{"e1000", "rtl8139", "virtio-net-pci"} {
			cfg.HVMArgs = append(cfg.HVMArgs, "-global", driver+".romfile=")
		}
		g = create(t, ctx, cfg)
		var err error
		if s.network, err = time.ParseDuration(expect(t, ctx, g.Stub, `step done step=network took=(\S+)`)[1]); err != nil {
			t.Fatal(err)
		}
		if s.running, err = time.ParseDuration(expect(t, ctx, g.Stub, `^stubinit (\S+) info step done step=running`)[1] + "s"); err != nil {
			t.Fatal(err)
		}
		return g, s
	}
	var one, eight start
	t.Run("one", func(t *testing.T) { _, one = started(t, 1) })
	t.Run("eight", func(t *testing.T) {
		var g *lab.Guest
		g, eight = started(t, 8)
		ready(t, ctx, g)
		checkFields(t, ask(t, ctx, g, "nic list"), map[string]string{"count": "8"})
		for i := range 8 {
			ask(t, ctx, g, fmt.Sprintf("nic %d up %s", i, nicIP(i)))
			host.ask(t, ctx, "ping "+nicIP(i))
		}
	})
	if t.Failed() {
		return
	}
	t.Logf("boot until running: %v with one NIC, %v with eight, ratio %.3f; step network: %v and %v, %v a NIC",
		one.running, eight.running, eight.running.Seconds()/one.running.Seconds(), one.network, eight.network, eight.network/8)
	if !*icount { // then the times are also those of whatever else this machine does
		return
	}
	if eight.running > one.running*12/10 {
		t.Errorf("the boot with eight NICs takes %v, with one %v: want at most 1.2 times that", eight.running, one.running)
	}
	if eight.network > 8*30*time.Millisecond {
		t.Errorf("eight NICs take PID 1 %v: want at most 30 ms each", eight.network)
	}
}

// startLAN makes a link into dom0's bridge, as another machine has one, and a host on it.
func startLAN(t *testing.T, ctx context.Context, l *lab.Lab) *dialogue {
	t.Helper()
	file := filepath.Join(t.TempDir(), "peer")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", file, "./test/guest/cmd/peer")
	build.Dir, build.Env = lab.Top(), append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("go build peer: %v\n%s", err, out)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := l.Put(ctx, peerFile, 0o755, f); err != nil {
		t.Fatal(err)
	}
	const up = `
set -e
modprobe veth
ip link set xenbr0 mtu 9000 type bridge group_fwd_mask 0xfff8
ip link add lan0 mtu 9000 type veth peer name lan1 mtu 9000
ip link set lan0 addrgenmode none up
ip link set lan1 master xenbr0 addrgenmode none up`
	if _, err := l.Run(ctx, up); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if _, err := l.Run(ctx, `ip link del lan0; ip link set xenbr0 mtu 1500 type bridge group_fwd_mask 0`); err != nil {
			t.Error(err)
		}
	})
	return startPeer(t, l, lanIP, "02:73:74:75:62:01", 1500)
}

// startPeer starts a host on startLAN's link.
func startPeer(t *testing.T, l *lab.Lab, ip, mac string, mtu int) *dialogue {
	t.Helper()
	return converse(t, l, `exec "$@"`, peerFile, "-i", "lan0", "-ip", ip, "-mac", mac, "-mtu", strconv.Itoa(mtu), "-timeout", "3m")
}

// A dialogue is with a program in dom0 that answers each line with one that begins with "ok" or "err".
type dialogue struct {
	in    *io.PipeWriter
	lines chan string
}

// converse starts a script, which is killed at the end of the test.
func converse(t *testing.T, l *lab.Lab, script string, args ...string) *dialogue {
	t.Helper()
	stdin, in := io.Pipe()
	out, stdout := io.Pipe()
	d := &dialogue{in, make(chan string, 1000)}
	p, err := l.Begin(lab.Command{Script: script, Args: args, Stdin: stdin, Stdout: stdout, Stderr: stdout})
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	go func() {
		defer close(read)
		defer close(d.lines)
		scan := bufio.NewScanner(out)
		scan.Buffer(nil, 1<<20)
		for scan.Scan() {
			d.lines <- strings.TrimRight(scan.Text(), "\r")
		}
	}()
	go func() {
		<-p.Done()
		stdout.Close()
		stdin.Close()
	}()
	t.Cleanup(func() {
		in.Close()
		p.Kill()
		for range d.lines { // whatever nobody has read
		}
		<-read
	})
	return d
}

func (d *dialogue) send(t *testing.T, command string) {
	t.Helper()
	if _, err := io.WriteString(d.in, command+"\n"); err != nil {
		t.Fatalf("%s: %v", command, err)
	}
}

// line waits for a line that begins so, and gives the rest of it.
func (d *dialogue) line(t *testing.T, ctx context.Context, prefixes ...string) string {
	t.Helper()
	for {
		select {
		case line, ok := <-d.lines:
			if !ok {
				t.Fatalf("the program ended before %q came", prefixes)
			}
			for _, p := range prefixes {
				if rest, ok := strings.CutPrefix(line, p); ok {
					return rest
				}
			}
			if strings.HasPrefix(line, "err ") || strings.HasPrefix(line, "peer: ") {
				t.Fatalf("want %q, have %q", prefixes, line)
			}
		case <-ctx.Done():
			t.Fatalf("no %q: %v", prefixes, context.Cause(ctx))
		}
	}
}

func (d *dialogue) answer(t *testing.T, ctx context.Context, name string) string {
	t.Helper()
	return d.line(t, ctx, "ok "+name+" ")
}

func (d *dialogue) ask(t *testing.T, ctx context.Context, command string) string {
	t.Helper()
	d.send(t, command)
	name, _, _ := strings.Cut(command, " ")
	return d.answer(t, ctx, name)
}

// fieldsOf are the words of an answer that have an equals sign.
func fieldsOf(answer string) map[string]string {
	m := map[string]string{}
	for word := range strings.FieldsSeq(answer) {
		if key, value, ok := strings.Cut(word, "="); ok {
			m[key] = value
		}
	}
	return m
}

// checkFields compares those words of an answer that are named.
func checkFields(t *testing.T, answer string, want map[string]string) {
	t.Helper()
	all, got := fieldsOf(answer), map[string]string{}
	for key := range want {
		got[key] = all[key]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("answer %q (-want +got):\n%s", answer, diff)
	}
}
