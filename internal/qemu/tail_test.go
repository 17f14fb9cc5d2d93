package qemu

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestTail(t *testing.T) {
	var many, last []string
	for i := range 50 {
		many = append(many, fmt.Sprintf("%d\n", i))
		if i >= 30 {
			last = append(last, fmt.Sprint(i))
		}
	}
	kib := strings.Repeat("x", 1024)
	tests := []struct {
		name   string
		writes []string
		want   []string
	}{
		{"nothing", nil, nil},
		{"lines over writes", []string{"a", "b\nc\r", "\n", "\nd"}, []string{"ab", "c", "", "d"}},
		{"the last 20", many, last},
		{"the last 20 with an open one", append(many[:len(many):len(many)], "open"), append(last[1:len(last):len(last)], "open")},
		{"exactly 1 KiB", []string{kib + "\n", "a\n"}, []string{kib, "a"}},
		{"1 KiB, its end later", []string{kib, "\na"}, []string{kib, "a"}},
		{"longer", []string{kib + kib + "x\n"}, []string{kib, kib, "x"}},
		{"longer, in parts", []string{kib[:1000], kib[:1000]}, []string{kib, kib[:976]}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var tail Tail
			for _, w := range tt.writes {
				if n, err := tail.Write([]byte(w)); n != len(w) || err != nil {
					t.Errorf("Write: %d, %v", n, err)
				}
			}
			if diff := cmp.Diff(tt.want, tail.Lines()); diff != "" {
				t.Error(diff)
			}
		})
	}
}
