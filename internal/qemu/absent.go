package qemu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// AbsentPath is where the image builder lists the libraries that a stand-in takes the place of.
const AbsentPath = "/etc/stubinit/absent"

// Absent are the libraries that the image leaves out, by name, each with the reason. QEMU ends when it calls one of them.
type Absent map[string]string

// LoadAbsent reads the builder's list: a library's name, a space and the reason on each line. No list means none.
func LoadAbsent(path string) (Absent, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("absent libraries: %w", err)
	}
	a := Absent{}
	for line := range strings.Lines(string(text)) {
		name, reason, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " ")
		if !ok {
			return nil, fmt.Errorf("absent libraries: %s: %q is not a name and a reason", path, line)
		}
		a[name] = reason
	}
	return a, nil
}

// An AbsentError is an argument for which QEMU calls a library that the image leaves out.
type AbsentError struct {
	Number  int    // of the argument in dm-argv, from 1
	Arg     string // with its option, if it is an option's value
	Library string
	Reason  string // why it is left out
	Instead string // what to do about it in the guest's configuration
}

func (e *AbsentError) Error() string {
	return fmt.Sprintf("dm-argv argument %d: %s needs %s, which this image leaves out: %s", e.Number, e.Arg, e.Library, e.Reason)
}

// calls are the arguments for which QEMU, 7.2 and 10.0, calls a library that it else does not: an option, and what its value
// begins with. libxl (libxl_dm.c) writes qxl-vga for a stubdomain, but passes over spice=1: the others come by device_model_args.
var calls = []struct{ library, option, value, instead string }{
	{"libspice-server.so.1", "-spice", "", noArgument},
	{"libspice-server.so.1", "-device", "qxl", `write vga="stdvga"`}, // renders by it even without -spice
	{"libspice-server.so.1", "-vga", "qxl", `write vga="stdvga"`},
	{"libspice-server.so.1", "-chardev", "spicevmc", noArgument},
}

const noArgument = "take it out of device_model_args_hvm"

// Check looks at dm-argv. Its error is an *AbsentError for the first argument that QEMU could not serve.
func (a Absent) Check(args []string) error {
	for i, arg := range args {
		for _, c := range calls {
			reason, absent := a[c.library]
			if !absent || arg != c.option && arg != "-"+c.option {
				continue
			}
			e := &AbsentError{Number: i + 1, Arg: arg, Library: c.library, Reason: reason, Instead: c.instead}
			if c.value == "" {
				return e
			}
			if i+1 < len(args) && strings.HasPrefix(strings.TrimPrefix(args[i+1], "driver="), c.value) {
				e.Number, e.Arg = i+2, arg+" "+args[i+1]
				return e
			}
		}
	}
	return nil
}
