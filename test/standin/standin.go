// Package standin is what the lab's programs share that stand in the place of two programs of a stubdomain's image: in QEMU's, to
// become it by exec, and in the rescue shell's (stubinit.shell), which has more rights than QEMU.
package standin

import (
	"context"
	"errors"
	"os"
	"strconv"
	"syscall"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

const (
	Place = "/usr/bin/qemu-system-i386" // where stubinit looks for QEMU first
	Shell = "/bin/busybox"              // the rescue shell

	debian = "/usr/libexec/xen-qemu-system-i386"
	// Moved is where a QEMU whose own place is Place has to be. From another folder it would not find its firmware.
	Moved = "/usr/bin/xen-qemu-system-i386"
)

// pidNode of the stubdomain is where the one in QEMU's place leaves its process's number for the other.
const pidNode = "data/qemu-pid"

// Become is exec of the real QEMU with this program's arguments. It returns only with errors.
func Become() error {
	var errs []error
	for _, qemu := range []string{debian, Moved} {
		errs = append(errs, &os.PathError{Op: "exec", Path: qemu, Err: syscall.Exec(qemu, append([]string{qemu}, os.Args[1:]...), os.Environ())})
	}
	return errors.Join(errs...)
}

// Announce tells AwaitQEMU the process that is QEMU, or becomes it.
func Announce(ctx context.Context, xs *xenstore.Client, pid int) error {
	return xs.Write(ctx, pidNode, strconv.Itoa(pid))
}

// AwaitQEMU waits until QEMU's process was announced.
func AwaitQEMU(ctx context.Context, xs *xenstore.Client) (pid int, err error) {
	value, err := xs.WaitFor(ctx, pidNode, func(_ string, exists bool) bool { return exists })
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(value)
}
