//go:build lab

package e2e

import (
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/stubinit/stubinit/initramfs"
	"github.com/stubinit/stubinit/test/lab"
)

// The least stubdomain_memory that mkinitramfs prints is enough, and at most 15 % more than what is needed. libxl adds the
// guest's video RAM to it: these guests have none.
func TestLeastMemory(t *testing.T) {
	tmpfs, ramfs, err := initramfs.ReportedLeast(filepath.Dir(rootfs(t)))
	if err != nil {
		t.Fatal(err)
	}
	for _, variant := range []struct {
		name, cmdline string
		printed       int
	}{
		{"tmpfs", lab.DefaultCmdline, tmpfs},
		{"ramfs", lab.DefaultCmdline + " rootfstype=ramfs", ramfs},
	} {
		printed := variant.printed
		starts := func(t *testing.T, mib int) bool {
			ctx := limit(t, 3*time.Minute)
			cfg := config("least")
			cfg.Stubdom.Memory, cfg.Stubdom.Cmdline = mib, variant.cmdline
			cfg.Extra = append(cfg.Extra, `vga="none"`)
			g, err := tryCreate(t, ctx, cfg)
			if err != nil {
				t.Logf("%d MiB: %v", mib, err)
				return false
			}
			ready(t, ctx, g)
			if strings.Contains(g.Stub.Text(), "Out of memory") {
				t.Errorf("%d MiB: out of memory:\n%s", mib, g.Stub.Tail(20))
			}
			return true
		}
		t.Run(variant.name+"/as printed", func(t *testing.T) {
			if !starts(t, printed) {
				t.Errorf("does not start with the %d MiB that mkinitramfs prints", printed)
			}
		})
		if !*soak {
			t.Run(variant.name+"/15 % less", func(t *testing.T) {
				if less := printed * 100 / 115; starts(t, less) {
					t.Errorf("starts with %d MiB too: the %d that mkinitramfs prints are more than 15 %% too much", less, printed)
				}
			})
			continue
		}
		t.Run(variant.name+"/bisection", func(t *testing.T) {
			fails, good := printed/2, printed
			for good-fails > 2 {
				mib := (good + fails) / 2
				t.Run(strconv.Itoa(mib), func(t *testing.T) {
					if starts(t, mib) {
						good = mib
					} else {
						fails = mib
					}
				})
			}
			t.Logf("%s: starts with %d MiB, fails with %d, mkinitramfs prints %d: %+.1f %%", variant.name, good, fails, printed,
				100*float64(printed-good)/float64(good))
			if printed < good || float64(printed) > 1.15*float64(good) {
				t.Errorf("what mkinitramfs prints is not within 15 %%")
			}
		})
	}
}
