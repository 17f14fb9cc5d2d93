package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// script is a guest that answers each line as told.
func script(t *testing.T, banner string, answers map[string]string) *Console {
	t.Helper()
	ours, theirs := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer theirs.Close()
		fmt.Fprint(theirs, banner)
		for scan := bufio.NewScanner(theirs); scan.Scan(); {
			answer, ok := answers[scan.Text()]
			if !ok {
				return
			}
			fmt.Fprint(theirs, answer)
		}
	}()
	c := NewConsole(ours)
	t.Cleanup(func() { c.Close(); <-done })
	return c
}

func TestConsole(t *testing.T) {
	c := script(t, "\x00\r\nstubinit-guest ready boot=1 id=0\r\n", map[string]string{
		"ata 0 read 1 2": "tick 7\r\nok ata sectors=2 crc=00ff00ff ms=0\r\n",
		"cd 2 size":      "err cd size key=2 asc=3a ascq=00\r\n",
		"echo":           "ok echo\r\n",
	})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if line, next, err := c.Wait(ctx, 0, "stubinit-guest ready"); err != nil || next != 1 || !strings.HasSuffix(line, "id=0") {
		t.Fatalf("banner: %q, %d, %v", line, next, err)
	}

	got, err := c.Command(ctx, "ata 0 read 1 2")
	if err != nil {
		t.Fatal(err)
	}
	want := Reply{"ok ata sectors=2 crc=00ff00ff ms=0", map[string]string{"sectors": "2", "crc": "00ff00ff", "ms": "0"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("reply (-want +got):\n%s", diff)
	}

	var refused *Refused
	if _, err := c.Command(ctx, "cd 2 size"); !errors.As(err, &refused) || refused.Fields["asc"] != "3a" {
		t.Errorf("a refused command: %v", err)
	}
	if _, err := c.Command(ctx, "echo"); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{
		"stubinit-guest ready boot=1 id=0", "tick 7", "ok ata sectors=2 crc=00ff00ff ms=0", "err cd size key=2 asc=3a ascq=00", "ok echo",
	}, c.Lines()); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}

	// A guest that is gone, and one that does not answer.
	if _, err := c.Command(ctx, "unknown to the script"); !errors.Is(err, io.EOF) {
		t.Errorf("after the end of the port: %v", err)
	}
	silent := script(t, "", map[string]string{"info": ""})
	short, cancelShort := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancelShort()
	if _, err := silent.Command(short, "info"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("without an answer: %v", err)
	}
}
