package console

import (
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

const (
	// kernelReserve stays free in console 0's ring for the kernel's own
	// messages: a printk that finds the ring full spins.
	kernelReserve = 512
	// unseenRoom is how much is written at once while the backend is connected but
	// the ring cannot be seen.
	unseenRoom = 1024
)

// HVC is console 0 as the log's Terminal.
type HVC struct {
	fd        int
	path      string
	connected atomic.Bool
	free      atomic.Pointer[func() int]
	lastWords atomic.Int32
}

// OpenHVC opens a console's tty for writing, without making it a controlling terminal.
func OpenHVC(path string) (*HVC, error) {
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open console", Path: path, Err: err}
	}
	return &HVC{fd: fd, path: path}, nil
}

// SetConnected tells whether the backend in dom0 reads the ring. Nothing is written before.
func (h *HVC) SetConnected(connected bool) { h.connected.Store(connected) }

// SetFree gives a look at the ring itself: free returns how many of its 2048 bytes are free.
func (h *HVC) SetFree(free func() int) { h.free.Store(&free) }

// AllowLastWords lets up to n bytes be written although no backend reads:
// before the power-off they can block nothing that matters, and a backend that comes late still reads them.
func (h *HVC) AllowLastWords(n int) { h.lastWords.Store(int32(min(n, unseenRoom))) }

// Room is Terminal's.
func (h *HVC) Room() int {
	if h.connected.Load() {
		if free := h.free.Load(); free != nil {
			return (*free)() - kernelReserve
		}
		return unseenRoom
	}
	n := int(h.lastWords.Load())
	if free := h.free.Load(); free != nil {
		return min(n, (*free)())
	}
	return n
}

// Write is Terminal's.
func (h *HVC) Write(p []byte) (int, error) {
	// Not through os.File: its poller would wait where the log must not.
	n, err := unix.Write(h.fd, p)
	if err != nil {
		return 0, &os.PathError{Op: "write console", Path: h.path, Err: err}
	}
	if !h.connected.Load() {
		h.lastWords.Add(int32(-n))
	}
	return n, nil
}

// Close closes the tty.
func (h *HVC) Close() error { return unix.Close(h.fd) }
