// Package console holds the stubdomain's console 0, the log.
//
// Console numbers are libxl's (STUBDOM_CONSOLE_LOGGING; stubdom.txt,
// "Toolstack to Linux ioemu stubdomain protocol"). In Linux,
// console N is the tty /dev/hvcN of the hvc_xen driver.
//
// One property of hvc_xen shapes this package: a write to a console whose
// ring is full spins in the kernel, with interrupts off, until the other side
// reads. With one vCPU that stops the whole stubdomain.
package console
