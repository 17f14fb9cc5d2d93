package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/stubinit/stubinit/internal/xen/privcmd"
)

// xenDevices are what QEMU and we cannot do without, each with the module that makes it.
var xenDevices = []struct{ path, module string }{
	{"/dev/xen/privcmd", "xen-privcmd"},
	{"/dev/xen/evtchn", "xen-evtchn"},
	{"/dev/xen/gntalloc", "xen-gntalloc"},
	{"/dev/xen/gntdev", "xen-gntdev"},
}

func checkXenDevices(root string) error {
	var missing []string
	for _, d := range xenDevices {
		if _, err := os.Stat(root + d.path); err != nil {
			missing = append(missing, fmt.Sprintf("%s (module %s)", d.path, d.module))
		}
	}
	if missing != nil {
		return hint(fmt.Errorf("missing %s", strings.Join(missing, ", ")),
			"the module is not in the image (mkinitramfs -list shows what is) or not built into the kernel")
	}
	return nil
}

// checkUnrestricted finds out before QEMU does whether privcmd is restricted to what QEMU cannot start with.
func checkUnrestricted() error {
	f, err := privcmd.Open()
	if err != nil {
		return err
	}
	defer f.Close()
	restricted, err := f.Restricted()
	if err != nil {
		return err
	}
	if restricted {
		return hint(errors.New("/dev/xen/privcmd is restricted (XSA-482): QEMU could not create its ioreq server"),
			"add xen_privcmd.unrestricted=1 to stubdomain_cmdline in xl.cfg, or unrestricted=1 to the module in the image's manifest")
	}
	return nil
}
