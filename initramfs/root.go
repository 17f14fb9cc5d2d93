package initramfs

import (
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
)

// root is an unpacked package tree. Symbolic links in it are followed inside it, as a chroot would, and never lead out.
type root string

// host is the path on this machine of a path in the tree whose folders are no links.
func (r root) host(p string) string { return filepath.Join(string(r), filepath.FromSlash(p)) }

// link is a symbolic link that was met on the way to a file.
type link struct{ path, target string }

// resolve follows p (absolute in the tree) to the file it means. It returns that file's path, free of links, and the links
// passed, in order.
func (r root) resolve(p string) (real string, links []link, info fs.FileInfo, err error) {
	const most = 40 // as Linux: MAXSYMLINKS
	real = "/"
	for rest := split(p); len(rest) > 0; {
		next := rest[0]
		rest = rest[1:]
		if next == ".." {
			real = path.Dir(real)
			continue
		}
		at := path.Join(real, next)
		info, err := os.Lstat(r.host(at))
		if err != nil {
			return "", nil, nil, err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			real = at
			continue
		}
		if len(links) == most {
			return "", nil, nil, &fs.PathError{Op: "resolve", Path: r.host(p), Err: syscall.ELOOP}
		}
		target, err := os.Readlink(r.host(at))
		if err != nil {
			return "", nil, nil, err
		}
		links = append(links, link{at, target})
		if path.IsAbs(target) {
			real = "/"
		}
		rest = append(split(target), rest...)
	}
	info, err = os.Lstat(r.host(real)) // real may be a folder that ".." led back to
	if err != nil {
		return "", nil, nil, err
	}
	return real, links, info, nil
}

// split cuts a path into its parts, without empty ones and dots.
func split(p string) []string {
	var parts []string
	for part := range strings.SplitSeq(p, "/") {
		if part != "" && part != "." {
			parts = append(parts, part)
		}
	}
	return parts
}

// regular resolves p to a regular file.
func (r root) regular(p string) (real string, links []link, err error) {
	real, links, info, err := r.resolve(p)
	if err != nil {
		return "", nil, err
	}
	if !info.Mode().IsRegular() {
		return "", nil, fmt.Errorf("%s is not a regular file", r.host(real))
	}
	return real, links, nil
}

// read returns the content of the file that p means.
func (r root) read(p string) ([]byte, error) {
	real, _, err := r.regular(p)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(r.host(real))
}
