package initramfs

import (
	"fmt"
	"io/fs"
	"strings"
)

// Memory is what a stubdomain needs to start from an image, in bytes. Too little is a silent death: the kernel leaves files out
// or panics before console 0 is drained, and the toolstack only says that the start timed out.
//
// Seen under Xen with a disk and a NIC, and no VGA: libxl adds the guest's video RAM to stubdomain_memory, and QEMU's VGA
// and VNC take no more than that.
//
//	MiB                        Kernel  Tables, Running  QEMU, Agent
//	Debian's 6.12, QEMU 10.0   39.2    20.6             11.0,  2.0
//	Debian's 6.1, QEMU 7.2     45.9    29.9             10.5,  1.4
//	the small image             5.7    11.2              8.9,  1.6
type Memory struct {
	Kernel   int64 // what stays of text, data and bss
	Init     int64 // code and data that the kernel frees before init runs
	Tables   int64 // what Linux allocates before that: slab, hash tables, per-CPU areas, device tables
	Running  int64 // what it allocates later: modules, stacks, page tables, rings of NIC and disk, lists of free pages
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

	early    = 3 * mib // of Tables, what is taken before the size of a tmpfs is chosen: 2.5 MiB with Debian's 6.1
	running  = 8 * mib
	qemuOwn  = 12 * mib
	agentOwn = 3 * mib

	// Until 6.6 tracefs kept an inode and a dentry for each file of each trace event.
	traceEvents = 10 * mib
)

// Memory estimates what the image needs once packed into an archive of that many bytes.
func (im *Image) Memory(packed int64) Memory {
	k := im.Kernel
	m := Memory{Kernel: k.Kept, Init: k.Loaded - k.Kept, Tables: k.Kept / 3, Running: running, Packed: packed, QEMU: qemuOwn, Agent: agentOwn}
	if k.before(6, 6) && (k.config == nil || k.option("EVENT_TRACING") == "y") {
		m.Tables += traceEvents
	}
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
// (shmem_default_max_blocks, counted before anything of both is freed): so the files count twice. With rootfstype=ramfs on the
// kernel's command line there is no such limit: LeastRamfs.
func (m Memory) Least() int {
	return stubdomainMemory(max(m.Kernel+m.Init+early+m.Packed+2*m.Unpacked, m.unpacking(), m.serving()))
}

// LeastRamfs is Least for a kernel command line with rootfstype=ramfs.
func (m Memory) LeastRamfs() int {
	return stubdomainMemory(max(m.unpacking(), m.serving()))
}

// unpacking is what is in use at the end of the unpacking; LZ4 needs a block for it, zstd its window and tables.
func (m Memory) unpacking() int64 {
	return m.Kernel + m.Init + m.Tables + m.Packed + m.Unpacked + block + 2*mib
}

// serving is what is in use when the device model serves its guest.
func (m Memory) serving() int64 {
	return m.Kernel + m.Tables + m.Running + m.Unpacked + m.QEMU + m.Agent
}

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
	}{{"kernel", m.Kernel}, {"kernel's init", m.Init}, {"kernel's tables", m.Tables}, {"kernel, running", m.Running},
		{"archive, packed", m.Packed}, {"archive, unpacked", m.Unpacked}, {"QEMU's own", m.QEMU}, {"agent's own", m.Agent}} {
		fmt.Fprintf(&b, "  %-18s %6.1f MiB\n", term.name, float64(term.bytes)/mib)
	}
	return b.String()
}
