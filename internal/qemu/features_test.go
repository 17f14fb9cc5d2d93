package qemu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func recorded(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "probe", name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var errExit = errors.New("exit status 1")

func TestProbeBinary(t *testing.T) {
	version := recorded(t, "version")
	refused := recorded(t, "sandbox-refused")
	type answer struct {
		out []byte
		err error
	}
	tests := []struct {
		name                    string
		version, sandbox, trace answer
		want                    Features
		err                     string
	}{
		{"Debian's QEMU for Xen", answer{version, nil}, answer{refused, errExit}, answer{recorded(t, "trace-xen"), nil}, Features{Version: "7.2.22", TracePlatformLog: true}, ""},
		{"Debian's QEMU", answer{version, nil}, answer{version, nil}, answer{recorded(t, "trace-x86"), nil}, Features{Version: "7.2.22", Sandbox: true}, ""},
		{"no such file", answer{nil, os.ErrNotExist}, answer{}, answer{}, Features{}, "qemu probe: -version: file does not exist"},
		{"not QEMU", answer{[]byte("hello\n"), nil}, answer{}, answer{}, Features{}, `no version in "hello"`},
		{"no dot", answer{[]byte("QEMU emulator version 10\n"), nil}, answer{}, answer{}, Features{}, `no version in "QEMU emulator version 10"`},
		{"nothing after it", answer{[]byte("a\nQEMU emulator version 10.0.13"), nil}, answer{version, nil}, answer{[]byte("xen_platform_log2\r\nxen_platform_log\r\n"), nil}, Features{Version: "10.0.13", TracePlatformLog: true, Sandbox: true}, ""},
		{"crash", answer{version, nil}, answer{[]byte("a\nSegmentation fault\n"), errExit}, answer{}, Features{}, "-sandbox on: exit status 1: Segmentation fault"},
		{"no trace", answer{version, nil}, answer{refused, errExit}, answer{[]byte("no\n"), errExit}, Features{}, "-trace help: exit status 1: no"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			answers := map[string]answer{"-version": tt.version, "-sandbox on -version": tt.sandbox, "-trace help": tt.trace}
			got, err := ProbeBinary(t.Context(), func(_ context.Context, args ...string) ([]byte, error) {
				a, ok := answers[strings.Join(args, " ")]
				if !ok {
					t.Errorf("QEMU run with %q", args)
				}
				return a.out, a.err
			})
			if diff := cmp.Diff(tt.want, got); diff != "" && err == nil {
				t.Error(diff)
			}
			switch {
			case tt.err == "" && err != nil:
				t.Error(err)
			case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
				t.Errorf("error is %v, want %q", err, tt.err)
			}
		})
	}
}

func TestLoadFeatures(t *testing.T) {
	path := filepath.Join(t.TempDir(), "qemu.json")
	got, err := LoadFeatures(path)
	if err != nil || got != (Features{}) || got.Args() != nil {
		t.Errorf("no file: %+v, %v", got, err)
	}
	if err := os.WriteFile(path, []byte(`{"version": "10.0.2", "trace_xen_platform_log": true, "sandbox": true}`), 0o644); err != nil {
		t.Fatal(err)
	}
	got, err = LoadFeatures(path)
	if diff := cmp.Diff(Features{"10.0.2", true, true}, got); diff != "" || err != nil {
		t.Errorf("%v %s", err, diff)
	}
	if diff := cmp.Diff([]string{"-trace", "xen_platform_log"}, got.Args()); diff != "" {
		t.Error(diff)
	}
	if err := os.WriteFile(path, []byte(`{"version": 1}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err = LoadFeatures(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("bad file: %v", err)
	}
	if _, err = LoadFeatures(filepath.Dir(path)); err == nil {
		t.Error("a folder was read")
	}
}
