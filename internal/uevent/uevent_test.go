package uevent

import (
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     Event
		ok       bool
	}{
		{
			"add", "add@/devices/vbd-51712/block/xvda\x00ACTION=add\x00DEVPATH=/devices/vbd-51712/block/xvda\x00SUBSYSTEM=block\x00DEVNAME=xvda\x00EMPTY=\x00",
			Event{"add", "/devices/vbd-51712/block/xvda", map[string]string{"ACTION": "add", "DEVPATH": "/devices/vbd-51712/block/xvda", "SUBSYSTEM": "block", "DEVNAME": "xvda", "EMPTY": ""}}, true,
		},
		{"no variables", "remove@/x", Event{"remove", "/x", map[string]string{}}, true},
		{"udevd's", "libudev\x00\xfe\xed\xca\xfe", Event{}, false},
		{"empty", "", Event{}, false},
		{"no action", "@/x\x00", Event{}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, ok := Parse([]byte(tt.in))
			if d := cmp.Diff(tt.want, got); d != "" || ok != tt.ok {
				t.Errorf("ok %v, want %v; event (-want +got):\n%s", ok, tt.ok, d)
			}
		})
	}
}

func TestWaits(t *testing.T) {
	l, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := l.Until(ctx, func() bool { return false }); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Until past its limit: %v", err)
	}
	if err := l.Until(ctx, func() bool { return true }); err != nil {
		t.Errorf("Until of what is already true: %v", err)
	}
	ended := make(chan error)
	go func() {
		for {
			if _, err := l.Next(context.Background()); err != nil {
				ended <- err
				return
			}
		}
	}()
	l.Close()
	if err := <-ended; !errors.Is(err, os.ErrClosed) {
		t.Errorf("Next of a closed listener: %v", err)
	}
}
