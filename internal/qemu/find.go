package qemu

import (
	"fmt"
	"os/exec"
)

// binaries are where distributions have an x86 QEMU; Debian's build for Xen is the last.
var binaries = []string{"qemu-system-x86_64", "qemu-system-i386", "/usr/libexec/xen-qemu-system-i386"}

// Find returns the path of the first x86 QEMU of this system.
func Find() (string, error) {
	for _, name := range binaries {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("qemu: none of %q is here: install Debian's qemu-system-x86 or qemu-system-xen", binaries)
}
