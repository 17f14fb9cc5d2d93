package media

import "testing"

func TestName(t *testing.T) {
	for _, tt := range []struct {
		devid int
		want  string // "" is an error
	}{
		// xen-vbd-interface.7: 202 << 8 | disk << 4 | partition
		{51712, "xvda"}, {51713, "xvda1"}, {51727, "xvda15"}, {51728, "xvdb"}, {51744, "xvdc"}, {51952, "xvdp"},
		// 1 << 28 | disk << 8 | partition
		{1<<28 | 16<<8, "xvdq"}, {1<<28 | 25<<8, "xvdz"}, {1<<28 | 26<<8, "xvdaa"}, {1<<28 | 27<<8 | 17, "xvdab17"},
		{1<<28 | 701<<8, "xvdzz"}, {1<<28 | 702<<8, "xvdaaa"},
		// hd: 3 << 8 | disk << 6 and 22 << 8 | (disk-2) << 6
		{768, "xvda"}, {769, "xvda1"}, {832, "xvdb"}, {5632, "xvdc"}, {5633, "xvdc1"}, {5696, "xvdd"},
		// sd: 8 << 8 | disk << 4 | partition
		{2048, "xvda"}, {2064, "xvdb"}, {2080, "xvdc"}, {2081, "xvdc1"}, {2288, "xvdp"},
		{0, ""}, {-1, ""}, {256, ""}, {9 << 8, ""}, {65 << 8, ""}, {1 << 29, ""}, {1<<29 | 1<<28, ""},
	} {
		got, err := Name(tt.devid)
		if got != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("Name(%d) = %q, %v, want %q", tt.devid, got, err, tt.want)
		}
	}
}
