// Command shim stands in QEMU's place in the lab's stubdomains, to do to QEMU
// what no toolstack can: it becomes QEMU by exec, and leaves a child that sends it a signal.
//
// The child reads data/fault of the stubdomain, "SIGNAL PHASE" ("9 monitor"), when it is there, and waits for that phase of
// stubinit; phase "now" is at once. "9 *" before the boot makes it the first phase there is.
package main

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/xen/xenstore"
)

const qemu = "/usr/libexec/xen-qemu-system-i386"

func main() {
	if len(os.Args) == 3 && os.Args[1] == "-fault" {
		pid, err := strconv.Atoi(os.Args[2])
		if err == nil {
			err = fault(pid)
		}
		fmt.Println("shim:", err)
		return
	}
	null, err := os.Open("/dev/null")
	if err == nil {
		_, err = os.StartProcess("/proc/self/exe", []string{"shim", "-fault", strconv.Itoa(os.Getpid())},
			&os.ProcAttr{Files: []*os.File{null, os.Stdout, os.Stderr}})
	}
	if err != nil {
		fmt.Println("shim:", err)
	}
	os.Args[0] = qemu
	fmt.Println("shim: exec:", syscall.Exec(qemu, os.Args, os.Environ()))
	os.Exit(1)
}

func fault(pid int) error {
	ctx := context.Background()
	xs, err := xenstore.Open()
	if err != nil {
		return err
	}
	defer xs.Close()
	var signal int
	var phase string
	_, err = xs.WaitFor(ctx, "data/fault", func(value string, exists bool) bool {
		if !exists {
			return false
		}
		_, err := fmt.Sscan(value, &signal, &phase)
		return err == nil
	})
	if err != nil {
		return err
	}
	target, err := xs.ReadString(ctx, "target")
	if err != nil {
		return err
	}
	if phase != "now" {
		_, err = xs.WaitFor(ctx, "device-model/"+target+"/stubinit/phase", func(value string, exists bool) bool {
			return exists && (phase == "*" || strings.TrimSpace(value) == phase)
		})
		if err != nil {
			return err
		}
	}
	fmt.Printf("shim: signal %d to QEMU\n", signal)
	return unix.Kill(pid, syscall.Signal(signal))
}
