package peer

import (
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestWithTag(t *testing.T) {
	untagged := appendEther(nil, macA, macB, typeIPv4)
	aux := func(status uint32, tci, tpid uint16) []byte {
		b := make([]byte, auxSize)
		binary.NativeEndian.PutUint32(b[auxStatus:], status)
		binary.NativeEndian.PutUint16(b[auxTCI:], tci)
		binary.NativeEndian.PutUint16(b[auxTPID:], tpid)
		return b
	}
	tagged := func(tag ...byte) []byte {
		return append(append(append([]byte(nil), untagged[:12]...), tag...), untagged[12:]...)
	}
	for _, test := range []struct {
		name    string
		aux     []byte
		want    []byte
		partial bool
	}{
		{"untagged", aux(unix.TP_STATUS_USER, 100, 0), untagged, false},
		{"partial", aux(unix.TP_STATUS_CSUMNOTREADY, 0, 0), untagged, true},
		{"802.1Q", aux(unix.TP_STATUS_VLAN_VALID, 100, 0), tagged(0x81, 0, 0, 100), false},
		{"802.1ad", aux(unix.TP_STATUS_VLAN_VALID|unix.TP_STATUS_VLAN_TPID_VALID, 0x2005, 0x88a8), tagged(0x88, 0xa8, 0x20, 5), false},
	} {
		got, partial := withTag(untagged, test.aux)
		if diff := cmp.Diff(test.want, got); diff != "" || partial != test.partial {
			t.Errorf("%s: partial %v (-want +got):\n%s", test.name, partial, diff)
		}
	}
}
