package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func report() *Report {
	return &Report{Suite: "trixie", Flavours: []*Result{
		{Name: "baseline", Title: "shell", KernelBytes: 10e6, InitrdBytes: 20e6, InitSeconds: 9, QEMUSeconds: 11, AnswerSeconds: 14, CreateSeconds: 20, LeastMiB: 190},
		{Name: "debian", Title: "default", KernelBytes: 10e6, InitrdBytes: 15e6, InitSeconds: 9, QEMUSeconds: 9.5, AnswerSeconds: 12},
		{Name: "small", Title: "small", KernelBytes: 2e6, InitrdBytes: 4e6, InitSeconds: 1, QEMUSeconds: 1.05, AnswerSeconds: 2, CreateSeconds: 4, LeastMiB: 48},
		{Name: "floor", Title: "floor", Floor: true, InitSeconds: 0.5},
	}, Scale: &Scale{Guests: 8, Creating: 4, MemoryMiB: 48, DomainMiB: 50, Dom0KiB: 2048, OneSeconds: 4, AllSeconds: 24}}
}

func TestMarkdown(t *testing.T) {
	got := report().markdown()
	for _, want := range []string{
		"|  | shell | default | small | floor |\n| --- | --- | --- | --- | --- |\n",
		"| → QEMU executed (s) | 11.00 | 9.50 | 1.05 |  |\n",
		"| PID 1 → QEMU executed | 0.250 | ≤ 0.25 | 0.025 | ≤ 0.05 |\n",
		"| stubdomain start → first QMP answer | 0.857 (missed) | ≤ 0.80 | 0.143 | ≤ 0.15 |\n",
		"| `xl create`, warm dom0 |  | ≤ 0.80 | 0.200 | ≤ 0.25 |\n",
		"| kernel + initrd, packed | 0.833 | ≤ 0.85 | 0.200 | ≤ 0.22 |\n",
		"| smallest stubdomain_memory |  | ≤ 0.75 | 0.253 (missed) | ≤ 0.25 |\n",
		"## 8 guests, created 4 at a time,", "0.75 of 8 × one.", "a host of 100 guests pays 5.1 GiB",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("lacks %q:\n%s", want, got)
		}
	}
}

func TestWrite(t *testing.T) {
	dir := t.TempDir()
	if err := report().write(dir); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(dir, "trixie.json"))
	if err != nil {
		t.Fatal(err)
	}
	var got Report
	if err := json.Unmarshal(text, &got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(report(), &got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestKeep(t *testing.T) {
	dir := t.TempDir()
	sizes := func() *Report {
		r := report()
		r.Scale = nil
		for i, f := range r.Flavours {
			r.Flavours[i] = &Result{Name: f.Name, Title: f.Title, Floor: f.Floor, KernelBytes: f.KernelBytes, InitrdBytes: f.InitrdBytes}
		}
		return r
	}
	got := sizes()
	if err := got.keep(dir); err != nil {
		t.Fatalf("no file: %v", err)
	}
	if diff := cmp.Diff(sizes(), got); diff != "" {
		t.Errorf("no file (-want +got):\n%s", diff)
	}
	if err := report().write(dir); err != nil {
		t.Fatal(err)
	}
	if err := got.keep(dir); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(report(), got); diff != "" {
		t.Errorf("same sizes (-want +got):\n%s", diff)
	}
	got = sizes()
	got.Flavours[2].InitrdBytes++
	if err := got.keep(dir); err != nil || got.Flavours[0].CreateSeconds != 0 || got.Scale != nil {
		t.Errorf("another size: error %v, kept %+v", err, got.Flavours[0])
	}
	if err := os.WriteFile(filepath.Join(dir, "trixie.json"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := sizes().keep(dir); err == nil || !strings.Contains(err.Error(), "trixie.json") {
		t.Errorf("damaged: error %v", err)
	}
}
