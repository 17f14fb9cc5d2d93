//go:build integration

package main

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/stubinit/stubinit/internal/qemu"
	"github.com/stubinit/stubinit/internal/qmp"
)

// A real QEMU writes its state into fdset 1, more than once while it is stopped, and it comes out whole on console 1.
func TestSaveRealQEMU(t *testing.T) {
	binary, err := qemu.Find()
	if err != nil {
		t.Fatal(err)
	}
	path := t.TempDir() + "/qmp"
	ln, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	cmd := exec.CommandContext(ctx, binary, "-M", "pc", "-accel", "tcg", "-m", "16", "-nodefaults", "-display", "none",
		"-chardev", "socket,id=a,fd=3,server=on,wait=off", "-mon", "chardev=a,mode=control")
	cmd.ExtraFiles = []*os.File{ln}
	cmd.Stderr = t.Output()
	err = cmd.Start()
	ln.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel() // kills it
		cmd.Wait()
	})
	conn, err := dial(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	m := qmp.New(conn)
	t.Cleanup(func() { m.Disconnect() })
	if err := m.ConnectContext(ctx); err != nil {
		t.Fatal(err)
	}
	s, _, c, _ := newSaver(t)
	s.qmp = m // not the fake
	s.log = slog.New(slog.DiscardHandler)
	if err := s.Prepare(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Execute(ctx, "stop", nil); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := s.Prepare(ctx); err != nil {
			t.Fatal(err)
		}
		if _, err := m.Execute(ctx, "xen-save-devices-state", map[string]any{"filename": "/dev/fdset/1", "live": false}); err != nil {
			t.Fatalf("save %d: %v", i, err)
		}
		saved := new(bytes.Buffer)
		if _, err := io.Copy(saved, io.NewSectionReader(s.state, 0, 1<<30)); err != nil {
			t.Fatal(err)
		}
		if err := s.Commit(ctx); err != nil {
			t.Fatalf("save %d: %v", i, err)
		}
		out := c.taken()
		// QEMU_VM_FILE_MAGIC, migration/qemu-file.h.
		if !bytes.HasPrefix(out, []byte("QEVM")) || !bytes.Equal(out, saved.Bytes()) {
			t.Errorf("save %d: %d bytes on console 1, %d saved, start %q", i, len(out), saved.Len(), out[:min(8, len(out))])
		}
	}
	if err := s.Abort(ctx, io.ErrUnexpectedEOF); err != nil {
		t.Errorf("Abort: %v", err)
	}
	if status, err := m.Execute(ctx, "query-status", nil); err != nil || !bytes.Contains(status, []byte(`"running"`)) {
		t.Errorf("after Abort: %s, %v", status, err)
	}
}
