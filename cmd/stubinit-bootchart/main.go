// Stubinit-bootchart draws the boot of a stubdomain from its console's log: an SVG with one row a step, the kernel's and QEMU's
// starts included. Two logs are drawn side by side on one scale of time.
package main

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/stubinit/stubinit/internal/bootlog"
)

const usage = `usage: stubinit-bootchart [flags] LOG [LOG]

LOG is what dom0 has of the stubdomain's console 0: /var/log/xen/qemu-dm-NAME.log.

`

func main() { os.Exit(bootchart(os.Args[1:], os.Stdout, os.Stderr)) }

// bootchart returns the exit code: 2 for a bad command line, 1 for a failure.
func bootchart(args []string, stdout, stderr io.Writer) int {
	flags := flag.NewFlagSet("stubinit-bootchart", flag.ContinueOnError)
	flags.SetOutput(stderr)
	out := flags.String("o", "", "`file` for the picture (default: standard output)")
	titles := flags.String("titles", "", "`names` of the logs, separated by commas (default: their files' names)")
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	names := strings.Split(*titles, ",")
	if n := flags.NArg(); n < 1 || n > 2 || *titles != "" && len(names) != n {
		flags.Usage()
		return 2
	}
	if err := run(flags.Args(), names, *titles != "", *out, stdout); err != nil {
		fmt.Fprintf(stderr, "stubinit-bootchart: %v\n", err)
		return 1
	}
	return 0
}

func run(files, names []string, named bool, out string, stdout io.Writer) error {
	var panels []panel
	for i, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		log, err := bootlog.Parse(string(text))
		if err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		title := filepath.Base(file)
		if named {
			title = strings.TrimSpace(names[i])
		}
		panels = append(panels, panel{title, log})
	}
	picture := draw(panels)
	if out == "" {
		_, err := stdout.Write(picture)
		return err
	}
	return os.WriteFile(out, picture, 0o644)
}

// A panel is one log's part of the picture.
type panel struct {
	title string
	log   *bootlog.Log
}

// row is a bar with its name.
type row struct {
	name, class string
	start, end  time.Duration
}

// rows are the kernel, each step, and QEMU's own start, which goes on beside the steps after it was executed.
func (p panel) rows() []row {
	rows := []row{{"kernel", "kernel", 0, p.log.Init}}
	for _, s := range p.log.Steps {
		rows = append(rows, row{s.Name, "step", s.Start, s.End})
		if s.Name == "qemu" && p.log.QEMU != 0 && p.log.Running != 0 {
			rows = append(rows, row{"QEMU starts", "qemu", p.log.QEMU, p.log.Running})
		}
	}
	return rows
}

// Sizes in pixels.
const (
	margin    = 16
	labels    = 90 // of the rows
	barsWidth = 420
	textRoom  = 70 // for the time behind the longest bar
	rowHeight = 20
	head      = 44 // title and axis
	width     = labels + barsWidth + textRoom
)

// draw makes the picture. The same logs give the same bytes.
func draw(panels []panel) []byte {
	var end time.Duration
	most := 0
	for _, p := range panels {
		end = max(end, p.log.End())
		most = max(most, len(p.rows()))
	}
	tick := tickFor(end)
	x := func(t time.Duration) float64 { return float64(barsWidth) * float64(t) / float64(end) }
	total := 2*margin + len(panels)*width + (len(panels)-1)*margin
	height := 2*margin + head + most*rowHeight
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">
<style>.kernel{fill:#9aa0a6}.step{fill:#1a73e8}.qemu{fill:#e8710a}.grid{stroke:#dadce0}.minor{fill:#5f6368}</style>
<rect width="100%%" height="100%%" fill="#fff"/>
`, total, height, total, height)
	for i, p := range panels {
		fmt.Fprintf(&b, `<g transform="translate(%d,%d)">`+"\n", margin+i*(width+margin), margin)
		fmt.Fprintf(&b, `<text x="0" y="12" font-weight="bold">%s: %s</text>`+"\n", escape(p.title), seconds(p.log.End()))
		rows := p.rows()
		for t := time.Duration(0); t <= end; t += tick {
			fmt.Fprintf(&b, `<line class="grid" x1="%.1f" x2="%.1f" y1="%d" y2="%d"/><text class="minor" x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n",
				labels+x(t), labels+x(t), head-8, head+most*rowHeight, labels+x(t), head-12, seconds(t))
		}
		for n, r := range rows {
			y := head + n*rowHeight
			w := max(x(r.end)-x(r.start), 1) // a step of a microsecond is seen too
			fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text>`, labels-6, y+14, escape(r.name))
			fmt.Fprintf(&b, `<rect class="%s" x="%.1f" y="%d" width="%.1f" height="%d"/>`, r.class, labels+x(r.start), y+3, w, rowHeight-6)
			fmt.Fprintf(&b, `<text class="minor" x="%.1f" y="%d">%s</text>`+"\n", labels+x(r.start)+w+4, y+14, seconds(r.end-r.start))
		}
		b.WriteString("</g>\n")
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

// tickFor is a round step of the axis that gives four to ten lines.
func tickFor(end time.Duration) time.Duration {
	tick := time.Millisecond
	for i := 0; end > 9*tick; i++ {
		tick = tick * []time.Duration{2, 25, 2}[i%3] / []time.Duration{1, 10, 1}[i%3] // 1, 2, 5, 10
	}
	return tick
}

// seconds has no more digits than tell something.
func seconds(d time.Duration) string {
	switch {
	case d == 0:
		return "0"
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.2g ms", float64(d.Microseconds())/1000)
	case d < time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.3g s", d.Seconds())
}

func escape(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes everything
	return b.String()
}
