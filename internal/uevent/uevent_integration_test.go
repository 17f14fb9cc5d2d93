//go:build integration

package uevent

import (
	"context"
	"os"
	"testing"
	"time"
)

// The kernel sends an event on request: "change" written to a device's uevent file.
func TestKernelEvent(t *testing.T) {
	l, err := Listen()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.WriteFile("/sys/devices/virtual/mem/null/uevent", []byte("change"), 0); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for {
		e, err := l.Next(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if e.Action == "change" && e.Vars["DEVNAME"] == "null" && e.Path == "/devices/virtual/mem/null" {
			return
		}
	}
}
