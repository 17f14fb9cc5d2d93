// Package console holds the stubdomain's hvc consoles: console 0 (the log),
// console 1 (state out, "xl save") and console 2 (state in, "xl restore").
//
// Console numbers are libxl's (STUBDOM_CONSOLE_LOGGING, _SAVE, _RESTORE;
// stubdom.txt, "Toolstack to Linux ioemu stubdomain protocol"). In Linux,
// console N is the tty /dev/hvcN of the hvc_xen driver.
//
// Two properties of hvc_xen shape this package. A write to a console whose
// ring is full spins in the kernel, with interrupts off, until the other side
// reads: with one vCPU that stops the whole stubdomain. And a tty starts in
// cooked mode, which rewrites and echoes what it receives.
package console
