package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"time"
)

// announceArgs keep QEMU from announcing NICs by itself.
var announceArgs = []string{"-global", "migration.announce-rounds=0"}

// An announcer has QEMU tell the network where a restored guest's NICs are now, which switches must know: by an RARP frame from a NIC's MAC
// address, once a NIC, when its link is up and QEMU runs. QEMU's own announcements come in the first second after it has the state
// (announce-initial, announce-step), and what comes before a vif's backend has connected is lost: the lab saw two of five arrive.
type announcer struct {
	log  *slog.Logger
	up   chan string     // ids of NICs, each once
	told map[string]bool // those that have been sent there
}

// newAnnouncer makes one for so many NICs.
func newAnnouncer(log *slog.Logger, nics int) *announcer {
	return &announcer{log: log, up: make(chan string, nics), told: make(map[string]bool)}
}

// linkUp is for netup.Options.Up.
func (a *announcer) linkUp(nic string) {
	if nic == "" || a.told[nic] {
		return
	}
	a.told[nic] = true
	a.up <- nic
}

// announceLimit bounds the request: QEMU answers it at once, if at all.
const announceLimit = 10 * time.Second

// run announces NICs until ctx ends. QEMU keeps the frame while the guest does not run yet.
func (a *announcer) run(ctx context.Context, qmp interface {
	Execute(ctx context.Context, name string, args any) (json.RawMessage, error)
}) error {
	for {
		select {
		case nic := <-a.up:
			soon, cancel := context.WithTimeout(ctx, announceLimit)
			_, err := qmp.Execute(soon, "announce-self", map[string]any{
				"id": "stubinit-" + nic, "interfaces": []string{nic}, "rounds": 1,
				"initial": 50, "max": 550, "step": 100, // ms between rounds, which must be there
			})
			cancel()
			switch {
			case err == nil:
				a.log.Debug("restored NIC announced", "nic", nic)
			case ctx.Err() == nil:
				a.log.Warn("restored NIC is not announced; switches learn where it is from its first frame", "nic", nic, "err", err)
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
