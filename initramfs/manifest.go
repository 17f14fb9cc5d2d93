package initramfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

// A Manifest says what goes into an image, one directive a line:
//
//	package NAME...                 Debian packages that the tree is made of (for the one who fetches them)
//	qemu PATH                       the device model: a program, whose abilities are recorded in /etc/stubinit/qemu.json
//	program PATH                    an ELF file with its interpreter and every library it needs
//	library NAME                    a library that a program opens by itself, with what it needs
//	absent NAME REASON...           a library that programs need and never call: a stand-in takes its place, whose functions
//	                                say that, with the reason, and end the process; what only it needs is left out
//	firmware-path DIR...            where firmware is searched, in QEMU's order
//	firmware NAME                   a file below the first of these folders that has it
//	file PATH                       one file as it is
//	module NAME [PARAMETER=VALUE]…  a kernel module after the modules it depends on; nothing if it is built in
//	dir PATH MODE                   an empty folder
//	node PATH MODE c|b MAJOR MINOR  a device node
//	link PATH TARGET                a symbolic link
//
// A question mark after qemu, program, library, firmware, file or module (firmware? NAME) lets the thing be absent. Empty
// lines and lines that begin with # are skipped. MODE is octal.
type Manifest struct {
	name  string
	lines []line
}

type line struct {
	number    int
	directive string
	optional  bool
	args      []string
}

// arity is the least and the greatest number of arguments of each directive; -1 is any number.
var arity = map[string][2]int{
	"package": {1, -1}, "firmware-path": {1, -1}, "module": {1, -1},
	"qemu": {1, 1}, "program": {1, 1}, "library": {1, 1}, "absent": {2, -1}, "firmware": {1, 1}, "file": {1, 1},
	"dir": {2, 2}, "link": {2, 2}, "node": {5, 5},
}

// ParseManifest reads a manifest; name is what errors and listings call it. The error names every bad line.
func ParseManifest(r io.Reader, name string) (*Manifest, error) {
	m := &Manifest{name: name}
	var errs []error
	scanner := bufio.NewScanner(r)
	for n := 1; scanner.Scan(); n++ {
		text := strings.TrimSpace(scanner.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		words := strings.Fields(text)
		l := line{number: n, args: words[1:]}
		l.directive, l.optional = strings.CutSuffix(words[0], "?")
		if err := l.check(); err != nil {
			errs = append(errs, fmt.Errorf("%s:%d: %w", name, n, err))
			continue
		}
		m.lines = append(m.lines, l)
	}
	if err := scanner.Err(); err != nil {
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return m, nil
}

func (l line) check() error {
	count, ok := arity[l.directive]
	if !ok {
		return fmt.Errorf("%q is no directive", l.directive)
	}
	if len(l.args) < count[0] || count[1] >= 0 && len(l.args) > count[1] {
		return fmt.Errorf("%s: %d arguments", l.directive, len(l.args))
	}
	if l.optional && !slices.Contains([]string{"qemu", "program", "library", "firmware", "file", "module"}, l.directive) {
		return fmt.Errorf("%s cannot be optional", l.directive)
	}
	switch l.directive {
	case "qemu", "program", "file", "dir", "node", "link", "firmware-path":
		paths := l.args[:1]
		if l.directive == "firmware-path" {
			paths = l.args
		}
		for _, p := range paths {
			if !path.IsAbs(p) || path.Clean(p) != p || p == "/" {
				return fmt.Errorf("%s: path %q is not absolute and clean", l.directive, p)
			}
		}
	case "library", "absent":
		if strings.Contains(l.args[0], "/") {
			return fmt.Errorf("%s: %q is a path: want a name such as libgcc_s.so.1", l.directive, l.args[0])
		}
	case "firmware":
		if !fs.ValidPath(l.args[0]) {
			return fmt.Errorf("firmware: %q is not a relative path", l.args[0])
		}
	}
	switch l.directive {
	case "dir":
		_, err := parseMode(l.args[1])
		return err
	case "node":
		_, err := l.node()
		return err
	}
	return nil
}

// node is the entry that a node directive asks for.
func (l line) node() (Entry, error) {
	mode, err := parseMode(l.args[1])
	if err != nil {
		return Entry{}, err
	}
	switch l.args[2] {
	case "c":
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case "b":
		mode |= fs.ModeDevice
	default:
		return Entry{}, fmt.Errorf("node: type %q is neither c nor b", l.args[2])
	}
	major, err := strconv.ParseUint(l.args[3], 10, 12)
	if err != nil {
		return Entry{}, fmt.Errorf("node: major: %w", err)
	}
	minor, err := strconv.ParseUint(l.args[4], 10, 20)
	if err != nil {
		return Entry{}, fmt.Errorf("node: minor: %w", err)
	}
	return Entry{Path: l.args[0], Mode: mode, Major: uint32(major), Minor: uint32(minor)}, nil
}

// parseMode reads permission bits as chmod takes them.
func parseMode(s string) (fs.FileMode, error) {
	n, err := strconv.ParseUint(s, 8, 12)
	if err != nil {
		return 0, fmt.Errorf("mode %q is not octal, 7777 at most", s)
	}
	mode := fs.FileMode(n & 0o777)
	for bit, flag := range map[uint64]fs.FileMode{0o4000: fs.ModeSetuid, 0o2000: fs.ModeSetgid, 0o1000: fs.ModeSticky} {
		if n&bit != 0 {
			mode |= flag
		}
	}
	return mode, nil
}

// Packages returns the Debian packages that the manifest names, in its order.
func (m *Manifest) Packages() []string {
	var packages []string
	for _, l := range m.lines {
		if l.directive == "package" {
			packages = append(packages, l.args...)
		}
	}
	return packages
}

// why is what a listing prints as the reason of what the line brought in.
func (m *Manifest) why(l line) string {
	return fmt.Sprintf("%s:%d %s %s", m.name, l.number, l.directive, l.args[0])
}
