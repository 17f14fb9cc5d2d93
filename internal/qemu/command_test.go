package qemu

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// files are never opened here: only their identity counts.
var incoming, bridge, agent, save, cdrom = new(os.File), new(os.File), new(os.File), new(os.File), new(os.File)

var ours = []string{
	"-chardev", "socket,id=stubinit-bridge,fd=3,server=on,wait=off", "-mon", "chardev=stubinit-bridge,mode=control",
	"-chardev", "socket,id=stubinit-agent,fd=4,server=on,wait=off", "-mon", "chardev=stubinit-agent,mode=control",
}

func TestNewCommand(t *testing.T) {
	tests := []struct {
		name  string
		spec  Spec
		want  []string
		files []*os.File
	}{
		{
			name:  "plain",
			spec:  Spec{Binary: "/bin/qemu", Args: []string{"-xen-domid", "7"}, Bridge: bridge, Agent: agent},
			want:  append([]string{"/bin/qemu", "-xen-domid", "7"}, ours...),
			files: []*os.File{bridge, agent},
		},
		{
			name: "byte for byte",
			spec: Spec{Binary: "/q", Bridge: bridge, Agent: agent, Args: []string{
				"-name", "a guest's \"name\", with; $(things) & `more`\t\n\\", "", " ", "\x01\x80\xff", "$STUBDOM_RESTORE_INCOMING_ARG2", "x$STUBDOM_RESTORE_INCOMING_ARG", "fd:$STUBDOM_RESTORE_INCOMING_ARG",
			}},
			want: append([]string{
				"/q", "-name", "a guest's \"name\", with; $(things) & `more`\t\n\\", "", " ", "\x01\x80\xff", "$STUBDOM_RESTORE_INCOMING_ARG2", "x$STUBDOM_RESTORE_INCOMING_ARG", "fd:$STUBDOM_RESTORE_INCOMING_ARG",
			}, ours...),
			files: []*os.File{bridge, agent},
		},
		{
			name: "everything",
			spec: Spec{
				Binary: "/q", Args: []string{"-incoming", RestoreArg, "-m", "128"}, Incoming: incoming, Bridge: bridge, Agent: agent,
				FDSets: []FDSet{{Set: 1, File: save}, {Set: 20, Opaque: "stub-devid:5632,a=b,,", File: cdrom}},
				Extra:  []string{"-trace", "xen_platform_log"},
			},
			want: []string{
				"/q", "-incoming", "fd:3", "-m", "128",
				"-chardev", "socket,id=stubinit-bridge,fd=4,server=on,wait=off", "-mon", "chardev=stubinit-bridge,mode=control",
				"-chardev", "socket,id=stubinit-agent,fd=5,server=on,wait=off", "-mon", "chardev=stubinit-agent,mode=control",
				"-add-fd", "fd=6,set=1", "-add-fd", "fd=7,set=20,opaque=stub-devid:5632,,a=b,,,,",
				"-trace", "xen_platform_log",
			},
			files: []*os.File{incoming, bridge, agent, save, cdrom},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c, err := NewCommand(tt.spec)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, c.Argv); diff != "" || c.Path != tt.spec.Binary {
				t.Errorf("path %q, argv: %s", c.Path, diff)
			}
			if len(c.Files) != len(tt.files) {
				t.Fatalf("%d files, want %d", len(c.Files), len(tt.files))
			}
			for i := range c.Files {
				if c.Files[i] != tt.files[i] {
					t.Errorf("descriptor %d is another file", 3+i)
				}
			}
		})
	}
}

func TestNewCommandRefuses(t *testing.T) {
	good := func() Spec { return Spec{Binary: "/q", Args: []string{"-S"}, Bridge: bridge, Agent: agent} }
	tests := []struct {
		name   string
		change func(*Spec)
		want   string
	}{
		{"no binary", func(s *Spec) { s.Binary = "" }, "no path of QEMU"},
		{"empty dm-argv", func(s *Spec) { s.Args = nil }, "dm-argv is empty"},
		{"NUL", func(s *Spec) { s.Args = []string{"a", "b\x00c"} }, `argument 2 of 2 has a NUL byte: "b\x00c"`},
		{"no state", func(s *Spec) { s.Args = []string{"-incoming", RestoreArg} }, "argument 2 is $STUBDOM_RESTORE_INCOMING_ARG but there is no state"},
		{"state for nobody", func(s *Spec) { s.Incoming = incoming }, "dm-argv has no $STUBDOM_RESTORE_INCOMING_ARG"},
		{"two restores", func(s *Spec) { s.Incoming = incoming; s.Args = []string{RestoreArg, RestoreArg} }, "argument 2 is $STUBDOM_RESTORE_INCOMING_ARG for the second time"},
		{"no bridge", func(s *Spec) { s.Bridge = nil }, "no listening socket for stubinit-bridge"},
		{"no agent", func(s *Spec) { s.Agent = nil }, "no listening socket for stubinit-agent"},
		{"fdset without file", func(s *Spec) { s.FDSets = []FDSet{{Set: 1}} }, "fdset 1"},
		{"fdset number", func(s *Spec) { s.FDSets = []FDSet{{Set: -1, File: save}} }, "fdset -1"},
		{"opaque with NUL", func(s *Spec) { s.FDSets = []FDSet{{Opaque: "\x00", File: save}} }, `opaque "\x00"`},
		{"extra with NUL", func(s *Spec) { s.Extra = []string{"\x00"} }, "extra argument 1 has a NUL byte"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := good()
			tt.change(&s)
			_, err := NewCommand(s)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q", err, tt.want)
			}
		})
	}
}

func TestIsRestore(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want bool
	}{
		{nil, false},
		{[]string{"-incoming", RestoreArg}, true},
		{[]string{"-incoming", "defer", "x" + RestoreArg, RestoreArg + " "}, false},
	} {
		if got := IsRestore(tt.args); got != tt.want {
			t.Errorf("IsRestore(%q) is %v", tt.args, got)
		}
	}
}

// FuzzNewCommand takes dm-argv as lines: every argument keeps its bytes and its place, and the numbers in the command line are those of the files.
func FuzzNewCommand(f *testing.F) {
	f.Add("-incoming\n$STUBDOM_RESTORE_INCOMING_ARG", "stub-devid:5632")
	f.Fuzz(func(t *testing.T, lines, opaque string) {
		spec := Spec{Binary: "/q", Bridge: bridge, Agent: agent, FDSets: []FDSet{{Set: 3, Opaque: opaque, File: cdrom}}}
		if lines != "" {
			spec.Args = strings.Split(lines, "\n")
		}
		if IsRestore(spec.Args) {
			spec.Incoming = incoming
		}
		restores := 0
		for _, arg := range spec.Args {
			if arg == RestoreArg {
				restores++
			}
		}
		bad := lines == "" || strings.Contains(lines+opaque, "\x00") || restores > 1
		c, err := NewCommand(spec)
		if bad != (err != nil) {
			t.Fatalf("error is %v", err)
		}
		if err != nil {
			return
		}
		for i, arg := range spec.Args {
			if arg == RestoreArg {
				arg = "fd:3"
			}
			if c.Argv[1+i] != arg {
				t.Errorf("argument %d is %q, want %q", i+1, c.Argv[1+i], arg)
			}
		}
		// As QEMU reads it: two commas are one.
		prefix := "fd=" + strconv.Itoa(firstFile+len(c.Files)-1) + ",set=3"
		if opaque != "" {
			prefix += ",opaque="
		}
		value, ok := strings.CutPrefix(c.Argv[len(c.Argv)-1], prefix)
		if !ok || strings.ReplaceAll(value, ",,", ",") != opaque || strings.Count(value, ",") != 2*strings.Count(opaque, ",") {
			t.Errorf("-add-fd %q for opaque %q", c.Argv[len(c.Argv)-1], opaque)
		}
		if c.Files[len(c.Files)-1] != cdrom {
			t.Error("the last descriptor is not the fdset's")
		}
	})
}
