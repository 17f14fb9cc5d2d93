package main

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// A process that has called ignoreSignals, not as PID 1, of which the kernel keeps none from it, lives through all that can be
// ignored.
func TestIgnoreSignals(t *testing.T) {
	const role = "STUBINIT_SIGNALS"
	if os.Getenv(role) != "" {
		if err := ignoreSignals(); err != nil {
			fmt.Println(err)
		}
		fmt.Println("ready")
		bufio.NewReader(os.Stdin).ReadString('\n')
		fmt.Println("alive")
		os.Exit(0)
	}
	for s := syscall.Signal(1); s <= 64; s++ {
		switch s {
		case syscall.SIGKILL, syscall.SIGSTOP: // nobody can; the kernel keeps these from init
			continue
		case syscall.SIGTSTP, syscall.SIGTTIN, syscall.SIGTTOU: // Go leaves them alone, and the kernel keeps them from init
			continue
		}
		t.Run(fmt.Sprint(int(s)), func(t *testing.T) {
			t.Parallel()
			child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestIgnoreSignals$")
			child.Env = append(os.Environ(), role+"=1")
			in, err := child.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := child.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			child.Stderr = os.Stderr
			if err := child.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(out)
			expect := func(want string) {
				if got, err := lines.ReadString('\n'); strings.TrimSpace(got) != want {
					t.Errorf("the child says %q, %v, want %q", got, err, want)
				}
			}
			expect("ready")
			for range 10 {
				if err := child.Process.Signal(s); err != nil {
					t.Fatal(err)
				}
			}
			fmt.Fprintln(in)
			expect("alive")
			if err := child.Wait(); err != nil {
				t.Error(err)
			}
		})
	}
}
