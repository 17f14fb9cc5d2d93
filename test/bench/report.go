package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A Result is what one flavour came to. Zero is a figure that was not measured. Seconds are emulated ones.
type Result struct {
	Name  string `json:"name"`
	Title string `json:"title"`
	Floor bool   `json:"floor,omitempty"`

	KernelBytes   int64 `json:"kernel_bytes"`
	InitrdBytes   int64 `json:"initrd_bytes"`   // packed
	UnpackedBytes int64 `json:"unpacked_bytes"` // of the initrd

	// From the start of the stubdomain's kernel.
	InitSeconds    float64 `json:"init_seconds"`              // PID 1 began
	QEMUSeconds    float64 `json:"qemu_seconds,omitempty"`    // QEMU was executed
	RunningSeconds float64 `json:"running_seconds,omitempty"` // the toolstack was told that QEMU runs
	AnswerSeconds  float64 `json:"answer_seconds,omitempty"`  // QEMU answered libxl

	CreateSeconds float64 `json:"create_seconds,omitempty"` // xl create in all, in a dom0 that has done it before
	UsedMiB       int     `json:"used_mib,omitempty"`       // stubdomain_memory less MemAvailable, after the boot
	AgentKiB      int     `json:"agent_kib,omitempty"`      // PID 1's resident memory
	QEMUKiB       int     `json:"qemu_kib,omitempty"`       // QEMU's
	QEMUFaults    int     `json:"qemu_faults,omitempty"`    // page faults of QEMU's start
	LeastMiB      int     `json:"least_mib,omitempty"`      // the least stubdomain_memory that boots a guest with disk, CD and NIC
}

// Packed is kernel and initrd, as they lie on dom0's disk.
func (r *Result) Packed() int64 { return r.KernelBytes + r.InitrdBytes }

// A Scale is what several guests at once came to.
type Scale struct {
	Guests     int     `json:"guests"`
	Creating   int     `json:"creating"` // how many of them at a time
	MemoryMiB  int     `json:"stubdomain_memory_mib"`
	DomainMiB  int     `json:"domain_mib"`  // the largest stubdomain as Xen counts it
	Dom0KiB    int     `json:"dom0_kib"`    // what a stubdomain's QEMU and proxy in dom0 take (proportional set size)
	OneSeconds float64 `json:"one_seconds"` // xl create of one alone
	AllSeconds float64 `json:"all_seconds"` // from the first's begin to the last's end
}

// A Report is all figures of one run. The first flavour is the baseline.
type Report struct {
	Suite    string    `json:"suite"`
	Flavours []*Result `json:"flavours"`
	Scale    *Scale    `json:"scale,omitempty"`
}

// keep takes over what an earlier run measured of images of the same sizes, for the parts that this run does not measure.
func (r *Report) keep(dir string) error {
	text, err := os.ReadFile(filepath.Join(dir, r.Suite+".json"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var old Report
	if err := json.Unmarshal(text, &old); err != nil {
		return fmt.Errorf("%s.json in %s: %w", r.Suite, dir, err)
	}
	if !slices.EqualFunc(r.Flavours, old.Flavours, func(a, b *Result) bool {
		return a.Name == b.Name && a.KernelBytes == b.KernelBytes && a.InitrdBytes == b.InitrdBytes && a.UnpackedBytes == b.UnpackedBytes
	}) {
		return nil
	}
	for i, f := range old.Flavours {
		*r.Flavours[i] = *f
	}
	r.Scale = old.Scale
	return nil
}

func (r *Report) write(dir string) error {
	text, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, r.Suite+".json"), append(text, '\n'), 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, r.Suite+".md"), []byte(r.markdown()), 0o644)
}

// A goal is a ratio to the baseline that a flavour is to reach.
type goal struct {
	what  string
	value func(*Result) float64
	most  map[string]float64 // by flavour
}

var goals = []goal{
	{"PID 1 → QEMU executed", func(r *Result) float64 { return r.QEMUSeconds - r.InitSeconds }, map[string]float64{"debian": 0.25, "small": 0.05}},
	{"stubdomain start → first QMP answer", func(r *Result) float64 { return r.AnswerSeconds }, map[string]float64{"debian": 0.8, "small": 0.15}},
	{"`xl create`, warm dom0", func(r *Result) float64 { return r.CreateSeconds }, map[string]float64{"debian": 0.8, "small": 0.25}},
	{"kernel + initrd, packed", func(r *Result) float64 { return float64(r.Packed()) }, map[string]float64{"debian": 0.85, "small": 0.22}},
	{"smallest stubdomain_memory", func(r *Result) float64 { return float64(r.LeastMiB) }, map[string]float64{"debian": 0.75, "small": 0.25}},
}

func (r *Report) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# What a stubdomain costs (%s)\n\nMade by `make bench` in the lab, whose clocks count instructions: seconds are emulated ones, and the same on any machine.\n\n", r.Suite)
	cell := func(format string, v float64) string {
		if v == 0 {
			return ""
		}
		return fmt.Sprintf(format, v)
	}
	row := func(cells ...string) { fmt.Fprintf(&b, "| %s |\n", strings.Join(cells, " | ")) }
	header := []string{""}
	for _, f := range r.Flavours {
		header = append(header, f.Title)
	}
	row(header...)
	row(strings.Split(strings.Repeat("--- ", len(header)-1)+"---", " ")...)
	for _, line := range []struct {
		what, format string
		value        func(*Result) float64
	}{
		{"kernel, packed (MB)", "%.2f", func(r *Result) float64 { return float64(r.KernelBytes) / 1e6 }},
		{"initrd, packed (MB)", "%.2f", func(r *Result) float64 { return float64(r.InitrdBytes) / 1e6 }},
		{"initrd, unpacked (MB)", "%.2f", func(r *Result) float64 { return float64(r.UnpackedBytes) / 1e6 }},
		{"kernel's start → PID 1 (s)", "%.2f", func(r *Result) float64 { return r.InitSeconds }},
		{"→ QEMU executed (s)", "%.2f", func(r *Result) float64 { return r.QEMUSeconds }},
		{"→ `running` (s)", "%.2f", func(r *Result) float64 { return r.RunningSeconds }},
		{"→ first QMP answer (s)", "%.2f", func(r *Result) float64 { return r.AnswerSeconds }},
		{"`xl create` in all (s)", "%.2f", func(r *Result) float64 { return r.CreateSeconds }},
		{"memory used after boot (MiB)", "%.0f", func(r *Result) float64 { return float64(r.UsedMiB) }},
		{"PID 1 resident (KiB)", "%.0f", func(r *Result) float64 { return float64(r.AgentKiB) }},
		{"QEMU resident (KiB)", "%.0f", func(r *Result) float64 { return float64(r.QEMUKiB) }},
		{"page faults of QEMU's start", "%.0f", func(r *Result) float64 { return float64(r.QEMUFaults) }},
		{"smallest stubdomain_memory (MiB)", "%.0f", func(r *Result) float64 { return float64(r.LeastMiB) }},
	} {
		cells := []string{line.what}
		for _, f := range r.Flavours {
			cells = append(cells, cell(line.format, line.value(f)))
		}
		row(cells...)
	}

	b.WriteString("\n## Against the shell script\n\n")
	row("", "default", "goal", "small", "goal")
	row("---", "---", "---", "---", "---")
	for _, g := range goals {
		cells := []string{g.what}
		for _, name := range []string{"debian", "small"} {
			cells = append(cells, r.ratio(g, name), fmt.Sprintf("≤ %.2f", g.most[name]))
		}
		row(cells...)
	}
	if s := r.Scale; s != nil {
		fmt.Fprintf(&b, "\n## %d guests, created %d at a time, small image, stubdomain_memory = %d\n\n", s.Guests, s.Creating, s.MemoryMiB)
		fmt.Fprintf(&b, "`xl create` of all: %.1f s, of one alone %.1f s: %.2f of %d × one. ", s.AllSeconds, s.OneSeconds, s.AllSeconds/(s.OneSeconds*float64(s.Guests)), s.Guests)
		fmt.Fprintf(&b, "A stubdomain takes %d MiB as Xen counts it, and %.1f MiB in dom0 for its consoles' QEMU and its QMP proxy: ", s.DomainMiB, float64(s.Dom0KiB)/1024)
		fmt.Fprintf(&b, "a host of 100 guests pays %.1f GiB.\n", 100*(float64(s.DomainMiB)+float64(s.Dom0KiB)/1024)/1024)
	}
	return b.String()
}

// ratio is a flavour's figure to the baseline's, with a word if the goal is missed.
func (r *Report) ratio(g goal, name string) string {
	base := g.value(r.Flavours[0])
	for _, f := range r.Flavours {
		if v := g.value(f); f.Name == name && v != 0 && base != 0 {
			ratio := v / base
			if ratio > g.most[name] {
				return fmt.Sprintf("%.3f (missed)", ratio)
			}
			return fmt.Sprintf("%.3f", ratio)
		}
	}
	return ""
}
