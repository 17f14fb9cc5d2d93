package qemu

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// FeaturesPath is where the image builder leaves a Features file in the initrd.
const FeaturesPath = "/etc/stubinit/qemu.json"

// Features is what the image builder found out about its QEMU, so that a boot need not start QEMU twice. The zero value is a QEMU of which nothing is known.
type Features struct {
	Version          string `json:"version"`                // "10.0.2"
	TracePlatformLog bool   `json:"trace_xen_platform_log"` // has the trace event for the guest drivers' log port, 0x12
	Sandbox          bool   `json:"sandbox"`                // built with seccomp: -sandbox is accepted
}

// Args are the optional arguments that this QEMU takes, for Spec.Extra: the trace of the guest drivers' log lines goes to QEMU's stderr.
func (f Features) Args() []string {
	if f.TracePlatformLog {
		return []string{"-trace", "xen_platform_log"}
	}
	return nil
}

// LoadFeatures reads a Features file. A missing one is no error and gives the zero value.
func LoadFeatures(path string) (Features, error) {
	var f Features
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, nil
	}
	if err != nil {
		return f, fmt.Errorf("qemu features: %w", err)
	}
	if err := json.Unmarshal(b, &f); err != nil {
		return Features{}, fmt.Errorf("qemu features: %s: %w", path, err)
	}
	return f, nil
}

// noSandbox is what a QEMU without seccomp says to -sandbox.
var noSandbox = []byte("-sandbox support is not enabled")

// ProbeBinary finds out Features for the builder. run starts the QEMU in question with args and returns its standard output and error, together, and
// an error if it could not be started or did not exit with 0. No machine is started.
func ProbeBinary(ctx context.Context, run func(ctx context.Context, args ...string) ([]byte, error)) (Features, error) {
	out, err := run(ctx, "-version")
	if err != nil {
		return Features{}, fmt.Errorf("qemu probe: -version: %w: %s", err, lastLine(out))
	}
	f := Features{Version: version(out)}
	if f.Version == "" {
		return Features{}, fmt.Errorf("qemu probe: -version: no version in %q", lastLine(out))
	}

	// Arguments are looked at in order, and -version ends QEMU: -sandbox before it is refused or accepted without a machine.
	out, err = run(ctx, "-sandbox", "on", "-version")
	if err != nil && !bytes.Contains(out, noSandbox) {
		return Features{}, fmt.Errorf("qemu probe: -sandbox on: %w: %s", err, lastLine(out))
	}
	f.Sandbox = err == nil

	out, err = run(ctx, "-trace", "help")
	if err != nil {
		return Features{}, fmt.Errorf("qemu probe: -trace help: %w: %s", err, lastLine(out))
	}
	for line := range bytes.Lines(out) {
		f.TracePlatformLog = f.TracePlatformLog || string(bytes.TrimRight(line, "\r\n")) == "xen_platform_log"
	}
	return f, nil
}

// version is the number, with at least one dot, that -version prints after these words; without one it is empty. Not a regular expression,
// which would be all that PID 1 needs that package for.
func version(out []byte) string {
	for line := range bytes.Lines(out) {
		number, ok := bytes.CutPrefix(line, []byte("QEMU emulator version "))
		if !ok {
			continue
		}
		end := bytes.IndexFunc(number, func(r rune) bool { return r != '.' && (r < '0' || r > '9') })
		if end < 0 {
			end = len(number)
		}
		if number := bytes.TrimRight(number[:end], "."); bytes.IndexByte(number, '.') > 0 {
			return string(number)
		}
	}
	return ""
}

func lastLine(out []byte) []byte {
	out = bytes.TrimSpace(out)
	return out[bytes.LastIndexByte(out, '\n')+1:]
}
