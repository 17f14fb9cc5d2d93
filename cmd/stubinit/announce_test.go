package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/google/go-cmp/cmp"
)

// A fakeAnnouncer is a QEMU that answers announce-self for all NICs but one.
type fakeAnnouncer struct {
	refuses   string
	announced []string
}

func (f *fakeAnnouncer) Execute(ctx context.Context, name string, args any) (json.RawMessage, error) {
	if _, ok := ctx.Deadline(); !ok {
		return nil, errors.New("no limit")
	}
	a := args.(map[string]any)
	nics := a["interfaces"].([]string)
	f.announced = append(f.announced, fmt.Sprintf("%s %v rounds=%v id=%v", name, nics, a["rounds"], a["id"]))
	if nics[0] == f.refuses {
		return nil, errors.New("refused")
	}
	return json.RawMessage("{}"), nil
}

// Each NIC is announced once, however often its link comes up, and whether that is before QEMU runs or after.
func TestAnnouncer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		a := newAnnouncer(slog.New(slog.NewTextHandler(&log, nil)), 3)
		a.linkUp("")
		a.linkUp("nic1")
		a.linkUp("nic1")
		ctx, cancel := context.WithCancel(t.Context())
		qemu := &fakeAnnouncer{refuses: "nic0"}
		ended := make(chan error, 1)
		go func() { ended <- a.run(ctx, qemu) }()
		synctest.Wait()
		for _, nic := range []string{"nic0", "nic1", "nic2", "nic0"} {
			a.linkUp(nic)
			synctest.Wait()
		}
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("run: %v", err)
		}
		want := []string{
			"announce-self [nic1] rounds=1 id=stubinit-nic1",
			"announce-self [nic0] rounds=1 id=stubinit-nic0",
			"announce-self [nic2] rounds=1 id=stubinit-nic2",
		}
		if d := cmp.Diff(want, qemu.announced); d != "" {
			t.Errorf("announced (-want +got):\n%s", d)
		}
		if s := log.String(); strings.Count(s, "\n") != 1 || !strings.Contains(s, "level=WARN") || !strings.Contains(s, "nic=nic0 err=refused") {
			t.Errorf("log:\n%s", s)
		}
	})
}
