// Package qemu turns the toolstack's arguments into QEMU's command line, starts QEMU as a child of PID 1, and says how it ended.
package qemu

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// RestoreArg is the argument that libxl puts in dm-argv, after -incoming, in place of the descriptor with the guest's saved state
// (libxl_dm.c; stubdom-protocol.txt). No other argument, nor a part of one, means a restore.
const RestoreArg = "$STUBDOM_RESTORE_INCOMING_ARG"

// firstFile is the descriptor number of the first of Command.Files in QEMU; 0, 1 and 2 are the standard ones.
const firstFile = 3

// Spec is what a command line is made from.
type Spec struct {
	Binary string   // path of QEMU
	Args   []string // dm-argv in the order of its nodes; the program's name is not in it

	// Incoming is the state to restore from. It must be there if and only if Args has RestoreArg.
	Incoming *os.File
	// Bridge and Agent are listening Unix sockets: QEMU serves a QMP monitor on each, the toolstack's and our own.
	Bridge, Agent *os.File
	// FDSets exist from QEMU's start on.
	FDSets []FDSet
	// Extra goes to the end of the command line.
	Extra []string
}

// FDSet is one descriptor of a QEMU fdset, as -add-fd makes it.
type FDSet struct {
	Set    int    // number of the set: /dev/fdset/<Set>
	Opaque string // what query-fdsets shows for the descriptor; may be empty
	File   *os.File
}

// Command is a program to start. Nothing in Argv goes through a shell.
type Command struct {
	Path  string
	Argv  []string   // with the program's name first
	Files []*os.File // Files[i] becomes descriptor 3+i
	// Confine takes from the program what QEMU does not need of root's rights (confine_linux.go): the kernel's log, addresses and code are
	// out of its reach.
	Confine bool
}

// IsRestore tells whether args wait for incoming state.
func IsRestore(args []string) bool {
	for _, arg := range args {
		if arg == RestoreArg {
			return true
		}
	}
	return false
}

// NewCommand makes QEMU's command line: the toolstack's arguments byte for byte, RestoreArg replaced, then ours.
func NewCommand(s Spec) (*Command, error) {
	if s.Binary == "" {
		return nil, fmt.Errorf("qemu command: no path of QEMU")
	}
	if len(s.Args) == 0 {
		return nil, fmt.Errorf("qemu command: dm-argv is empty")
	}
	c := &Command{Path: s.Binary, Argv: []string{s.Binary}, Confine: true}
	pass := func(f *os.File) string {
		c.Files = append(c.Files, f)
		return strconv.Itoa(firstFile + len(c.Files) - 1)
	}

	restores := 0
	for i, arg := range s.Args {
		switch {
		case strings.IndexByte(arg, 0) >= 0:
			return nil, fmt.Errorf("qemu command: dm-argv argument %d of %d has a NUL byte: %q", i+1, len(s.Args), arg)
		case arg == RestoreArg && s.Incoming == nil:
			return nil, fmt.Errorf("qemu command: dm-argv argument %d is %s but there is no state to restore from", i+1, RestoreArg)
		case arg == RestoreArg:
			restores++
			if restores > 1 {
				return nil, fmt.Errorf("qemu command: dm-argv argument %d is %s for the second time", i+1, RestoreArg)
			}
			arg = "fd:" + pass(s.Incoming)
		}
		c.Argv = append(c.Argv, arg)
	}
	if s.Incoming != nil && restores == 0 {
		return nil, fmt.Errorf("qemu command: there is a state to restore from but dm-argv has no %s", RestoreArg)
	}

	for _, mon := range []struct {
		id     string
		listen *os.File
	}{{"stubinit-bridge", s.Bridge}, {"stubinit-agent", s.Agent}} {
		if mon.listen == nil {
			return nil, fmt.Errorf("qemu command: no listening socket for %s", mon.id)
		}
		c.Argv = append(c.Argv,
			"-chardev", "socket,id="+mon.id+",fd="+pass(mon.listen)+",server=on,wait=off",
			"-mon", "chardev="+mon.id+",mode=control")
	}
	for _, set := range s.FDSets {
		if set.Set < 0 || set.File == nil || strings.IndexByte(set.Opaque, 0) >= 0 {
			return nil, fmt.Errorf("qemu command: fdset %d (opaque %q) needs a number from 0, a descriptor, and an opaque without NUL", set.Set, set.Opaque)
		}
		arg := "fd=" + pass(set.File) + ",set=" + strconv.Itoa(set.Set)
		if set.Opaque != "" {
			// QemuOpts: a comma in a value is written twice.
			arg += ",opaque=" + strings.ReplaceAll(set.Opaque, ",", ",,")
		}
		c.Argv = append(c.Argv, "-add-fd", arg)
	}
	for i, arg := range s.Extra {
		if strings.IndexByte(arg, 0) >= 0 {
			return nil, fmt.Errorf("qemu command: extra argument %d has a NUL byte: %q", i+1, arg)
		}
		c.Argv = append(c.Argv, arg)
	}
	return c, nil
}
