// Command lab boots the nested lab, and in it one guest whose device model runs in a stubdomain with stubinit.
//
// It says what it sees pass, and ends with a table of times and PASS or FAIL. With -shell it gives a shell in dom0 instead.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/stubinit/stubinit/test/lab"
)

func main() {
	var o options
	flag.StringVar(&o.suite, "suite", "trixie", "Debian `suite` of hypervisor, dom0 and image: trixie or bookworm")
	flag.StringVar(&o.image, "image", "", "`folder` with qemu-stubdom-linux-kernel and -rootfs (default build/SUITE)")
	flag.BoolVar(&o.icount, "icount", false, "let clocks count instructions: steady times, half the speed")
	flag.BoolVar(&o.shell, "shell", false, "give a shell in dom0; /root/guest.cfg is ready for xl create")
	flag.IntVar(&o.memory, "memory", 192, "stubdomain_memory in `MiB`")
	flag.StringVar(&o.cmdline, "cmdline", "", "`words` to add to the stubdomain's kernel command line")
	flag.DurationVar(&o.limit, "limit", 10*time.Minute, "stop after this `time`; -shell has none")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, o)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "lab:", err)
	}
	if !o.shell {
		fmt.Println(map[bool]string{true: "PASS", false: "FAIL"}[err == nil])
	}
	if err != nil {
		os.Exit(1)
	}
}

type options struct {
	suite, image, cmdline string
	icount, shell         bool
	memory                int
	limit                 time.Duration
}

func run(ctx context.Context, o options) (err error) {
	if !o.shell {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("the limit of %s is over", o.limit))
		defer cancel()
	}
	payload, err := lab.Artifacts(o.suite, o.image)
	if err != nil {
		return err
	}
	name := "run"
	if o.shell {
		name = "shell"
	}
	// Building and booting is not worth more than the limit; the lab itself must live to have its logs fetched.
	l, err := lab.Start(ctx, lab.Options{Suite: o.suite, Name: name, Icount: o.icount, Payload: payload, Progress: os.Stdout})
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, l.Close())
		fmt.Printf("lab: logs are in %s\n", l.Dir)
	}()
	g, err := l.NewGuest(ctx, lab.GuestConfig{
		Name:    "guest",
		Disks:   []lab.Disk{{VDev: "hda", File: lab.GuestImage}},
		VIFs:    []string{"mac=00:16:3e:00:00:01,model=e1000,bridge=xenbr0"},
		Stubdom: &lab.Stubdom{Memory: o.memory, Cmdline: strings.TrimSpace(lab.DefaultCmdline + " " + o.cmdline)},
		Progress: func(s lab.Stage) {
			fmt.Printf("lab: %7.2f s: %s\n", s.At.Seconds(), s.What)
		},
	})
	if err != nil {
		return err
	}
	if o.shell {
		return shell(ctx, l)
	}
	if err := try(ctx, l, g); err != nil {
		return fmt.Errorf("%w\n%s", err, g.Tails(25))
	}
	return nil
}

// try is what must work: the guest starts, talks, answers the toolstack, and leaves nothing behind.
func try(ctx context.Context, l *lab.Lab, g *lab.Guest) error {
	if err := g.Create(ctx); err != nil {
		return err
	}
	ready, err := g.Serial.Expect(ctx, `^stubinit-guest ready.*$`)
	if err != nil {
		return err
	}
	readyAt, err := l.Uptime(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("lab: %7.2f s: guest on its serial port: %s\n", readyAt.Seconds(), strings.TrimSpace(ready[0]))
	state, err := g.State(ctx)
	if err != nil {
		return err
	}
	if state != "running" {
		return fmt.Errorf("device-model/%d/state is %q: want running", g.ID, state)
	}
	answer, err := g.QMP(ctx, `{"execute":"query-status"}`)
	if err != nil {
		return err
	}
	fmt.Printf("lab: QMP through dom0's proxy: query-status: %s\n", answer[0])
	if !strings.Contains(string(answer[0]), `"running": true`) {
		return fmt.Errorf("query-status says %s: want running", answer[0])
	}
	console := g.Stub.Text()
	if err := g.Destroy(ctx); err != nil {
		return err
	}
	left, err := l.Leftovers(ctx)
	if err != nil {
		return err
	}
	if left != nil {
		return fmt.Errorf("left behind in dom0: %s", strings.Join(left, "; "))
	}
	fmt.Printf("lab: destroyed, nothing is left in dom0\n\n")
	table(l, g, console, readyAt)
	return nil
}

// stepLine is what stubinit logs at the end of each of its steps.
var stepLine = regexp.MustCompile(`(?m)^stubinit +([0-9.]+) .*\bstep done\b.*\bstep=(\S+).*\btook=(\S+)`)

func table(l *lab.Lab, g *lab.Guest, console string, ready time.Duration) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	row := func(columns ...any) {
		text := make([]string, len(columns))
		for i, c := range columns {
			if d, ok := c.(time.Duration); ok {
				c = fmt.Sprintf("%.2f s", d.Seconds())
			}
			text[i] = fmt.Sprint(c)
		}
		fmt.Fprintln(w, strings.Join(text, "\t"))
	}
	row("PHASE", "AT", "TOOK", "CLOCK")
	row("dom0 takes commands", l.Ready, l.Ready, "this machine, from the start of QEMU")
	began := g.Stages[0].At
	last := began
	for _, s := range g.Stages {
		row(s.What, s.At-began, s.At-last, "dom0, from xl create")
		last = s.At
	}
	row("guest's first line seen", ready-began, ready-last, "dom0, from xl create")
	for _, m := range stepLine.FindAllStringSubmatch(console, -1) {
		row("stubinit: "+m[2], m[1]+" s", m[3], "stubdomain, from its kernel's start")
	}
	w.Flush()
}

// shell gives a terminal in dom0.
func shell(ctx context.Context, l *lab.Lab) error {
	fmt.Printf("lab: a shell in dom0; exit ends the lab. xl create /root/guest.cfg starts the guest, its stubdomain's console is\n"+
		"     /var/log/xen/qemu-dm-guest.log. Logs of the run: %s\n", filepath.Join(l.Dir))
	rows, columns, restore, err := rawTerminal(int(os.Stdin.Fd()))
	if err != nil {
		return err
	}
	defer restore()
	err = l.Interact(ctx, os.Stdin, os.Stdout, rows, columns)
	var exit *lab.ExitError
	if errors.As(err, &exit) {
		return nil // the shell's last command failed; the lab did not
	}
	return err
}
