package media

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestXenbusThreads(t *testing.T) {
	proc := t.TempDir()
	for pid, stat := range map[string]string{
		"1":   "1 (init) S 0 1 1 0",
		"2":   "2 (kthreadd) S 0 0 0 0",
		"27":  "27 (xenbus) S 2 0 0 0",
		"28":  "28 (xenwatch) S 2 0 0 0",
		"131": "131 (xenwatch) S 1 131 131 0",
		"132": "132 (a) S 2 (xenbus) S 2 0",
		"133": "",
	} {
		if err := os.Mkdir(filepath.Join(proc, pid), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(proc, pid, "stat"), []byte(stat), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(proc, "9"), 0o755); err != nil { // has ended
		t.Fatal(err)
	}
	got, err := xenbusThreads(proc)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	if diff := cmp.Diff([]int{27, 28}, got); diff != "" {
		t.Errorf("threads (-want +got):\n%s", diff)
	}
}
