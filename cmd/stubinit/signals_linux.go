package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ignoreSignals sees to it that no signal which somebody sends ends PID 1: QEMU is root too. The kernel keeps from init what
// init has no handler for, unless init's first thread blocks it just then, as Go's runtime does at times, and another does not (complete_signal in
// kernel/signal.c).
func ignoreSignals() error {
	signal.Ignore(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGPIPE, syscall.SIGXFSZ)
	// Go's runtime asks for these, and ends at one that was sent; what the processor raises is still a panic. Nobody reads the channel. Ignored,
	// an abort would be ignored by QEMU as well.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGSEGV, syscall.SIGBUS, syscall.SIGFPE, syscall.SIGILL, syscall.SIGTRAP, syscall.SIGABRT, syscall.SIGSYS,
		syscall.SIGSTKFLT)
	// Go leaves these to a C library, and has no way to ignore them (sigtab_linux_generic.go).
	for s := syscall.Signal(32); s <= 34; s++ {
		if err := ignore(s); err != nil {
			return fmt.Errorf("ignore signal %d: %w", int(s), err)
		}
	}
	return nil
}

// ignore is sigaction(2) with SIG_IGN, without the runtime's knowledge.
func ignore(s syscall.Signal) error {
	const sigIgn = 1
	action := struct { // struct sigaction of the kernel (asm/signal.h), amd64 and arm64
		handler  uintptr
		flags    uint64
		restorer uintptr
		mask     uint64
	}{handler: sigIgn}
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&action)), 0, unsafe.Sizeof(action.mask), 0, 0); errno != 0 {
		return errno
	}
	return nil
}
