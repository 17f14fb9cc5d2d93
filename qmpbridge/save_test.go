package qmpbridge

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

const (
	saveRequest = `{"execute":"xen-save-devices-state","arguments":{"filename":"/dev/fdset/1","live":false},"id":"s"}`
	saved       = "{\"return\": {}, \"id\": \"s\"}\r\n"
)

// A fakeSaver records its calls; each waits for a token if its channel is set.
type fakeSaver struct {
	explain         error // of what QEMU refused
	mu              sync.Mutex
	calls           []string
	prepare, commit chan error
}

func (f *fakeSaver) call(ctx context.Context, name string, result chan error) error {
	f.mu.Lock()
	f.calls = append(f.calls, name)
	f.mu.Unlock()
	if result == nil {
		return nil
	}
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (f *fakeSaver) Prepare(ctx context.Context) error { return f.call(ctx, "prepare", f.prepare) }
func (f *fakeSaver) Commit(ctx context.Context) error  { return f.call(ctx, "commit", f.commit) }
func (f *fakeSaver) Explain(error) error               { return f.explain }
func (f *fakeSaver) Abort(ctx context.Context, cause error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return f.call(ctx, "abort: "+cause.Error(), nil)
}

func (f *fakeSaver) seen() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]string(nil), f.calls...)
}

func errorAnswer(id, desc string) string { return string(errorLine([]byte(id), desc)) }

func TestSave(t *testing.T) {
	noSpace := errors.New("write /dev/hvc1: no space left on device")
	type bridge struct {
		*testing.T
		*fakeSaver
		toolstack, qemu *peer
	}
	// toQEMU sends the save with a request after it, which must wait.
	toQEMU := func(b bridge) {
		b.toolstack.send(saveRequest + "\r\n" + `{"execute":"after"}`)
		b.qemu.expect(saveRequest + "\n")
		b.qemu.silent()
	}
	after := func(b bridge) {
		b.qemu.expect("{\"execute\":\"after\"}\n")
		b.qemu.send(`{"return": 1}`)
		b.toolstack.expect("{\"return\": 1}\r\n")
	}
	for _, tt := range []struct {
		name            string
		prepare, commit bool // the call waits for the test
		run             func(bridge)
		calls           []string
		log             string
	}{
		{"good", true, true, func(b bridge) {
			b.toolstack.send(saveRequest + `{"execute":"after"}`)
			b.qemu.silent()
			b.prepare <- nil
			b.qemu.expect(saveRequest + "\n")
			b.qemu.silent()
			b.qemu.send("{\"event\": \"STOP\"}\r\n" + saved)
			time.Sleep(3 * time.Second)
			b.toolstack.silent()
			b.commit <- nil
			b.toolstack.expect(saved)
			after(b)
		}, []string{"prepare", "commit"}, `level=INFO msg="device state saved" session=1 took=3.001s`},
		{"two in a row", false, true, func(b bridge) {
			const cont = `{"execute":"cont"}`
			b.toolstack.send(saveRequest + cont + saveRequest + cont)
			for range 2 {
				b.qemu.expect(saveRequest + "\n")
				b.qemu.silent()
				b.qemu.send(saved)
				b.toolstack.silent()
				b.commit <- nil
				b.toolstack.expect(saved)
				b.qemu.expect(cont + "\n")
				b.qemu.send("{\"return\": {}}\r\n")
				b.toolstack.expect("{\"return\": {}}\r\n")
			}
		}, []string{"prepare", "commit", "prepare", "commit"}, ""},
		{"prepare fails", true, false, func(b bridge) {
			b.toolstack.send(`{"execute":"before"}` + saveRequest + `{"execute":"after"}`)
			b.qemu.expect("{\"execute\":\"before\"}\n")
			b.prepare <- errors.New("add-fd: out of descriptors")
			b.qemu.expect("{\"execute\":\"after\"}\n")
			b.qemu.send(`{"return": 0}{"return": 1}`)
			b.toolstack.expect("{\"return\": 0}\r\n", errorAnswer(`"s"`, "prepare to save the device state: add-fd: out of descriptors"), "{\"return\": 1}\r\n")
		}, []string{"prepare", "abort: prepare to save the device state: add-fd: out of descriptors"}, "device state not saved"},
		{"QEMU fails", false, false, func(b bridge) {
			toQEMU(b)
			const failed = `{"id": "s", "error": {"class": "GenericError", "desc": "no"}}`
			b.qemu.send(failed)
			b.toolstack.expect(failed + "\r\n")
			after(b)
		}, []string{"prepare", `abort: QEMU: {"class": "GenericError", "desc": "no"}`}, ""},
		{"QEMU fails, and the saver knows why", false, false, func(b bridge) {
			b.explain = errors.New("too large: raise stubdomain_memory")
			toQEMU(b)
			b.qemu.send(`{"id": "s", "error": {"class": "GenericError", "desc": "no"}}`)
			b.toolstack.expect(errorAnswer(`"s"`, b.explain.Error()))
			after(b)
		}, []string{"prepare", "abort: too large: raise stubdomain_memory"}, ""},
		{"commit fails", false, true, func(b bridge) {
			toQEMU(b)
			b.qemu.send(saved)
			b.commit <- noSpace
			b.toolstack.expect(errorAnswer(`"s"`, "hand the device state to the toolstack: "+noSpace.Error()))
			after(b)
		}, []string{"prepare", "commit", "abort: hand the device state to the toolstack: " + noSpace.Error()}, ""},
		{"toolstack goes during prepare", true, false, func(b bridge) {
			b.toolstack.send(saveRequest)
			synctest.Wait()
			b.toolstack.Close()
			b.qemu.expectClose()
		}, []string{"prepare", "abort: prepare to save the device state: the toolstack closed the session"}, ""},
		{"toolstack goes before QEMU's answer", false, false, func(b bridge) {
			toQEMU(b)
			b.toolstack.Close()
			b.qemu.expectClose()
		}, []string{"prepare", "abort: the session ended during the save: the toolstack closed the session"}, ""},
		{"toolstack goes during commit", false, true, func(b bridge) {
			toQEMU(b)
			b.qemu.send(saved)
			synctest.Wait()
			b.toolstack.Close()
			b.qemu.expectClose()
		}, []string{"prepare", "commit", "abort: hand the device state to the toolstack: the toolstack closed the session"}, ""},
		{"toolstack goes before it has the answer", false, false, func(b bridge) {
			toQEMU(b)
			b.qemu.send(saved)
			synctest.Wait()
			b.toolstack.Close()
			b.qemu.expectClose()
		}, []string{"prepare", "commit", "abort: the session ended during the save: the toolstack closed the session"}, ""},
		{"QEMU goes before its answer", false, false, func(b bridge) {
			toQEMU(b)
			b.qemu.Close()
			b.toolstack.expect(errorAnswer(`"s"`, "xen-save-devices-state: QEMU closed its monitor"))
			b.toolstack.expectClose()
		}, []string{"prepare", "abort: QEMU closed its monitor"}, ""},
		{"QEMU goes during commit", false, true, func(b bridge) {
			toQEMU(b)
			b.qemu.send(saved)
			synctest.Wait()
			b.qemu.Close()
			synctest.Wait()
			b.commit <- nil
			b.toolstack.expect(saved)
			b.toolstack.expectClose()
		}, []string{"prepare", "commit"}, ""},
		{"QEMU goes, and commit fails for that", false, true, func(b bridge) {
			toQEMU(b)
			b.qemu.send(saved)
			synctest.Wait()
			b.qemu.Close()
			synctest.Wait()
			start := time.Now()
			b.commit <- errQEMUClosed
			b.toolstack.expect(errorAnswer(`"s"`, "hand the device state to the toolstack: QEMU closed its monitor"))
			b.toolstack.expectClose()
			if took := time.Since(start); took != drainLimit { // else libxl would see the end before the error
				b.Errorf("closed after %v, want %v", took, drainLimit)
			}
		}, []string{"prepare", "commit", "abort: hand the device state to the toolstack: QEMU closed its monitor"}, ""},
		{"commit fails, for QEMU goes", false, true, func(b bridge) {
			b.toolstack.send(saveRequest)
			b.qemu.expect(saveRequest + "\n")
			b.qemu.send(saved)
			b.commit <- errQEMUClosed
			b.toolstack.expect(errorAnswer(`"s"`, "hand the device state to the toolstack: QEMU closed its monitor"))
			start := time.Now()
			b.qemu.Close()
			b.toolstack.expectClose()
			if took := time.Since(start); took != drainLimit {
				b.Errorf("closed after %v, want %v", took, drainLimit)
			}
		}, []string{"prepare", "commit", "abort: hand the device state to the toolstack: QEMU closed its monitor"}, ""},
		{"QEMU goes and commit hangs", false, true, func(b bridge) {
			toQEMU(b)
			b.qemu.send(saved)
			synctest.Wait()
			b.qemu.Close()
			if got, err := io.ReadAll(b.toolstack.r); err != nil || strings.Contains(string(got), "return") {
				b.Errorf("got %q, %v, want an error answer or none, and the end", got, err)
			}
		}, []string{"prepare", "commit", "abort: hand the device state to the toolstack: QEMU closed its monitor"}, ""},
		{"to another file", false, false, func(b bridge) {
			other := strings.Replace(saveRequest, "/dev/fdset/1", "/dev/fdset/12", 1)
			b.toolstack.send(other)
			b.qemu.expect(other + "\n")
			b.qemu.send(saved)
			b.toolstack.expect(saved)
		}, nil, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := &fakeSaver{}
			in(t, Options{Save: f}, func(t *testing.T, b *bench) {
				if tt.prepare {
					f.prepare = make(chan error)
				}
				if tt.commit {
					f.commit = make(chan error)
				}
				toolstack, qemu := b.session()
				tt.run(bridge{t, f, toolstack, qemu})
				toolstack.Close()
				synctest.Wait()
				if d := cmp.Diff(tt.calls, f.seen()); d != "" {
					t.Errorf("calls (-want +got):\n%s", d)
				}
				// The bridge is as new.
				f.prepare, f.commit = nil, nil
				toolstack, qemu = b.session()
				toolstack.send(`{"execute":"cont"}`)
				qemu.expect("{\"execute\":\"cont\"}\n")
				qemu.send("{\"return\": {}}\r\n")
				toolstack.expect("{\"return\": {}}\r\n")
				toolstack.send(saveRequest)
				qemu.expect(saveRequest + "\n")
				qemu.send(saved)
				toolstack.expect(saved)
				synctest.Wait()
				b.stop()
				if !strings.Contains(b.log.String(), tt.log) {
					t.Errorf("log has no %q:\n%s", tt.log, b.log)
				}
			})
		})
	}
}

// A defect ends the session that meets it, not the agent: the next one is served.
func TestPanic(t *testing.T) {
	in(t, Options{PCIReady: func(context.Context, string) error { panic("oh no") }}, func(t *testing.T, b *bench) {
		toolstack, qemu := b.session()
		toolstack.send(`{"execute":"device_add","arguments":{"driver":"xen-pci-passthrough","hostaddr":"03:00.0"}}`)
		toolstack.expectClose()
		qemu.expectClose()
		_, qemu = b.session()
		qemu.Close()
		b.stop()
		for _, want := range []string{`level=ERROR msg="a defect of stubinit ends this QMP session`, `panic="oh no"`, "TestPanic", `cause="panic: oh no"`} {
			if !strings.Contains(b.log.String(), want) {
				t.Errorf("log has no %q:\n%s", want, b.log)
			}
		}
	})
	in(t, Options{}, func(t *testing.T, b *bench) {
		ours, theirs := newWire()
		b.ln.conns <- broken{ours}
		newPeer(t, theirs).expectClose()
		b.qemu().expectClose()
		b.session()
	})
}

// broken panics when it is read.
type broken struct{ wireEnd }

func (broken) TryRead([]byte) (int, error) { panic("oh no") }

func TestHold(t *testing.T) {
	const add = `{"execute":"device_add","id":1,"arguments":{"driver":"xen-pci-passthrough","id":"pci-pt-03_00.0","hostaddr":"0000:03:00.0"}}`
	for _, tt := range []struct {
		name, request string
		ready         time.Duration
		err           error
		want          time.Duration
		log           string
	}{
		{"comes", add, 3 * time.Second, nil, 3 * time.Second, `msg="device_add goes to QEMU: its PCI device is there" session=1 hostaddr=0000:03:00.0 waited=3s`},
		{"never comes", add, time.Hour, nil, pciLimit, `msg="device_add goes to QEMU, though its PCI device is not there" session=1 hostaddr=0000:03:00.0 waited=9s err="context deadline exceeded"`},
		{"unknown", add, 0, errors.New("not in xenstore"), 0, `err="not in xenstore"`},
		{"another driver", strings.Replace(add, "xen-pci-passthrough", "usb-tablet", 1), time.Hour, nil, 0, ""},
		{"no hostaddr", `{"execute":"device_add","id":1,"arguments":{"driver":"xen-pci-passthrough"}}`, time.Hour, nil, 0, ""},
		{"odd arguments", `{"execute":"device_add","id":1,"arguments":[]}`, time.Hour, nil, 0, ""},
		{"another command", strings.Replace(add, "device_add", "device_del", 1), time.Hour, nil, 0, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			ready := func(ctx context.Context, hostaddr string) error {
				if hostaddr != "0000:03:00.0" {
					t.Errorf("asked for %q", hostaddr)
				}
				select {
				case <-time.After(tt.ready):
					return tt.err
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			in(t, Options{PCIReady: ready}, func(t *testing.T, b *bench) {
				toolstack, qemu := b.session()
				start := time.Now()
				toolstack.send(tt.request + `{"execute":"query-pci","id":2}`)
				qemu.expect(tt.request + "\n")
				if got := time.Since(start); got != tt.want {
					t.Errorf("held for %v, want %v", got, tt.want)
				}
				qemu.expect("{\"execute\":\"query-pci\",\"id\":2}\n")
				synctest.Wait()
				b.stop()
				if !strings.Contains(b.log.String(), tt.log) {
					t.Errorf("log has no %q:\n%s", tt.log, b.log)
				}
			})
		})
	}
}

// While one session's device_add is held, its end is seen at once.
func TestHoldEnds(t *testing.T) {
	ready := func(ctx context.Context, _ string) error {
		<-ctx.Done()
		return fmt.Errorf("PCI device: %w", context.Cause(ctx))
	}
	for _, who := range []string{"toolstack", "QEMU"} {
		t.Run(who, func(t *testing.T) {
			in(t, Options{PCIReady: ready}, func(t *testing.T, b *bench) {
				toolstack, qemu := b.session()
				start := time.Now()
				toolstack.send(`{"execute":"device_add","arguments":{"driver":"xen-pci-passthrough","hostaddr":"03:00.0"}}`)
				synctest.Wait()
				if who == "QEMU" {
					qemu.Close()
					toolstack.expectClose()
				} else {
					toolstack.Close()
					qemu.expectClose()
				}
				b.session()
				if took := time.Since(start); took != 0 {
					t.Errorf("the next session came after %v", took)
				}
			})
		})
	}
}
