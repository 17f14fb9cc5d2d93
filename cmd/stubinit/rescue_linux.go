package main

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/qemu"
)

// rescueShell is in the image if its manifest asks for it (configs/initramfs-debian.manifest).
const rescueShell = "/bin/busybox"

// startShell runs a shell on console 0, beside everything else; its end ends nothing. What cannot be done is
// logged: nobody's guest depends on it.
func (a *agent) startShell() {
	tty, err := os.OpenFile("/dev/hvc0", os.O_RDWR|unix.O_NOCTTY, 0) // not the log's own descriptor
	if err != nil {
		a.log.Error("stubinit.shell: no shell", "err", err)
		return
	}
	defer tty.Close()
	cmd := &qemu.Command{Path: rescueShell, Argv: []string{"sh", "-i"}}
	p, err := a.reaper.Start(cmd, qemu.Stdio{In: tty, Out: tty, Err: tty})
	if err != nil {
		a.log.Error("stubinit.shell: no shell; mkinitramfs puts one into the image if its manifest says program "+rescueShell, "err", err)
		return
	}
	a.log.Warn("stubinit.shell: a root shell runs on console 0", "pid", p.PID())
}
