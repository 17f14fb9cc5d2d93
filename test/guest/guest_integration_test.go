//go:build integration

package guest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/test/guest/peer"
)

// limit is generous: the guest runs under software emulation on a machine that may be busy.
const limit = 2 * time.Minute

// build makes the guest's image in a folder of the test and returns its path.
func build(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	c := exec.CommandContext(t.Context(), "make", "-C", "../..", "-f", "test/guest/guest.mk", "GUEST_BUILD="+dir)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("build the guest (install make, gcc and binutils): %v\n%s", err, out)
	} else if strings.Contains(string(out), "warning:") {
		t.Errorf("the guest builds with warnings:\n%s", out)
	}
	return filepath.Join(dir, "guest.img")
}

type machine struct {
	*Console
	t     *testing.T
	ended chan struct{} // closed when QEMU has ended, by itself or not
	err   error         // how, after ended
}

// boot starts QEMU and waits for the guest's banner. extra files become descriptors 3, 4, …
func boot(t *testing.T, image string, extra []*os.File, args ...string) *machine {
	t.Helper()
	serial, theirs := socketPair(t, unix.SOCK_STREAM)
	fd := 3 + len(extra)
	all := append([]string{
		"-M", "pc", "-accel", "tcg", "-m", "64", "-display", "none", "-monitor", "none", "-nodefaults", "-vga", "std",
		"-chardev", fmt.Sprintf("socket,id=serial,fd=%d", fd), "-serial", "chardev:serial",
		"-drive", "file=" + image + ",format=raw,if=ide,index=0",
	}, args...)
	c := exec.Command("qemu-system-x86_64", all...)
	c.ExtraFiles = append(extra[:len(extra):len(extra)], theirs)
	var stderr strings.Builder
	c.Stderr = &stderr
	if err := c.Start(); err != nil {
		t.Fatalf("start QEMU (install qemu-system-x86): %v", err)
	}
	for _, f := range c.ExtraFiles {
		f.Close()
	}
	m := &machine{Console: NewConsole(serial), t: t, ended: make(chan struct{})}
	go func() {
		defer close(m.ended)
		m.err = c.Wait()
	}()
	t.Cleanup(func() {
		c.Process.Kill()
		<-m.ended
		m.Close()
		if t.Failed() {
			t.Logf("QEMU: %v\n%s\nserial port:\n%s", m.err, stderr.String(), strings.Join(m.Lines(), "\n"))
		}
	})
	m.line(0, "stubinit-guest ready")
	m.line(0, "unplug magic")
	return m
}

// monitor returns QEMU's human monitor: what boot needs for it, and a function that sends a command. The answers are
// few enough for the socket's buffer; what a command did is seen in the guest.
func monitor(t *testing.T) (file *os.File, args []string, say func(command string)) {
	t.Helper()
	conn, file := socketPair(t, unix.SOCK_STREAM)
	t.Cleanup(func() { conn.Close() })
	return file, []string{"-chardev", "socket,id=monitor,fd=3", "-mon", "chardev=monitor"}, func(command string) {
		t.Helper()
		if _, err := fmt.Fprintln(conn, command); err != nil {
			t.Fatal(err)
		}
	}
}

func socketPair(t *testing.T, kind int) (net.Conn, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	return conn, theirs
}

func (m *machine) line(from int, prefix string) (string, int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), limit)
	defer cancel()
	line, next, err := m.Wait(ctx, from, prefix)
	if err != nil {
		m.t.Fatal(err)
	}
	return line, next
}

func (m *machine) try(format string, args ...any) (Reply, error) {
	ctx, cancel := context.WithTimeout(m.t.Context(), limit)
	defer cancel()
	return m.Command(ctx, fmt.Sprintf(format, args...))
}

// ok runs a command that must succeed.
func (m *machine) ok(format string, args ...any) map[string]string {
	m.t.Helper()
	r, err := m.try(format, args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return r.Fields
}

// want runs a command whose whole answer is known.
func (m *machine) want(want, format string, args ...any) {
	m.t.Helper()
	r, err := m.try(format, args...)
	if r.Line != want {
		m.t.Fatalf("%s: got %q (%v), want %q", fmt.Sprintf(format, args...), r.Line, err, want)
	}
}

// fields runs a command, successful or refused, and compares some fields of its answer.
func (m *machine) fields(want map[string]string, format string, args ...any) {
	m.t.Helper()
	r, err := m.try(format, args...)
	got := map[string]string{}
	for key := range want {
		got[key] = r.Fields[key]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		m.t.Fatalf("%s: %s (%v) (-want +got):\n%s", fmt.Sprintf(format, args...), r.Line, err, diff)
	}
}

func number(t *testing.T, s string) uint64 {
	t.Helper()
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestImageIsReproducible(t *testing.T) {
	var sums [2][32]byte
	for i := range sums {
		b, err := os.ReadFile(build(t))
		if err != nil {
			t.Fatal(err)
		}
		if len(b) != 8<<20 {
			t.Fatalf("the image has %d bytes, want 8 MiB", len(b))
		}
		sums[i] = sha256.Sum256(b)
	}
	if sums[0] != sums[1] {
		t.Errorf("two builds differ: %x, %x", sums[0], sums[1])
	}
}

func TestStateAndPower(t *testing.T) {
	file, args, say := monitor(t)
	m := boot(t, build(t), []*os.File{file}, args...)
	m.want("ok echo a b", "echo  a b ")
	m.want("err nonsense unknown command", "nonsense 1")
	m.fields(map[string]string{"boot": "1", "memory_kib": "65408"}, "info")
	m.want("err unplug magic=0xffff", "unplug nics")
	m.want("err unplug magic=0xffff", "unplug log text")

	// Ticks: every second has its line, and none comes when they are off.
	tick, next := m.line(0, "tick ")
	first := number(t, strings.TrimPrefix(tick, "tick "))
	tick, _ = m.line(next, "tick ")
	if second := number(t, strings.TrimPrefix(tick, "tick ")); second != first+1 {
		t.Errorf("tick %d follows tick %d", second, first)
	}
	m.ok("ticks off")
	from := len(m.Lines())
	m.ok("sleep 2100")
	if lines := m.Lines()[from:]; len(lines) != 1 {
		t.Errorf("ticks are off, and yet: %q", lines)
	}
	m.ok("ticks on")

	pci := m.ok("pci")
	for slot, want := range map[string]string{"00:00.0": "8086:1237,", "00:01.1": "8086:7010,", "00:02.0": "1234:1111,030000,"} {
		if !strings.HasPrefix(pci[slot], want) {
			t.Errorf("PCI %s is %q, want %q", slot, pci[slot], want)
		}
	}

	m.ok("mem fill 3")
	m.fields(map[string]string{"bad": "0"}, "mem check 3")
	m.fields(map[string]string{"bad": "2097152"}, "mem check 4")
	m.ok("vga fill 5")
	m.fields(map[string]string{"bad": "0"}, "vga check 5")
	m.fields(map[string]string{"bad": "1000"}, "vga check 6")
	m.fields(map[string]string{"value": "171"}, "cmos 100 0xab")
	m.fields(map[string]string{"value": "171"}, "cmos 100")

	// A reboot keeps RAM: the boot count goes on, the id is another one.
	id := m.ok("info")["id"]
	from = len(m.Lines())
	m.ok("reboot")
	_, next = m.line(from, "stubinit-guest ready boot=2 ")
	m.line(next, "unplug magic")
	if m.ok("info")["id"] == id {
		t.Error("the id is the same after a reboot")
	}
	from = len(m.Lines())
	m.ok("crash")
	_, next = m.line(from, "stubinit-guest ready boot=3 ")
	m.line(next, "unplug magic")

	from = len(m.Lines())
	m.ok("suspend")
	// The answer comes before the machine sleeps, and a wake-up in between is lost: wake it until it boots.
	for deadline := time.Now().Add(limit); ; {
		say("system_wakeup")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, at, err := m.Wait(ctx, from, "stubinit-guest ready boot=4 ")
		cancel()
		if err == nil {
			next = at
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	m.line(next, "unplug magic")

	m.ok("poweroff")
	select {
	case <-m.ended:
		if m.err != nil {
			t.Errorf("QEMU after poweroff: %v", m.err)
		}
	case <-time.After(limit):
		t.Error("poweroff did not end QEMU")
	}
}

func TestDisks(t *testing.T) {
	dir := t.TempDir()
	big := filepath.Join(dir, "big.img") // beyond 28-bit addresses, almost all of it a hole
	if err := os.WriteFile(big, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	const bigSectors = 300 << 20
	if err := os.Truncate(big, bigSectors*512); err != nil {
		t.Fatal(err)
	}
	image := build(t)
	m := boot(t, image, nil, "-drive", "file="+big+",format=raw,if=ide,index=1")
	m.fields(map[string]string{"sectors": "16384", "model": "QEMU_HARDDISK"}, "ata 0 identify")
	m.fields(map[string]string{"sectors": strconv.Itoa(bigSectors)}, "ata 1 identify")
	m.want("err ata absent", "ata 2 identify")
	m.want("err ata beyond the end: sectors=16384", "ata 0 read 16384 1")

	const lba, count, seed = 2001, 1003, 77
	crc := fmt.Sprintf("%08x", peer.PatternCRC(seed, lba*512, count*512))
	for unit, at := range map[int]uint64{0: lba, 1: lba} {
		m.fields(map[string]string{"crc": crc}, "ata %d write %d %d %d", unit, at, count, seed)
		m.fields(map[string]string{"crc": crc, "bad": "0"}, "ata %d verify %d %d %d", unit, at, count, seed)
		m.fields(map[string]string{"crc": crc}, "ata %d read %d %d", unit, at, count)
		m.fields(map[string]string{"bad": strconv.Itoa(count * 128)}, "ata %d verify %d %d %d", unit, at, count, seed+1)
	}
	const high = 1<<28 - 64 // across the border of 28-bit addresses
	m.ok("ata 1 write %d 200 9", uint64(high))
	m.fields(map[string]string{"bad": "0"}, "ata 1 verify %d 200 9", uint64(high))

	m.ok("ata 0 stress on")
	m.ok("sleep 500")
	stress := m.ok("ata 0 stress off")
	if number(t, stress["reads"]) < 10 || stress["errors"] != "0" || stress["mismatches"] != "0" {
		t.Errorf("stress: %v", stress)
	}
	m.ok("poweroff")
	<-m.ended

	// What the guest says it wrote is what the disks hold.
	for _, disk := range []struct {
		path      string
		lba, size int64
		seed      uint32
	}{{image, lba, count, seed}, {big, lba, count, seed}, {big, high, 200, 9}} {
		f, err := os.Open(disk.path)
		if err != nil {
			t.Fatal(err)
		}
		got, want := make([]byte, disk.size*512), make([]byte, disk.size*512)
		_, err = f.ReadAt(got, disk.lba*512)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		peer.Pattern(disk.seed, uint64(disk.lba)*512, want)
		if string(got) != string(want) {
			t.Errorf("%s from LBA %d on is not what the guest wrote", disk.path, disk.lba)
		}
	}
}

func TestCDROM(t *testing.T) {
	dir := t.TempDir()
	disc, other := filepath.Join(dir, "disc.iso"), filepath.Join(dir, "other.iso")
	content, otherContent := make([]byte, 1<<20+5*2048), make([]byte, 300*2048)
	peer.Pattern(12, 0, content)
	peer.Pattern(13, 0, otherContent)
	for name, b := range map[string][]byte{disc: content, other: otherContent} {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	file, args, say := monitor(t)
	m := boot(t, build(t), []*os.File{file}, append(args,
		"-drive", "file="+disc+",format=raw,media=cdrom,if=ide,index=2", "-drive", "media=cdrom,if=ide,index=3")...)
	m.want("err ata not a disk", "ata 2 identify")
	m.want("err cd absent", "cd 1 identify")
	m.want("err cd not a packet device", "cd 0 identify")
	m.want("ok cd model=QEMU_DVD-ROM", "cd 2 identify")
	m.fields(map[string]string{"ready": "0", "key": "2", "asc": "3a"}, "cd 3 ready") // medium not present
	m.fields(map[string]string{"key": "2", "asc": "3a"}, "cd 3 crc")
	m.fields(map[string]string{"bytes": strconv.Itoa(len(content))}, "cd 2 size")
	m.want("ok cd ready=1", "cd 2 ready")
	m.fields(map[string]string{"crc": fmt.Sprintf("%08x", crc32.ChecksumIEEE(content))}, "cd 2 crc")
	m.fields(map[string]string{"crc": fmt.Sprintf("%08x", crc32.ChecksumIEEE(content[7*2048:10*2048]))}, "cd 2 crc 7 3")
	m.want("err cd beyond the end: frames=517", "cd 2 crc 517 1")

	m.ok("cd 2 stress on")
	m.ok("sleep 500")
	stress := m.ok("cd 2 stress off")
	if number(t, stress["reads"]) < 10 || stress["errors"] != "0" || stress["mismatches"] != "0" {
		t.Errorf("stress: %v", stress)
	}

	m.want("ok cd lock", "cd 2 lock on")
	m.fields(map[string]string{"asc": "53"}, "cd 2 eject") // medium removal prevented
	m.want("ok cd lock", "cd 2 lock off")
	m.want("ok cd eject", "cd 2 eject")
	m.fields(map[string]string{"tray": "1"}, "cd 2 event")
	m.fields(map[string]string{"ready": "0", "key": "2"}, "cd 2 ready")
	m.want("ok cd load", "cd 2 load")
	m.fields(map[string]string{"crc": fmt.Sprintf("%08x", crc32.ChecksumIEEE(content))}, "cd 2 crc")

	// Another disc while the guest reads: noticed, no error, and the content is the new one's.
	m.ok("cd 2 stress on")
	say("change ide1-cd0 " + other + " raw")
	for deadline := time.Now().Add(limit); m.ok("cd 2 stress")["changes"] == "0"; m.ok("sleep 50") {
		if time.Now().After(deadline) {
			t.Fatal("the guest does not notice the new disc")
		}
	}
	m.ok("sleep 200")
	m.fields(map[string]string{"changes": "1", "errors": "0", "mismatches": "0"}, "cd 2 stress off")
	m.fields(map[string]string{"crc": fmt.Sprintf("%08x", crc32.ChecksumIEEE(otherContent))}, "cd 2 crc")
}

// lossy loses some frames each way.
type lossy struct {
	peer.Link
	mu    sync.Mutex
	rand  *rand.Rand
	share float64
}

func (l *lossy) lose() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.rand.Float64() < l.share
}

func (l *lossy) ReadFrame(b []byte) (int, bool, error) {
	for {
		n, partial, err := l.Link.ReadFrame(b)
		if err != nil || !l.lose() {
			return n, partial, err
		}
	}
}

func (l *lossy) WriteFrame(frame []byte) error {
	if l.lose() {
		return nil
	}
	return l.Link.WriteFrame(frame)
}

func (l *lossy) setShare(share float64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.share = share
}

func TestNICs(t *testing.T) {
	models := []struct {
		name string
		mtu  int
	}{{"e1000", 9000}, {"rtl8139", 1500}, {"virtio-net", 9000}}
	var files []*os.File
	var args []string
	links := make([]*lossy, len(models))
	hosts := make([]*peer.Host, len(models))
	for i, model := range models {
		conn, theirs := socketPair(t, unix.SOCK_DGRAM)
		files = append(files, theirs)
		links[i] = &lossy{Link: peer.Datagrams(conn), rand: rand.New(rand.NewPCG(1, uint64(i)))}
		hosts[i] = peer.NewHost(links[i], peer.Config{MAC: net.HardwareAddr{2, 0, 0, 0, 1, byte(i)}, IP: hostIP(i), MTU: model.mtu})
		t.Cleanup(func() { hosts[i].Close() })
		args = append(args, "-netdev", fmt.Sprintf("dgram,id=n%d,local.type=fd,local.str=%d", i, 3+i),
			"-device", fmt.Sprintf("%s,netdev=n%d,mac=02:00:00:00:02:%02x", model.name, i, i))
	}
	m := boot(t, build(t), files, args...)
	list := m.ok("nic list")
	if list["count"] != "3" {
		t.Fatalf("nic list: %v", list)
	}
	m.want("err nic 1 is down", "nic 1 ping 10.0.1.1")
	m.want("err nic mtu=9000 rtl8139 takes 576 to 1500", "nic 1 up 10.0.1.2 9000")
	for i, model := range models {
		m.fields(map[string]string{"model": model.name, "mac": fmt.Sprintf("02:00:00:00:02:%02x", i)}, "nic %d up %v %d", i, guestIP(i), model.mtu)
	}

	for i, model := range models {
		t.Run(model.name, func(t *testing.T) {
			m.t = t
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			testNIC(ctx, t, m, i, hosts[i], model.mtu)
		})
		m.t = t
	}

	t.Run("three at once", func(t *testing.T) {
		m.t = t
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		const size = 1 << 20
		var wg sync.WaitGroup
		for i := range models {
			m.ok("nic %d recv 7001 bg", i)
			m.ok("nic %d send %v 7002 %d %d bg", i, hostIP(i), size, 50+i)
			wg.Go(func() { checkTransfer(t, uint32(60+i), size)(hosts[i].Send(ctx, guestIP(i), 7001, size, uint32(60+i))) })
			wg.Go(func() { checkTransfer(t, uint32(50+i), size)(hosts[i].Receive(ctx, 7002)) })
		}
		wg.Wait()
		for i := range models {
			m.fields(map[string]string{
				"sent_state": "done", "sent_crc": fmt.Sprintf("%08x", peer.PatternCRC(uint32(50+i), 0, size)),
				"received_state": "done", "received_crc": fmt.Sprintf("%08x", peer.PatternCRC(uint32(60+i), 0, size)),
			}, "nic %d wait", i)
		}
	})
	m.t = t

	t.Run("a twentieth lost", func(t *testing.T) {
		m.t = t
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		const size = 200 << 10
		links[1].setShare(0.05)
		defer links[1].setShare(0)
		var wg sync.WaitGroup
		m.ok("nic 1 recv 7001 bg")
		checkTransfer(t, 5, size)(hosts[1].Send(ctx, guestIP(1), 7001, size, 5))
		m.fields(map[string]string{"received_state": "done", "received": strconv.Itoa(size)}, "nic 1 wait")
		wg.Go(func() { checkTransfer(t, 6, size)(hosts[1].Receive(ctx, 7002)) })
		sent := m.ok("nic 1 send %v 7002 %d 6", hostIP(1), size)
		wg.Wait()
		if sent["resent"] == "0" {
			t.Error("nothing was sent again")
		}
	})
	m.t = t
	m.ok("nic 2 down")
	m.want("err nic 2 is down", "nic 2 raw 00")
}

// Six NICs on one interrupt line, each brought up and down again and again while frames come for all of them: nobody may leave the line high.
func TestNICsShareLine(t *testing.T) {
	models := []string{"e1000", "rtl8139", "virtio-net", "e1000", "rtl8139", "virtio-net"}
	var files []*os.File
	var args []string
	var flood sync.WaitGroup
	t.Cleanup(flood.Wait)
	for i, model := range models {
		conn, theirs := socketPair(t, unix.SOCK_DGRAM)
		t.Cleanup(func() { conn.Close() })
		files = append(files, theirs)
		args = append(args, "-netdev", fmt.Sprintf("dgram,id=n%d,local.type=fd,local.str=%d", i, 3+i),
			"-device", fmt.Sprintf("%s,netdev=n%d,mac=02:00:00:00:02:%02x,addr=%#x", model, i, i, 4+4*i)) // the line is the slot modulo 4
		frame := append([]byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 1, byte(i), 0x88, 0x8e}, make([]byte, 46)...)
		flood.Go(func() {
			for t.Context().Err() == nil {
				if _, err := conn.Write(frame); err != nil {
					return // QEMU or the test has ended
				}
				time.Sleep(200 * time.Microsecond)
			}
		})
	}
	m := boot(t, build(t), files, args...)
	m.fields(map[string]string{"count": fmt.Sprint(len(models))}, "nic list")
	lines := map[string]bool{}
	for range 20 {
		for i := range models {
			lines[m.ok("nic %d up %v", i, guestIP(i))["irq"]] = true
		}
		for i := range models {
			m.ok("nic %d up %v", i, guestIP(i)) // from up
			m.ok("nic %d down", i)
		}
	}
	if len(lines) != 1 {
		t.Errorf("the NICs have lines %v: want one", lines)
	}
}

func hostIP(i int) netip.Addr  { return netip.AddrFrom4([4]byte{10, 0, byte(i), 1}) }
func guestIP(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 0, byte(i), 2}) }

func checkTransfer(t *testing.T, seed, size uint32) func(peer.Transfer, error) {
	return func(got peer.Transfer, err error) {
		t.Helper()
		if err != nil {
			t.Error(err)
			return
		}
		if want := peer.PatternCRC(seed, 0, uint64(size)); got.Bytes != size || got.CRC != want {
			t.Errorf("transfer: %d bytes, CRC %08x; want %d bytes, %08x", got.Bytes, got.CRC, size, want)
		}
		t.Logf("%d KiB in %v, %d segments sent again", got.Bytes>>10, got.Elapsed.Round(time.Millisecond), got.Resent)
	}
}

func testNIC(ctx context.Context, t *testing.T, m *machine, i int, host *peer.Host, mtu int) {
	// Both sides ping, from the least to the most that the MTU takes.
	for _, size := range []int{0, 1, 56, 1472, mtu - 28} {
		m.fields(map[string]string{"received": "2", "bad": "0"}, "nic %d ping %v %d 2", i, hostIP(i), size)
		if _, err := host.Ping(ctx, guestIP(i), size); err != nil {
			t.Error(err)
		}
		m.fields(map[string]string{"echoed": "1", "bad": "0", "bad_sum": "0"}, "nic %d udp %v 7 %d 3", i, hostIP(i), size)
		if err := host.Echo(ctx, guestIP(i), size, 4); err != nil {
			t.Error(err)
		}
	}
	if _, err := m.try("nic %d ping %v %d", i, hostIP(i), mtu-27); err == nil {
		t.Error("a ping larger than the MTU was sent")
	}
	m.want("err nic ping 10.9.9.9 does not answer ARP", "nic %d ping 10.9.9.9", i)

	// Bulk both ways, a size that no segment divides.
	const size = 1<<20 + 12345
	m.ok("nic %d recv 7001 bg", i)
	checkTransfer(t, 21, size)(host.Send(ctx, guestIP(i), 7001, size, 21))
	m.fields(map[string]string{"received": strconv.Itoa(size), "received_state": "done"}, "nic %d wait", i)
	var wg sync.WaitGroup
	wg.Go(func() { checkTransfer(t, 22, size)(host.Receive(ctx, 7002)) })
	m.fields(map[string]string{"sent": strconv.Itoa(size), "sent_state": "done"}, "nic %d send %v 7002 %d 22", i, hostIP(i), size)
	wg.Wait()

	// Frames that are not IP: 802.1X, LLDP, VLAN-tagged; one of the full MTU.
	for name, head := range map[string]string{
		"802.1X": "0180c2000003" + "02000000010a" + "888e" + "0100",
		"LLDP":   "0180c200000e" + "02000000010a" + "88cc" + "0207",
		"VLAN":   "ffffffffffff" + "02000000010a" + "8100" + "0064" + "0800",
	} {
		frame, err := hex.DecodeString(head)
		if err != nil {
			t.Fatal(err)
		}
		for _, length := range []int{64, mtu + 14} {
			whole := append(frame[:len(frame):len(frame)], make([]byte, length-len(frame))...)
			etherType := uint16(whole[12])<<8 | uint16(whole[13])
			if err := host.SendFrame(whole); err != nil {
				t.Fatal(err)
			}
			kept := whole[:min(len(whole), 1600)]
			deadline := time.Now().Add(limit)
			for {
				r, err := m.try("nic %d last %#x", i, etherType)
				if err == nil && r.Fields["length"] == strconv.Itoa(length) {
					if r.Fields["hex"] != hex.EncodeToString(kept) {
						t.Errorf("%s of %d bytes: the guest received another content", name, length)
					}
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("%s of %d bytes does not arrive: %s", name, length, r.Line)
				}
				m.ok("sleep 20")
			}
			m.ok("nic %d raw %s %d", i, head, length)
			got, err := host.Frame(ctx, etherType)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(whole, got); diff != "" {
				t.Errorf("%s of %d bytes from the guest (-want +got):\n%s", name, length, diff)
			}
		}
	}
	m.fields(map[string]string{"bad_ip": "0", "bad_sum": "0", "errors": "0", "no_room": "0"}, "nic %d stats", i)
	if s := host.Stats(); s.BadChecksum != 0 || s.Malformed != 0 {
		t.Errorf("the host received bad packets: %+v", s)
	}
}
