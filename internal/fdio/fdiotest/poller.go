// Package fdiotest has what tests of users of package fdio share.
package fdiotest

import (
	"testing"

	"github.com/stubinit/stubinit/internal/fdio"
)

// NewPoller gives a Poller that somebody waits in until the test's end.
func NewPoller(t testing.TB) *fdio.Poller {
	t.Helper()
	p, err := fdio.NewPoller()
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for p.Wait() == nil {
		}
	}()
	t.Cleanup(func() {
		p.Interrupt()
		<-done
		p.Close()
	})
	return p
}
