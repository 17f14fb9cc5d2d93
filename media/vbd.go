package media

import "fmt"

// Virtual block device numbers (docs/man/xen-vbd-interface.7): what
// device/vbd/<devid> is called. A disk xvdc is 51744, hdc is 5632, sdc is 2080.
const (
	majorIDE0 = 3
	majorIDE1 = 22
	majorSCSI = 8
	majorXVD  = 202
	extended  = 1 << 28
)

// Disk gives the disk that a number names: its index, counted from 0 in each of the
// three families alike, and its partition, 0 for the whole disk. Numbers that
// Linux's blkfront refuses give an error.
func Disk(devid int) (disk, partition int, err error) {
	major, minor := devid>>8, devid&0xff
	switch {
	case devid&extended != 0 && devid>>29 == 0:
		rest := devid &^ extended
		return rest >> 8, rest & 0xff, nil
	case major == majorXVD, major == majorSCSI:
		return minor >> 4, minor & 15, nil
	case major == majorIDE0:
		return minor >> 6, minor & 63, nil
	case major == majorIDE1:
		return 2 + minor>>6, minor & 63, nil
	}
	return 0, 0, fmt.Errorf("vbd number %d (%#x): not xvd, sd or hd", devid, devid)
}

// Name gives the name that Linux's blkfront gives the device, without "/dev/": "xvdc", "xvdaa", "xvda1". All three families
// are named xvd there (drivers/block/xen-blkfront.c, xen_translate_vdev).
func Name(devid int) (string, error) {
	disk, partition, err := Disk(devid)
	if err != nil {
		return "", err
	}
	name := "xvd" + letters(disk)
	if partition != 0 {
		name += fmt.Sprint(partition)
	}
	return name, nil
}

// letters counts a, b, … z, aa, ab, …: the disk names of Linux.
func letters(n int) string {
	s := ""
	for n++; n > 0; n = (n - 1) / 26 {
		s = string(rune('a'+(n-1)%26)) + s
	}
	return s
}
