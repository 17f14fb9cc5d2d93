package qemu

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
)

const (
	stuckThreads = 16 // threads that a report shows
	stuckFrames  = 24 // lines of a kernel stack
)

// StuckReport describes what a process that does not answer is doing, in lines for the log: memory, each thread's state and where it waits in the
// kernel, and the kernel stack of the main thread, which is the one that serves QEMU's monitors. What cannot be read is said in its place. proc is os.DirFS("/proc").
//
// Only files that do not need the process's mmap lock are read (not cmdline, maps …): reading those would wait with the stuck one. See proc(5).
func StuckReport(proc fs.FS, pid int) []string {
	dir := strconv.Itoa(pid)
	report := []string{memoryLine(proc, dir)}

	threads, err := fs.ReadDir(proc, path.Join(dir, "task"))
	if err != nil {
		report = append(report, fmt.Sprintf("threads: %v", err))
	}
	var tids []int
	for _, t := range threads {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			tids = append(tids, tid)
		}
	}
	slices.SortFunc(tids, func(a, b int) int {
		switch pid { // the main thread first: it must not be cut off
		case a:
			return -1
		case b:
			return 1
		}
		return a - b
	})
	for i, tid := range tids {
		if i == stuckThreads {
			report = append(report, fmt.Sprintf("and %d more threads", len(tids)-i))
			break
		}
		report = append(report, threadLine(proc, path.Join(dir, "task", strconv.Itoa(tid)), tid))
	}

	stack, err := fs.ReadFile(proc, path.Join(dir, "stack"))
	if err != nil {
		return append(report, fmt.Sprintf("stack: %v", err))
	}
	frames := strings.Split(strings.TrimSpace(string(stack)), "\n")
	for i, frame := range frames {
		if i == stuckFrames {
			report = append(report, fmt.Sprintf("stack: and %d more frames", len(frames)-i))
			break
		}
		// "[<0>] do_select+0x6a5/0x7d0": the address in front is always zeroed.
		if _, name, ok := strings.Cut(frame, "] "); ok {
			frame = name
		}
		report = append(report, "stack: "+frame)
	}
	return report
}

// statusFields of /proc/<pid>/status that tell a stuck process from one that starves.
var statusFields = map[string]bool{"State": true, "TracerPid": true, "Threads": true, "VmRSS": true, "VmHWM": true, "VmSwap": true, "SigPnd": true, "ShdPnd": true}

func memoryLine(proc fs.FS, dir string) string {
	status, err := fs.ReadFile(proc, path.Join(dir, "status"))
	if err != nil {
		return fmt.Sprintf("process %s: %v", dir, err)
	}
	line := "process " + dir + ":"
	for field := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(field, ":")
		if statusFields[key] {
			line += " " + key + "=" + strings.Join(strings.Fields(value), " ")
		}
	}
	return line
}

func threadLine(proc fs.FS, dir string, tid int) string {
	stat, err := fs.ReadFile(proc, path.Join(dir, "stat"))
	if err != nil {
		return fmt.Sprintf("thread %d: %v", tid, err)
	}
	// "tid (name) state …": the name may have any bytes, parentheses and spaces too.
	open, shut := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
	if open < 0 || shut < open || shut+2 >= len(stat) {
		return fmt.Sprintf("thread %d: stat is %q", tid, stat)
	}
	line := fmt.Sprintf("thread %d %q: state %c", tid, stat[open+1:shut], stat[shut+2])
	wchan, err := fs.ReadFile(proc, path.Join(dir, "wchan"))
	switch w := string(wchan); {
	case err != nil:
		line += fmt.Sprintf(", wchan: %v", err)
	case w != "" && w != "0": // 0: not in the kernel
		line += ", waits in " + w
	}
	return line
}
