package main

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/stubinit/stubinit/internal/xen/xenstore/xenstoretest"
	"github.com/stubinit/stubinit/netup"
)

const (
	testSelf   = 6
	testTarget = 5
	testVM     = "/vm/c5f92411-6d2b-4ba9-b1f4-3f6b9d6d5a10"
)

// libxlNodes are the nodes of a guest with two disks, a CD-ROM drive, a NIC and a serial port.
func libxlNodes() map[string]string {
	nodes := map[string]string{
		"/local/domain/6/domid":                      "6",
		"/local/domain/6/target":                     "5",
		"/local/domain/5/vm":                         testVM,
		"/local/domain/6/console/type":               "xenconsoled",
		"/local/domain/6/device/console/1/backend":   "/local/domain/0/backend/console/6/1",
		"/local/domain/6/device/console/2/backend":   "/local/domain/0/backend/console/6/2",
		"/local/domain/6/device/console/3/backend":   "/local/domain/0/backend/console/6/3",
		"/local/domain/6/device/vbd/768/device-type": "disk",
		"/local/domain/6/device/vbd/832/device-type": "disk",
		"/local/domain/6/device/vbd/5632/state":      "4",
		"/local/domain/6/device/vif/0/mac":           "00:16:3e:01:02:03",
		"/local/domain/6/device/vif/0/backend":       "/local/domain/0/backend/vif/6/0",
		"/local/domain/6/device/vif/0/mtu":           "1500",
	}
	for i, arg := range libxlArgs {
		nodes[fmt.Sprintf("%s/image/dm-argv/%03d", testVM, i+1)] = arg
	}
	return nodes
}

// libxlArgs are more than nine arguments, so that order shows; some are not text.
var libxlArgs = []string{
	"-xen-domid", "5", "-no-shutdown", "-name", "gäst \xff", "-vnc", "none", "-serial", "/dev/hvc3", "",
	"-device", "e1000,id=nic0,netdev=net0,mac=00:16:3e:01:02:03",
}

// without are the nodes but for some, which go with all below them.
func without(nodes map[string]string, paths ...string) map[string]string {
	for _, path := range paths {
		for p := range nodes {
			if p == path || strings.HasPrefix(p, path+"/") {
				delete(nodes, p)
			}
		}
	}
	return nodes
}

func with(nodes map[string]string, pairs ...string) map[string]string {
	for i := 0; i < len(pairs); i += 2 {
		nodes[pairs[i]] = pairs[i+1]
	}
	return nodes
}

func storeOf(t testing.TB, nodes map[string]string) *xenstoretest.Server {
	s := xenstoretest.New(t)
	for path, value := range nodes {
		s.Set(path, value)
	}
	return s
}

func libxlConfig() *config {
	return &config{
		self: testSelf, target: testTarget, dmArgv: libxlArgs,
		vifs: []netup.Vif{{ID: 0, MAC: net.HardwareAddr{0, 0x16, 0x3e, 1, 2, 3}, MTU: 1500, Backend: "/local/domain/0/backend/vif/6/0"}},
		vbds: []int{768, 832, 5632}, consoles: []int{1, 2, 3},
	}
}

func TestReadConfig(t *testing.T) {
	const dir = "/local/domain/6/device"
	changed := func(change func(*config)) *config {
		c := libxlConfig()
		change(c)
		return c
	}
	for _, tt := range []struct {
		name  string
		nodes map[string]string
		want  *config
	}{
		{"as libxl writes it", libxlNodes(), libxlConfig()},
		{"no devices", without(libxlNodes(), dir), changed(func(c *config) { c.vifs, c.vbds, c.consoles = nil, nil, nil })},
		{"no mtu", without(libxlNodes(), dir+"/vif/0/mtu"), changed(func(c *config) { c.vifs[0].MTU = 0 })},
		{"largest mtu", with(libxlNodes(), dir+"/vif/0/mtu", "65535"), changed(func(c *config) { c.vifs[0].MTU = 65535 })},
		{"vifs by number", with(without(libxlNodes(), dir+"/vif"),
			dir+"/vif/10/mac", "00:16:3e:00:00:0a", dir+"/vif/10/backend", "/b10", dir+"/vif/9/mac", "00:16:3e:00:00:09", dir+"/vif/9/backend", "/b9"),
			changed(func(c *config) {
				c.vifs = []netup.Vif{
					{ID: 9, MAC: net.HardwareAddr{0, 0x16, 0x3e, 0, 0, 9}, Backend: "/b9"},
					{ID: 10, MAC: net.HardwareAddr{0, 0x16, 0x3e, 0, 0, 10}, Backend: "/b10"},
				}
			})},
		{"arguments without leading zeros", with(without(libxlNodes(), testVM+"/image/dm-argv"), testVM+"/image/dm-argv/2", "two", testVM+"/image/dm-argv/1", "one"),
			changed(func(c *config) { c.dmArgv = []string{"one", "two"} })},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := readConfig(t.Context(), storeOf(t, tt.nodes).Dial(testSelf))
			if err != nil {
				t.Fatal(err)
			}
			empty := cmp.FilterValues(func(a, b []netup.Vif) bool { return len(a) == 0 && len(b) == 0 }, cmp.Comparer(func(a, b []netup.Vif) bool { return true }))
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(config{}), empty); d != "" {
				t.Errorf("config (-want +got):\n%s", d)
			}
			if got, want := got.devicePath(), "/local/domain/6/device-model/5"; got != want {
				t.Errorf("devicePath %q, want %q", got, want)
			}
		})
	}
}

// Each error names the node that is to blame, and where it helps what to do.
func TestReadConfigErrors(t *testing.T) {
	const dir = "/local/domain/6/device"
	const argv = testVM + "/image/dm-argv"
	many := without(libxlNodes(), argv)
	for i := range maxArgs + 1 {
		many[fmt.Sprintf("%s/%d", argv, i+1)] = "x"
	}
	for _, tt := range []struct {
		name  string
		nodes map[string]string
		want  string
		hint  string
	}{
		{"no domid", without(libxlNodes(), "/local/domain/6/domid"), "domid", ""},
		{"domid no number", with(libxlNodes(), "/local/domain/6/domid", "six"), `xenstore domid: "six" is not a domid`, ""},
		{"reserved domid", with(libxlNodes(), "/local/domain/6/domid", "32752"), `xenstore domid: "32752" is not a domid`, ""},
		{"no target", without(libxlNodes(), "/local/domain/6/target"), "target", "device_model_stubdomain_override=1"},
		{"target empty", with(libxlNodes(), "/local/domain/6/target", ""), `xenstore target: "" is not a domid`, "device_model_stubdomain_override=1"},
		{"target negative", with(libxlNodes(), "/local/domain/6/target", "-1"), `xenstore target: "-1" is not a domid`, "device_model_stubdomain_override=1"},
		{"target no text", with(libxlNodes(), "/local/domain/6/target", "5\x00"), "target", "device_model_stubdomain_override=1"},
		{"no vm", without(libxlNodes(), "/local/domain/5/vm"), "/local/domain/5/vm", "the guest is gone"},
		{"vm elsewhere", with(libxlNodes(), "/local/domain/5/vm", "/local/domain/5"), `xenstore /local/domain/5/vm: "/local/domain/5" does not start with /vm/`, ""},
		{"no arguments", without(libxlNodes(), argv), argv, "qemu-xen-traditional"},
		{"empty folder of arguments", with(without(libxlNodes(), argv), argv, ""), argv, "qemu-xen-traditional"},
		{"an argument is missing", without(libxlNodes(), argv+"/002"), `xenstore ` + argv + `: argument 002 is missing`, ""},
		{"argument without a number", with(libxlNodes(), argv+"/first", "x"), `xenstore ` + argv + `/first: "first" is not a number`, ""},
		{"argument twice", with(libxlNodes(), argv+"/1", "x"), "are the same number", ""},
		{"too many arguments", many, "xenstore " + argv + ": 1000 arguments, more than 999", ""},
		{"NUL", with(libxlNodes(), argv+"/003", "a\x00b"), `xenstore ` + argv + `/003: a NUL byte in an argument: "a\x00b"`, ""},
		{"no mac", without(libxlNodes(), dir+"/vif/0/mac"), "device/vif/0/mac", ""},
		{"bad mac", with(libxlNodes(), dir+"/vif/0/mac", "00:16:3e"), `xenstore device/vif/0/mac: "00:16:3e" is not an Ethernet address`, ""},
		{"InfiniBand mac", with(libxlNodes(), dir+"/vif/0/mac", "00:16:3e:01:02:03:04:05"), `xenstore device/vif/0/mac: "00:16:3e:01:02:03:04:05" is not an Ethernet address`, ""},
		{"no backend", without(libxlNodes(), dir+"/vif/0/backend"), "device/vif/0/backend", ""},
		{"mtu no number", with(libxlNodes(), dir+"/vif/0/mtu", "jumbo"), `xenstore device/vif/0/mtu: "jumbo" is not an MTU`, ""},
		{"mtu too small", with(libxlNodes(), dir+"/vif/0/mtu", "67"), `xenstore device/vif/0/mtu: "67" is not an MTU`, ""},
		{"mtu too large", with(libxlNodes(), dir+"/vif/0/mtu", "65536"), `xenstore device/vif/0/mtu: "65536" is not an MTU`, ""},
		{"mtu no text", with(libxlNodes(), dir+"/vif/0/mtu", "15\xff"), "device/vif/0/mtu", ""},
		{"vif no number", with(libxlNodes(), dir+"/vif/eth0/mac", ""), `xenstore device/vif/eth0: "eth0" is not a number`, ""},
		{"vbd no number", with(libxlNodes(), dir+"/vbd/xvda/state", "1"), `xenstore device/vbd/xvda: "xvda" is not a number`, ""},
		{"console too large", with(libxlNodes(), dir+"/console/2147483648/state", "1"), `xenstore device/console/2147483648: "2147483648" is not a number`, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := readConfig(t.Context(), storeOf(t, tt.nodes).Dial(testSelf))
			if err == nil {
				t.Fatalf("no error, but %+v", c)
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q lacks %q", err, tt.want)
			}
			if line := (&stepError{"config", err}).Error(); !strings.Contains(line, tt.hint) {
				t.Errorf("line %q lacks hint %q", line, tt.hint)
			}
		})
	}
}

// What QEMU could not serve is refused before anything is set up, and the way out is named.
func TestCheckAbsent(t *testing.T) {
	dir := t.TempDir()
	list := filepath.Join(dir, "absent")
	spice := append(slices.Clone(libxlArgs), "-spice", "port=6000")
	if err := checkAbsent(list, spice); err != nil {
		t.Errorf("an image with all of its libraries: %v", err)
	}
	if err := os.WriteFile(list, []byte("libspice-server.so.1 no network\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := checkAbsent(list, libxlArgs); err != nil {
		t.Errorf("libxl's usual arguments: %v", err)
	}
	const want = `FATAL config: dm-argv argument 13: -spice needs libspice-server.so.1, which this image leaves out: no network: ` +
		`take it out of device_model_args_hvm in the guest's configuration, or build the image from a manifest without the line "absent libspice-server.so.1"`
	if got := (&stepError{"config", checkAbsent(list, spice)}).Error(); got != want {
		t.Errorf("line\n%s, want\n%s", got, want)
	}
	if err := checkAbsent(dir, libxlArgs); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a list that cannot be read: %v", err)
	}
}

// What xenstored refuses is said with its path, whichever request it is.
func TestReadConfigRefused(t *testing.T) {
	s := storeOf(t, libxlNodes())
	var asked []string
	s.SetFaults(xenstoretest.Faults{Fail: func(op, path string) syscall.Errno {
		asked = append(asked, op+" "+path)
		return 0
	}})
	xs := s.Dial(testSelf)
	if _, err := readConfig(t.Context(), xs); err != nil {
		t.Fatal(err)
	}
	for _, request := range slices.Compact(slices.Sorted(slices.Values(asked))) {
		t.Run(request, func(t *testing.T) {
			op, path, _ := strings.Cut(request, " ")
			s.SetFaults(xenstoretest.Faults{Fail: func(o, p string) syscall.Errno {
				if o == op && p == path {
					return syscall.EACCES
				}
				return 0
			}})
			_, err := readConfig(t.Context(), xs)
			if err == nil || !strings.Contains(err.Error(), path) {
				t.Errorf("%v; want an error that names %s", err, path)
			}
		})
	}
}

// FuzzReadDMArgv reads arbitrary nodes below dm-argv: "name=value" separated by newlines.
// An answer has every value once, byte for byte, ordered by number.
func FuzzReadDMArgv(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		if len(text) > 16<<10 {
			return
		}
		s := xenstoretest.New(t)
		s.Set("/local/domain/5/vm", testVM)
		dir := testVM + "/image/dm-argv"
		written := map[string]string{}
		for _, line := range strings.Split(text, "\n") {
			name, value, _ := strings.Cut(line, "=")
			if name == "" || len(name) > 64 || len(value) > 4000 || strings.ContainsAny(name, "/\x00") {
				continue // xenstored has no such names and values
			}
			s.Set(dir+"/"+name, value)
			written[name] = value
		}
		args, err := readDMArgv(t.Context(), s.Dial(testSelf), testTarget)
		if err != nil {
			if !strings.Contains(err.Error(), dir) {
				t.Errorf("error without a path: %v", err)
			}
			return
		}
		var want []string
		for number := 0; len(want) < len(written); number++ {
			if number > 1<<20 {
				return // numbers far apart: the order is compared for small ones
			}
			for name, value := range written {
				if strings.TrimLeft(name, "0") == strings.TrimLeft(fmt.Sprint(number), "0") {
					want = append(want, value)
				}
			}
		}
		if d := cmp.Diff(want, args); d != "" {
			t.Errorf("arguments (-want +got):\n%s", d)
		}
		for _, arg := range args {
			if strings.Contains(arg, "\x00") {
				t.Errorf("NUL in %q", arg)
			}
		}
	})
}
