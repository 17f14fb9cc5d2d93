package initramfs

import (
	"fmt"
	"io/fs"
	"strings"
)

// Memory is what a stubdomain needs to start from an image, in bytes. Too little is a silent death: the kernel leaves files out
// or panics before console 0 is drained, and the toolstack only says that the start timed out.
//
// Seen with an init that only looks for Unpacked, on a PC without Xen, MiB:
//
//	kernel, archive packed and unpacked    tmpfs: fails, starts, Least    ramfs: fails, starts, LeastRamfs
//	6.12, 16.8 and 54.7                    172, 176, 186                  138, 144, 153
//	6.1,  12.9 and 39.1                    144, 150, 158                  140, 148, 147
type Memory struct {
	Kernel   int64 // text, data and bss
	Tables   int64 // what Linux allocates before init runs: per-CPU areas, hash tables, slab, device tables
	Packed   int64 // the archive as the toolstack loads it; freed once unpacked
	Unpacked int64 // the files, each in whole pages
	QEMU     int64 // QEMU's own: heap, stacks, libraries' data
	Agent    int64 // stubinit's own
}

const (
	page = 4096
	mib  = 1 << 20

	// struct page (64 of 4096 bytes), the physical-to-machine list and the first page tables (8 bytes each).
	perPage = 64 + 8 + 8

	// Private memory of Debian's QEMU with a NIC, VGA and VNC before its guest runs: 18 MiB.
	qemuOwn  = 20 * mib
	agentOwn = 10 * mib
)

// Memory estimates what the image needs once packed into an archive of that many bytes.
func (im *Image) Memory(packed int64) Memory {
	m := Memory{Kernel: im.Kernel.InitSize, Packed: packed, QEMU: qemuOwn, Agent: agentOwn}
	m.Tables = m.Kernel / 6 // slab alone takes 7 MiB with Debian's 6.12, 14 MiB with 6.1
	for _, e := range im.Entries {
		if e.Mode.IsRegular() {
			m.Unpacked += (e.Size + page - 1) / page * page
		}
		m.Unpacked += inode
		if e.Mode.Type() == fs.ModeSymlink && e.Size >= 128 { // longer than shmem keeps beside the inode
			m.Unpacked += page
		}
	}
	return m
}

// inode is a tmpfs inode and its dentry.
const inode = 1024

// Least is the least stubdomain_memory in MiB with which the image starts.
//
// The kernel unpacks into a tmpfs that may fill half of the memory that is not the kernel's and not the packed archive's
// (shmem_default_max_blocks, counted before the archive is freed): so the files count twice. With rootfstype=ramfs on the
// kernel's command line there is no such limit: LeastRamfs.
func (m Memory) Least() int {
	return stubdomainMemory(max(m.Kernel+m.Packed+2*m.Unpacked, m.unpacking(), m.running()))
}

// LeastRamfs is Least for a kernel command line with rootfstype=ramfs.
func (m Memory) LeastRamfs() int {
	return stubdomainMemory(max(m.unpacking(), m.running()))
}

// unpacking is what is in use at the end of the unpacking; zstd needs its window and tables for it.
func (m Memory) unpacking() int64 {
	return m.Kernel + m.Tables + m.Packed + m.Unpacked + window + 2*mib
}

// running is what is in use when the device model serves its guest.
func (m Memory) running() int64 { return m.Kernel + m.Tables + m.Unpacked + m.QEMU + m.Agent }

// stubdomainMemory adds what the kernel keeps for each page and rounds up to MiB.
func stubdomainMemory(bytes int64) int {
	bytes = bytes * page / (page - perPage)
	return int((bytes + mib - 1) / mib)
}

// String is a table of the terms.
func (m Memory) String() string {
	var b strings.Builder
	for _, term := range []struct {
		name  string
		bytes int64
	}{{"kernel", m.Kernel}, {"kernel's tables", m.Tables}, {"archive, packed", m.Packed}, {"archive, unpacked", m.Unpacked}, {"QEMU's own", m.QEMU}, {"agent's own", m.Agent}} {
		fmt.Fprintf(&b, "  %-18s %6.1f MiB\n", term.name, float64(term.bytes)/mib)
	}
	return b.String()
}
