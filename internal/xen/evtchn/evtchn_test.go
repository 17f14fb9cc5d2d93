package evtchn

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/stubinit/stubinit/internal/fdio"
)

// fakeDevice is a socket in place of the device, so that waiting is Go's
// poller's, with scripted ioctls.
type fakeDevice struct {
	*kernelDevice
	mu      sync.Mutex
	calls   []string
	value   int
	err     error // of ioctls
	readErr []error
	nowErr  error // of readNow
	renewed error
}

func (d *fakeDevice) ioctl(req uint, args ...uint32) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, fmt.Sprintf("%#x %d", req, args))
	return d.value, d.err
}

func (d *fakeDevice) Read(b []byte) (int, error) {
	if len(d.readErr) > 0 {
		err := d.readErr[0]
		d.readErr = d.readErr[1:]
		return 0, err
	}
	return d.kernelDevice.Read(b)
}

func (d *fakeDevice) readNow(b []byte) (int, error) {
	if d.nowErr != nil {
		return 0, d.nowErr
	}
	return d.kernelDevice.readNow(b)
}

func (d *fakeDevice) renew() (device, error) {
	if d.renewed != nil {
		return nil, d.renewed
	}
	dev, err := d.kernelDevice.renew()
	if err != nil {
		return nil, err
	}
	return &fakeDevice{kernelDevice: dev.(*kernelDevice)}, nil
}

// open returns a File, its device, and Xen's side of it.
func open(t *testing.T, bound ...uint32) (*File, *fakeDevice, *os.File) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	xen := os.NewFile(uintptr(pair[1]), "xen")
	real, err := newDevice(os.NewFile(uintptr(pair[0]), "device"))
	if err != nil {
		t.Fatal(err)
	}
	dev := &fakeDevice{kernelDevice: real}
	f := &File{dev: dev, ports: bound}
	t.Cleanup(func() {
		xen.Close()
		f.Close()
	})
	return f, dev, xen
}

func ports(list ...uint32) []byte {
	var b []byte
	for _, p := range list {
		b = binary.LittleEndian.AppendUint32(b, p)
	}
	return b
}

// unmasked reads one write of ports that the File made.
func unmasked(t *testing.T, xen *os.File) []byte {
	t.Helper()
	xen.SetReadDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 64)
	n, err := xen.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}

func send(t *testing.T, xen *os.File, b []byte) {
	t.Helper()
	if _, err := xen.Write(b); err != nil {
		t.Fatal(err)
	}
}

// wait is Wait with a limit.
func wait(f *File) (uint32, error) {
	limit := time.AfterFunc(10*time.Second, f.Interrupt)
	defer limit.Stop()
	return f.Wait()
}

// The numbers are those that a C program with sys/evtchn.h prints.
func TestCalls(t *testing.T) {
	f, dev, _ := open(t)
	dev.value = 9
	if port, err := f.BindUnbound(0); port != 9 || err != nil {
		t.Error(port, err)
	}
	dev.value = 10
	if port, err := f.BindInterdomain(3, 21); port != 10 || err != nil {
		t.Error(port, err)
	}
	if err := errors.Join(f.Notify(9), f.Unbind(9)); err != nil {
		t.Error(err)
	}
	want := []string{"0x44502 [0]", "0x84501 [3 21]", "0x44504 [9]", "0x44503 [9]"}
	if diff := cmp.Diff(want, dev.calls); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]uint32{10}, f.ports); diff != "" {
		t.Error("bound ports:", diff)
	}
	if ioctlReset != 0x4505 {
		t.Errorf("RESET is %#x", ioctlReset)
	}
}

func TestCallErrors(t *testing.T) {
	f, dev, _ := open(t, 9)
	dev.err = syscall.ENOENT
	calls := map[string]func() error{
		"/dev/xen/evtchn: make a port for domain 4: no such file or directory":   func() error { _, err := f.BindUnbound(4); return err },
		"/dev/xen/evtchn: bind to port 2 of domain 1: no such file or directory": func() error { _, err := f.BindInterdomain(1, 2); return err },
		"/dev/xen/evtchn: notify port 9: no such file or directory":              func() error { return f.Notify(9) },
		"/dev/xen/evtchn: unbind port 9: no such file or directory":              func() error { return f.Unbind(9) },
	}
	for text, call := range calls {
		var e *Error
		if err := call(); !errors.As(err, &e) || !errors.Is(err, syscall.ENOENT) || err.Error() != text {
			t.Errorf("error %v, want %s", err, text)
		}
	}
	if err := errors.Join(f.Close(), f.Close()); err != nil {
		t.Error(err)
	}
	for _, call := range calls {
		if err := call(); !errors.Is(err, fs.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	}
}

func TestWait(t *testing.T) {
	f, _, xen := open(t, 3, 7)
	send(t, xen, ports(3, 99, 7, 3)) // 99 was unbound meanwhile
	for _, want := range []uint32{3, 7, 3} {
		port, err := wait(f)
		if port != want || err != nil {
			t.Fatalf("port %d, %v, want %d", port, err, want)
		}
		if diff := cmp.Diff(ports(want), unmasked(t, xen)); diff != "" {
			t.Error("unmask:", diff)
		}
	}
	// One that comes while Wait sleeps.
	got := make(chan uint32)
	go func() {
		port, err := wait(f)
		if err != nil {
			t.Error(err)
		}
		got <- port
	}()
	send(t, xen, ports(7))
	if port := <-got; port != 7 {
		t.Errorf("port %d", port)
	}
}

func TestWaitEnds(t *testing.T) {
	for name, end := range map[string]func(*File){
		"Interrupt": (*File).Interrupt,
		"Close":     func(f *File) { f.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			f, dev, xen := open(t, 3)
			ended := make(chan error)
			go func() {
				_, err := f.Wait()
				ended <- err
			}()
			for f.waiting.TryLock() { // until it waits
				f.waiting.Unlock()
			}
			end(f)
			if err := <-ended; !errors.Is(err, fs.ErrClosed) || !strings.Contains(err.Error(), "wait for an event") {
				t.Errorf("while it waits: %v", err)
			}
			if _, err := f.Wait(); !errors.Is(err, fs.ErrClosed) {
				t.Errorf("afterwards: %v", err)
			}
			dev.calls = nil
			err, unmaskErr := f.Notify(3), f.unmask(3)
			if name == "Close" {
				if !errors.Is(err, fs.ErrClosed) || !errors.Is(unmaskErr, fs.ErrClosed) {
					t.Errorf("closed: notify %v, unmask %v", err, unmaskErr)
				}
				return
			}
			if err != nil || unmaskErr != nil {
				t.Errorf("interrupted: notify %v, unmask %v", err, unmaskErr)
			}
			if diff := cmp.Diff(ports(3), unmasked(t, xen)); diff != "" {
				t.Error("unmask:", diff)
			}
		})
	}
	// An overflow meanwhile: the descriptor that takes the place of the old one wakes too.
	f, dev, _ := open(t, 3)
	f.Interrupt()
	if err := f.resetRing(dev); !errors.Is(err, ErrOverflow) {
		t.Fatal(err)
	}
	if _, err := f.dev.Read(make([]byte, 4)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the new descriptor waits: %v", err)
	}
}

func TestWaitBadReads(t *testing.T) {
	f, dev, xen := open(t, 3)
	send(t, xen, []byte{3, 0, 0})
	if _, err := wait(f); err == nil || !strings.Contains(err.Error(), "read gave 3 bytes") {
		t.Errorf("err = %v", err)
	}
	// An error of Go's poller alone: what the device says counts.
	dev.readErr = []error{errors.New("not pollable")}
	send(t, xen, ports(3))
	if port, err := wait(f); port != 3 || err != nil {
		t.Errorf("port %d, %v", port, err)
	}
	dev.readErr = []error{&fs.PathError{Op: "read", Path: "x", Err: syscall.EIO}}
	if _, err := wait(f); !errors.Is(err, syscall.EIO) || !strings.HasSuffix(err.Error(), "wait for an event: input/output error") {
		t.Errorf("err = %v", err)
	}
	xen.Close()
	f2, _, xen2 := open(t, 3)
	send(t, xen2, ports(3))
	xen2.Close()
	if _, err := wait(f2); !errors.Is(err, syscall.EPIPE) || !strings.Contains(err.Error(), "unmask ports [3]") {
		t.Errorf("unmask without a device: %v", err)
	}
}

func TestOverflow(t *testing.T) {
	for _, tt := range []struct {
		name string
		set  func(*fakeDevice)
	}{
		{"from read", func(d *fakeDevice) { d.readErr = []error{&fs.PathError{Op: "read", Path: "x", Err: syscall.EFBIG}} }},
		{"from Go's poller", func(d *fakeDevice) { d.readErr = []error{errors.New("not pollable")}; d.nowErr = syscall.EFBIG }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, dev, xen := open(t, 3, 7)
			tt.set(dev)
			if _, err := wait(f); !errors.Is(err, ErrOverflow) || errors.Is(err, fs.ErrClosed) {
				t.Fatalf("err = %v", err)
			}
			if diff := cmp.Diff([]string{"0x4505 []"}, dev.calls); diff != "" {
				t.Error(diff)
			}
			if diff := cmp.Diff(ports(3, 7), unmasked(t, xen)); diff != "" {
				t.Error("all bound ports are unmasked:", diff)
			}
			if _, err := dev.File.Write(nil); !errors.Is(err, os.ErrClosed) {
				t.Errorf("the old descriptor is open: %v", err)
			}
			send(t, xen, ports(7)) // it goes on
			if port, err := wait(f); port != 7 || err != nil {
				t.Errorf("port %d, %v", port, err)
			}
		})
	}
	for name, set := range map[string]func(*fakeDevice){
		"reset": func(d *fakeDevice) { d.err = syscall.EIO },
		"renew": func(d *fakeDevice) { d.renewed = syscall.EIO },
	} {
		f, dev, _ := open(t, 3)
		dev.readErr = []error{syscall.EFBIG}
		set(dev)
		if _, err := wait(f); !errors.Is(err, ErrOverflow) || !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "recovery failed") {
			t.Errorf("%s fails: %v", name, err)
		}
	}
	f, dev, _ := open(t)
	f.Close()
	if err := f.resetRing(dev); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("closed meanwhile: %v", err)
	}
}

// Take gives what there is, and Watch says when.
func TestTake(t *testing.T) {
	f, dev, xen := open(t, 3, 7)
	p, err := fdio.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	called := 0
	if err := f.Watch(p, func() { called++ }); err != nil {
		t.Fatal(err)
	}
	take := func(want bool) {
		t.Helper()
		if came, err := f.Take(); came != want || err != nil {
			t.Errorf("Take: %v, %v, want %v", came, err, want)
		}
	}
	take(false)
	for range 2 {
		send(t, xen, ports(7, 9, 3)) // 9 is not bound any more
		called = 0
		for called == 0 {
			limit := time.AfterFunc(10*time.Second, p.Interrupt)
			if err := p.Wait(); err != nil {
				t.Fatal(err)
			}
			limit.Stop()
		}
		take(true)
		if diff := cmp.Diff(ports(7, 3), unmasked(t, xen)); diff != "" {
			t.Error(diff)
		}
		take(false)
	}
	send(t, xen, ports(9))
	take(false)
	send(t, xen, []byte{1, 2, 3})
	if _, err := f.Take(); err == nil || err.Error() != "/dev/xen/evtchn: take events: read gave 3 bytes, not a number of ports" {
		t.Errorf("half a port: %v", err)
	}

	dev.nowErr = syscall.EFBIG
	if _, err := f.Take(); !errors.Is(err, ErrOverflow) {
		t.Errorf("overflow: %v", err)
	}
	if diff := cmp.Diff(ports(3, 7), unmasked(t, xen)); diff != "" {
		t.Error("all bound ports are unmasked:", diff)
	}
	send(t, xen, ports(3)) // it goes on, under the new descriptor and the old watch
	called = 0
	if err := p.Wait(); err != nil || called == 0 {
		t.Errorf("after an overflow: called %d times, %v", called, err)
	}
	take(true)

	f.Close()
	if _, err := f.Take(); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Take after Close: %v", err)
	}
	if err := f.Watch(p, func() {}); !errors.Is(err, fs.ErrClosed) {
		t.Errorf("Watch after Close: %v", err)
	}
}

// The system calls themselves, on descriptors that are no event channels.
// An event of a session allocates nothing.
func TestTakeAllocates(t *testing.T) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	xen := os.NewFile(uintptr(pair[1]), "xen")
	defer xen.Close()
	dev, err := newDevice(os.NewFile(uintptr(pair[0]), "device"))
	if err != nil {
		t.Fatal(err)
	}
	f := &File{dev: dev, ports: []uint32{3}}
	defer f.Close()
	event, b := ports(3), make([]byte, 4)
	allocated := testing.AllocsPerRun(100, func() {
		if _, err := xen.Write(event); err != nil {
			t.Error(err)
		}
		if came, err := f.Take(); !came || err != nil {
			t.Error(came, err)
		}
		if _, err := xen.Read(b); err != nil { // unmask's
			t.Error(err)
		}
	})
	if allocated > 0 {
		t.Errorf("%v allocations an event", allocated)
	}
}

func TestKernelDevice(t *testing.T) {
	if _, err := Open(); err != nil && (!errors.Is(err, fs.ErrNotExist) || !strings.HasPrefix(err.Error(), "/dev/xen/evtchn: open: ")) {
		t.Errorf("Open: %v", err)
	}
	fifo := filepath.Join(t.TempDir(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	dev, err := openDevice(fifo)
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]uint32{nil, {1}} {
		if _, err := dev.ioctl(ioctlNotify, args...); !errors.Is(err, syscall.ENOTTY) {
			t.Errorf("ioctl: %v", err)
		}
	}
	if _, err := dev.readNow(make([]byte, 4)); !errors.Is(err, syscall.EAGAIN) {
		t.Errorf("readNow of nothing: %v", err)
	}
	again, err := dev.renew()
	if err != nil {
		t.Fatal(err)
	}
	dev.Close()
	if _, err := dev.renew(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("renew after Close: %v", err)
	}
	// The renewed descriptor is in Go's poller: a deadline ends its Read.
	if err := again.SetReadDeadline(time.Now().Add(time.Millisecond)); err != nil {
		t.Error(err)
	}
	if _, err := again.Read(make([]byte, 4)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("Read: %v", err)
	}
	f := &File{dev: again}
	again.Close()
	if err := f.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("Close of a closed descriptor: %v", err)
	}
}
