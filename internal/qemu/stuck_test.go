package qemu

import (
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
)

func file(text string) *fstest.MapFile { return &fstest.MapFile{Data: []byte(text)} }

func TestStuckReport(t *testing.T) {
	full := fstest.MapFS{
		"12/status": file("Name:\tqemu-system-i38\nState:\tD (disk sleep)\nTracerPid:\t0\nVmPeak:\t  99 kB\nVmHWM:\t  81000 kB\nVmRSS:\t   80000 kB\n" +
			"VmSwap:\t       0 kB\nThreads:\t3\nSigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n"),
		"12/stack":         file("[<0>] xenbus_switch_state+0x12/0x30\n[<0>] do_syscall_64+0x55/0xb0\n"),
		"12/task/12/stat":  file("12 (qemu) (a b)) D 1 12 12 0 -1"),
		"12/task/12/wchan": file("xenbus_switch_state"),
		"12/task/13/stat":  file("13 (CPU 0/KVM) R 1"),
		"12/task/13/wchan": file("0"),
		"12/task/9/stat":   file("broken"),
		"12/task/x/stat":   file("not a thread"),
	}
	many := fstest.MapFS{"1/status": file("State:\tS (sleeping)\n"), "1/stack": file(strings.Repeat("[<0>] f\n", 30))}
	var manyThreads []string
	for i := range 20 {
		many[fmt.Sprintf("1/task/%d/stat", i+1)] = file("1 (q) S 1")
		if i < stuckThreads {
			manyThreads = append(manyThreads, fmt.Sprintf(`thread %d "q": state S, wchan: open 1/task/%d/wchan: file does not exist`, i+1, i+1))
		}
	}
	var manyFrames []string
	for range stuckFrames {
		manyFrames = append(manyFrames, "stack: f")
	}
	tests := []struct {
		name string
		proc fs.FS
		pid  int
		want []string
	}{
		{"full", full, 12, []string{
			"process 12: State=D (disk sleep) TracerPid=0 VmHWM=81000 kB VmRSS=80000 kB VmSwap=0 kB Threads=3 SigPnd=0000000000000000 ShdPnd=0000000000000100",
			`thread 12 "qemu) (a b)": state D, waits in xenbus_switch_state`,
			`thread 9: stat is "broken"`,
			`thread 13 "CPU 0/KVM": state R`,
			"stack: xenbus_switch_state+0x12/0x30",
			"stack: do_syscall_64+0x55/0xb0",
		}},
		{"many", many, 1, append(append(append([]string{"process 1: State=S (sleeping)"}, manyThreads...), "and 4 more threads"), append(manyFrames, "stack: and 6 more frames")...)},
		{"gone", fstest.MapFS{}, 5, []string{
			"process 5: open 5/status: file does not exist",
			"threads: open 5/task: file does not exist",
			"stack: open 5/stack: file does not exist",
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, StuckReport(tt.proc, tt.pid)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestStuckReportOfKernel reads what this kernel has. /proc/<pid>/stack is for root: without, the report says so.
func TestStuckReportOfKernel(t *testing.T) {
	report := StuckReport(os.DirFS("/proc"), os.Getpid())
	text := strings.Join(report, "\n")
	for _, want := range []string{fmt.Sprintf("process %d: State=", os.Getpid()), fmt.Sprintf("\nthread %d ", os.Getpid()), "\nstack: ", "VmRSS="} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
}
