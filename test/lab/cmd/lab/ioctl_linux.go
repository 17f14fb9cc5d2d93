package main

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// rawTerminal makes the terminal pass every byte on, and says how large it is. What is not a terminal is left alone;
// its size is 0.
func rawTerminal(fd int) (rows, columns int, restore func(), err error) {
	old, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return 0, 0, func() {}, nil
	}
	raw := *old
	raw.Iflag &^= unix.IGNBRK | unix.BRKINT | unix.PARMRK | unix.ISTRIP | unix.INLCR | unix.IGNCR | unix.ICRNL | unix.IXON
	raw.Oflag &^= unix.OPOST
	raw.Lflag &^= unix.ECHO | unix.ECHONL | unix.ICANON | unix.ISIG | unix.IEXTEN
	raw.Cflag = raw.Cflag&^(unix.CSIZE|unix.PARENB) | unix.CS8
	raw.Cc[unix.VMIN], raw.Cc[unix.VTIME] = 1, 0
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, &raw); err != nil {
		return 0, 0, nil, fmt.Errorf("terminal to raw mode: %w", err)
	}
	if size, err := unix.IoctlGetWinsize(fd, unix.TIOCGWINSZ); err == nil {
		rows, columns = int(size.Row), int(size.Col)
	}
	return rows, columns, func() { unix.IoctlSetTermios(fd, unix.TCSETS, old) }, nil
}
