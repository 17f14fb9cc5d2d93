package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// GuestImage is the test guest's disk in dom0, when Artifacts is the payload.
const GuestImage = "/root/guest.img"

// StubdomDir is where libxl looks for the stubdomain's kernel and initrd.
func (s Suite) StubdomDir() string { return "/usr/lib/xen-" + s.Xen + "/boot" }

// Artifacts returns the payload of what this project builds for a suite: the stubdomain's kernel and initrd at libxl's
// default places, and the test guest. imageDir holds the first two; empty means build/SUITE.
func Artifacts(suite, imageDir string) (map[string]string, error) {
	s, err := FindSuite(suite)
	if err != nil {
		return nil, err
	}
	if imageDir == "" {
		imageDir = filepath.Join(Top(), "build", suite)
	}
	const kernel, rootfs = "qemu-stubdom-linux-kernel", "qemu-stubdom-linux-rootfs"
	payload := map[string]string{
		s.StubdomDir() + "/" + kernel: filepath.Join(imageDir, kernel),
		s.StubdomDir() + "/" + rootfs: filepath.Join(imageDir, rootfs),
		GuestImage:                    filepath.Join(Top(), "build", "guest.img"),
	}
	for _, file := range payload {
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s is missing: run make initrd guest SUITE=%s first", file, suite)
		} else if err != nil {
			return nil, err
		}
	}
	return payload, nil
}
