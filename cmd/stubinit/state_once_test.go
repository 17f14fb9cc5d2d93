package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// dom0's file takes one state. Another save is refused before QEMU writes, and QEMU is left stopped: the first may be
// under way.
func TestSaveOnce(t *testing.T) {
	for _, tt := range []struct {
		name    string
		file    bool
		fail    error
		refused bool
	}{
		{"file", true, nil, true},
		{"part of a state in the file", true, unix.EIO, true},
		{"no file", false, nil, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, q, c, log := newSaver(t)
			c.file, c.fail = tt.file, tt.fail
			if err := s.Prepare(t.Context()); err != nil {
				t.Fatal(err)
			}
			q.save(t, everyByte(5000))
			if err := s.Commit(t.Context()); !errors.Is(err, tt.fail) {
				t.Fatalf("Commit: %v, want %v", err, tt.fail)
			}
			q.takeCalls()
			err := s.Prepare(t.Context())
			if refused := errors.Is(err, errSpent); refused != tt.refused || !refused && err != nil {
				t.Fatalf("second Prepare: %v, want refused: %t", err, tt.refused)
			}
			if !tt.refused {
				return
			}
			if err := s.Abort(t.Context(), err); err != nil {
				t.Error(err)
			}
			if calls := q.takeCalls(); slices.Contains(calls, "cont") {
				t.Errorf("QEMU was told %v", calls)
			}
			if !strings.Contains(log.String(), "save refused") {
				t.Errorf("log:\n%s", log)
			}
		})
	}
}

// A state that is as large as the limit allowed is said to be too large; another failure is QEMU's own.
func TestStateTooLarge(t *testing.T) {
	refused := errors.New("QEMU: saving Xen device state failed")
	for size, want := range map[int][]string{
		8191: nil,
		8192: {refused.Error(), "larger than the 8 KiB", "stubdomain_memory"},
	} {
		s, q, _, _ := newSaver(t)
		if err := s.Prepare(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.most = 8192
		q.save(t, everyByte(size))
		err := s.Explain(refused)
		if (err != nil) != (want != nil) {
			t.Errorf("%d bytes: %v", size, err)
		}
		for _, want := range want {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%d bytes: %v, lacks %q", size, err, want)
			}
		}
	}
}

// The limit reaches a process that runs, which gets an error instead of a signal, and is taken back.
func TestStateLimit(t *testing.T) {
	file := filepath.Join(t.TempDir(), "state")
	cmd := exec.Command("sh", "-c", `trap "" XFSZ; for n in 1 2; do read -r line; head -c 100000 /dev/zero >"$1" 2>/dev/null; echo $?; done`, "sh", file)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer in.Close()
	s := &stateSaver{pid: cmd.Process.Pid}
	for _, tt := range []struct {
		limit uint64
		size  int64
		code  string
	}{{4096, 4096, "1\n"}, {unix.RLIM_INFINITY, 100000, "0\n"}} {
		if err := s.setLimit(tt.limit); err != nil {
			t.Fatal(err)
		}
		if _, err := in.Write([]byte("go\n")); err != nil {
			t.Fatal(err)
		}
		code := make([]byte, 2)
		if _, err := out.Read(code); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(file)
		if err != nil || info.Size() != tt.size || string(code) != tt.code {
			t.Errorf("limit %d: %d bytes written, exit code %q, %v; want %d, %q", tt.limit, info.Size(), code, err, tt.size, tt.code)
		}
	}
}
