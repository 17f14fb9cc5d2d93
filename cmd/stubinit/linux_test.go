package main

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestNeededDevices(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		want []string
	}{
		{"none", []string{"-nographic", "-serial", "pty", ""}, nil},
		{"disk", []string{"-drive", "file=/dev/xvda,if=ide,index=0,media=disk,format=host_device,cache=writeback"}, []string{"/dev/xvda"}},
		{"end of the argument", []string{"if=ide,file=/dev/xvdb"}, []string{"/dev/xvdb"}},
		{"serial port", []string{"-serial", "/dev/hvc3", "-serial", "/dev/hvc10"}, []string{"/dev/hvc3", "/dev/hvc10"}},
		{"in order, once", []string{"file=/dev/xvdb", "file=/dev/xvda,file=/dev/xvdb", "/dev/hvc3"}, []string{"/dev/xvdb", "/dev/xvda", "/dev/hvc3"}},
		{"partition, many disks", []string{"file=/dev/xvda1,x", "file=/dev/xvdaa"}, []string{"/dev/xvda1", "/dev/xvdaa"}},
		{"other devices", []string{"/dev/null", "/dev/net/tun", "/dev/fdset/1", "/dev/", "/dev/sda", "/DEV/xvda"}, nil},
		{"not in the guest's name", []string{"-name", "/dev/xvda", "-serial", "/dev/hvc3"}, []string{"/dev/hvc3"}},
		{"a folder before it", []string{"file=/dev//dev/xvdc"}, []string{"/dev/xvdc"}},
		{"a double comma escapes", []string{"file=/dev/xvda,,b"}, []string{"/dev/xvda"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if d := cmp.Diff(tt.want, neededDevices(tt.args)); d != "" {
				t.Errorf("devices (-want +got):\n%s", d)
			}
		})
	}
}

func TestDeviceReady(t *testing.T) {
	file := t.TempDir() + "/xvda"
	write(t, file, "no block device")
	for path, want := range map[string]bool{"/dev/hvc0": true, "/dev/hvc9999": false, file: false, "/dev/null": false, "/dev/xvdzzz": false} {
		if got := deviceReady(path); got != want {
			t.Errorf("deviceReady(%s) = %v, want %v", path, got, want)
		}
	}
}

// A device that does not come is named with the state of its backend.
func TestWaitDevices(t *testing.T) {
	a := newTestAgent(t)
	a.logTo(t)
	a.cfg = &config{vbds: []int{51712, 268435456 + 2000<<8, 268435456 + 2001<<8, 268435456 + 2002<<8}}
	a.xs = storeOf(t, map[string]string{
		"/local/domain/6/device/vbd/268947456/backend":  "/local/domain/0/backend/vbd/6/268947456",
		"/local/domain/0/backend/vbd/6/268947456/state": "2",
		"/local/domain/6/device/vbd/268947712/backend":  "/local/domain/0/backend/vbd/6/268947712",
		"/local/domain/6/device/vbd/268947968/state":    "1",
	}).Dial(testSelf)
	if err := a.waitDevices(t.Context(), []string{"/dev/hvc0"}); err != nil {
		t.Errorf("a device that is there: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err := a.waitDevices(ctx, []string{"/dev/hvc0", "/dev/xvdbxy", "/dev/xvdbxz", "/dev/xvdbya", "/dev/xvdzzz", "/dev/hvc9999"})
	if err == nil {
		t.Fatal("devices that cannot be there have come")
	}
	line := (&stepError{"devices", err}).Error()
	for _, want := range []string{
		"FATAL devices: no /dev/xvdbxy (/local/domain/0/backend/vbd/6/268947456 is in state 2)",
		"/dev/xvdbxz (xenstore", "/local/domain/0/backend/vbd/6/268947712/state",
		"/dev/xvdbya (xenstore", "device/vbd/268947968/backend",
		"/dev/xvdzzz (not in xenstore)",
		"/dev/hvc9999 (xenstore", "device/console/9999/backend",
		"the backend in dom0 did not connect",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("error lacks %q:\n%s", want, line)
		}
	}
	if strings.Contains(line, "/dev/hvc0") {
		t.Errorf("names a device that is there:\n%s", line)
	}
}

func TestCheckXenDevices(t *testing.T) {
	root := t.TempDir()
	for i, d := range xenDevices {
		err := checkXenDevices(root)
		if err == nil {
			t.Fatalf("%s is missing, and no error", d.path)
		}
		for j, other := range xenDevices {
			named := strings.Contains(err.Error(), other.path+" (module "+other.module+")")
			if named != (j >= i) {
				t.Errorf("error %q: %s named: %v", err, other.path, named)
			}
		}
		write(t, root+d.path, "")
	}
	if err := checkXenDevices(root); err != nil {
		t.Errorf("all are there: %v", err)
	}
}

// The mount points come in an order in which each is there, and no tmpfs can take all memory.
func TestMounts(t *testing.T) {
	for _, m := range mounts {
		if strings.HasSuffix(m.fstype, "tmpfs") && !strings.Contains(m.data, "size=") {
			t.Errorf("%s on %s has no limit", m.fstype, m.target)
		}
		if m.target[0] != '/' || strings.Count(m.target, "/") != 1 {
			t.Errorf("%s is mounted below another mount point", m.target)
		}
	}
}

func TestParseMeminfo(t *testing.T) {
	for _, tt := range []struct {
		name, in         string
		total, available int
		err              string
	}{
		{"Linux 6.12", "MemTotal:         123456 kB\nMemFree:           60000 kB\nMemAvailable:      78901 kB\nBuffers: 1 kB\n", 123456, 78901, ""},
		{"no unit, short lines", "\nx\nMemAvailable: 2\nMemTotal: 3", 3, 2, ""},
		{"first one counts", "MemTotal: 1 kB\nMemTotal: 2 kB\nMemAvailable: 3 kB", 1, 3, ""},
		{"no MemAvailable", "MemTotal: 1 kB\n", 0, 0, "/proc/meminfo has no MemTotal or MemAvailable"},
		{"empty", "", 0, 0, "/proc/meminfo has no MemTotal or MemAvailable"},
		{"no number", "MemTotal: much kB\nMemAvailable: 1 kB", 0, 0, `/proc/meminfo: "MemTotal: much kB"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			total, available, err := parseMeminfo(strings.NewReader(tt.in))
			if tt.err != "" {
				if err == nil || err.Error() != tt.err {
					t.Errorf("error %v, want %s", err, tt.err)
				}
				return
			}
			if total != tt.total || available != tt.available || err != nil {
				t.Errorf("%d, %d, %v, want %d, %d", total, available, err, tt.total, tt.available)
			}
		})
	}
	t.Run("this kernel's", func(t *testing.T) {
		f, err := os.Open("/proc/meminfo")
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if total, available, err := parseMeminfo(f); err != nil || available <= 0 || total < available {
			t.Errorf("total %d, available %d, %v", total, available, err)
		}
	})
}

// A disk that the toolstack detaches is missed, once; a CD-ROM's is not.
func TestFollowDisks(t *testing.T) {
	a := newTestAgent(t)
	log := a.logTo(t)
	s := storeOf(t, libxlNodes())
	const dir = "/local/domain/6/device/vbd/"
	s.Set(dir+"5632/device-type", "cdrom")
	a.xs, a.cfg = s.Dial(testSelf), libxlConfig()
	disks, err := a.fixedDisks(t.Context())
	if err != nil || !slices.Equal(disks, []int{768, 832}) {
		t.Fatalf("fixed disks: %v, %v", disks, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- a.followDisks(t.Context(), disks) }()
	s.Remove(dir + "5632")
	s.Remove(dir + "832")
	log.await(t, "devid=832 disk=xvdb")
	s.Remove(dir + "768")
	log.await(t, "devid=768 disk=xvda")
	s.Hangup(testSelf)
	if err := <-ended; err == nil {
		t.Error("no error from a xenstore that has hung up")
	}
	if n := strings.Count(log.String(), "was detached"); n != 2 {
		t.Errorf("%d lines, want 2:\n%s", n, log)
	}
}
