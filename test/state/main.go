// Command state shows that a console brings every byte to a domain that opens it through package consring, as stubinit
// does for the state of a restore. It is both sides:
//
//	state (as /init)                    a PV guest, which reads streams from its channel "stream"
//	state drive -domid N -socket PATH   in dom0: sends them through the guest's channel device, and says what arrived
//
// A channel's backend is the same as that of a stubdomain's consoles: dom0's QEMU.
//
// A third role has nothing to do with streams: as a stubdomain's QEMU it runs the real one, and kills it in the middle
// of a save (killer.go).
package main

import (
	"context"
	"fmt"
	"os"

	"github.com/stubinit/stubinit/test/standin"
)

func main() {
	var err error
	switch {
	case os.Args[0] == standin.Place:
		err = killer()
	case os.Getpid() == 1:
		guest()
	case len(os.Args) > 1 && os.Args[1] == "drive":
		err = drive(context.Background(), os.Args[2:], os.Stdout)
	default:
		err = fmt.Errorf("usage: state drive -domid N -socket PATH [-rounds N] [-bytes N]")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "state:", err)
		os.Exit(1)
	}
}
