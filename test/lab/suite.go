package lab

import (
	"fmt"
	"slices"
)

// A Suite is a Debian release and the versions of the hypervisor it has.
type Suite struct {
	Name string
	Xen  string // "4.20"
}

var suites = []Suite{
	{Name: "trixie", Xen: "4.20"},
	{Name: "bookworm", Xen: "4.17"},
}

// FindSuite returns the suite of that name.
func FindSuite(name string) (Suite, error) {
	i := slices.IndexFunc(suites, func(s Suite) bool { return s.Name == name })
	if i < 0 {
		names := make([]string, len(suites))
		for i, s := range suites {
			names[i] = s.Name
		}
		return Suite{}, fmt.Errorf("suite %q: the lab knows %q", name, names)
	}
	return suites[i], nil
}

// packages are what dom0 consists of, their dependencies aside.
func (s Suite) packages() []string {
	return []string{
		"xen-hypervisor-" + s.Xen + "-amd64", "xen-utils-" + s.Xen, "xen-utils-common", "xenstore-utils",
		"qemu-system-xen", "linux-image-amd64",
		"bash", "coreutils", "util-linux", "mount", "grep", "sed", "procps", "kmod", "iproute2", "socat", "busybox-static",
	}
}

// modules are dom0's kernel modules, their dependencies aside. The first part is loaded by init, the rest is there for scenarios.
var (
	bootModules = []string{
		"virtio_pci", "virtio_console",
		"xen-evtchn", "xen-gntdev", "xen-gntalloc", "xen-privcmd", "xenfs", "xen-blkback", "xen-netback",
		"bridge", "tun", "loop",
	}
	extraModules = []string{"xen-pciback", "xen-blkfront", "xen-netfront", "8021q", "veth", "dummy"}
)
