/* Intel 82540EM ("PCI/PCI-X Family of Gigabit Ethernet Controllers Software
 * Developer's Manual", 317453). Legacy descriptors; a frame longer than a
 * receive buffer comes in several descriptors, the last with EOP. */
#include "nic.h"

#define CTRL 0x0000
#define EERD 0x0014
#define ICR 0x00c0
#define IMS 0x00d0
#define IMC 0x00d8
#define RCTL 0x0100
#define TCTL 0x0400
#define TIPG 0x0410
#define RDBAL 0x2800
#define RDBAH 0x2804
#define RDLEN 0x2808
#define RDH 0x2810
#define RDT 0x2818
#define TDBAL 0x3800
#define TDBAH 0x3804
#define TDLEN 0x3808
#define TDH 0x3810
#define TDT 0x3818
#define RAL0 0x5400
#define RAH0 0x5404

#define CTRL_ASDE 0x20
#define CTRL_SLU 0x40
#define CTRL_RST 0x04000000
#define RCTL_EN 0x02
#define RCTL_UPE 0x08
#define RCTL_MPE 0x10
#define RCTL_LPE 0x20
#define RCTL_BAM 0x8000
#define RCTL_SECRC 0x04000000
#define TCTL_EN 0x02
#define TCTL_PSP 0x08
#define INT_RX (0x10 | 0x40 | 0x80) /* low on buffers, overrun, timer */
#define RX_DD 1
#define RX_EOP 2
#define TX_EOP_IFCS_RS 0x0b
#define TX_DD 1

#define RX_SLOTS 256u

struct rx_descriptor {
	u64 address;
	u16 length, checksum;
	u8 status, errors;
	u16 special;
} PACKED;

struct tx_descriptor {
	u64 address;
	u16 length;
	u8 offset, command, status, start;
	u16 special;
} PACKED;

struct rings {
	volatile struct rx_descriptor rx[RX_SLOTS];
	volatile struct tx_descriptor tx[TX_SLOTS];
	u8 rx_data[RX_SLOTS][RX_BUFFER];
	u8 tx_data[TX_SLOTS][FRAME_MAX];
	u8 whole[FRAME_MAX];
	u32 rx_at, tx_at, length;
	int broken; /* an error in the frame that is being put together */
};

static u32 get(struct nic *n, u32 reg) { return *(volatile u32 *)(n->mmio + reg); }
static void set(struct nic *n, u32 reg, u32 v) { *(volatile u32 *)(n->mmio + reg) = v; }

static int probe(struct nic *n)
{
	u32 i, tries, v;

	n->mmio = (volatile u8 *)pci_bar(&n->pci, 0);
	for (i = 0; i < 3; i++) {
		set(n, EERD, i << 8 | 1);
		for (tries = 0; !((v = get(n, EERD)) & 0x10); tries++)
			if (tries == 100000)
				return 0;
		n->mac[2 * i] = v >> 16;
		n->mac[2 * i + 1] = v >> 24;
	}
	return 1;
}

static void down(struct nic *n)
{
	set(n, IMC, ~0u);
	set(n, RCTL, 0);
	set(n, TCTL, 0);
	set(n, CTRL, get(n, CTRL) | CTRL_RST);
	wait_interrupt(); /* the reset takes a microsecond; the next tick is later */
	set(n, IMC, ~0u);
	get(n, ICR);
}

static int up(struct nic *n)
{
	struct rings *r = n->rings;
	u32 i;

	if (!r && !(r = n->rings = alloc(sizeof *r, 4096)))
		return 0;
	down(n);
	memset((void *)r->rx, 0, sizeof r->rx);
	memset((void *)r->tx, 0, sizeof r->tx);
	r->rx_at = r->tx_at = r->length = 0;
	r->broken = 0;
	for (i = 0; i < RX_SLOTS; i++)
		r->rx[i].address = (u32)r->rx_data[i];
	for (i = 0; i < TX_SLOTS; i++) {
		r->tx[i].address = (u32)r->tx_data[i];
		r->tx[i].status = TX_DD;
	}
	set(n, CTRL, get(n, CTRL) | CTRL_SLU | CTRL_ASDE);
	set(n, RAL0, n->mac[0] | n->mac[1] << 8 | n->mac[2] << 16 | (u32)n->mac[3] << 24);
	set(n, RAH0, n->mac[4] | n->mac[5] << 8 | 0x80000000u);
	set(n, RDBAL, (u32)r->rx);
	set(n, RDBAH, 0);
	set(n, RDLEN, sizeof r->rx);
	set(n, RDH, 0);
	set(n, RDT, RX_SLOTS - 1);
	set(n, TDBAL, (u32)r->tx);
	set(n, TDBAH, 0);
	set(n, TDLEN, sizeof r->tx);
	set(n, TDH, 0);
	set(n, TDT, 0);
	set(n, TIPG, 10 | 8 << 10 | 6 << 20);
	set(n, TCTL, TCTL_EN | TCTL_PSP | 0x0f << 4 | 0x40 << 12);
	set(n, RCTL, RCTL_EN | RCTL_UPE | RCTL_MPE | RCTL_LPE | RCTL_BAM | RCTL_SECRC);
	set(n, IMS, INT_RX);
	return 1;
}

static int send(struct nic *n, const u8 *frame, u32 length)
{
	struct rings *r = n->rings;
	volatile struct tx_descriptor *d = &r->tx[r->tx_at];

	if (!(d->status & TX_DD))
		return 0;
	memcpy(r->tx_data[r->tx_at], frame, length);
	d->length = length;
	d->status = 0;
	d->command = TX_EOP_IFCS_RS;
	r->tx_at = (r->tx_at + 1) % TX_SLOTS;
	barrier();
	set(n, TDT, r->tx_at);
	return 1;
}

static void poll(struct nic *n)
{
	struct rings *r = n->rings;
	volatile struct rx_descriptor *d;
	u32 taken = 0, last = 0;

	while ((d = &r->rx[r->rx_at])->status & RX_DD) {
		if (d->errors || d->length > FRAME_MAX - r->length) {
			r->broken = 1;
		} else {
			memcpy(r->whole + r->length, r->rx_data[r->rx_at], d->length);
			r->length += d->length;
		}
		if (d->status & RX_EOP) {
			if (r->broken)
				n->count.errors++;
			else
				net_receive(n, r->whole, r->length);
			r->length = 0;
			r->broken = 0;
		}
		d->status = 0;
		last = r->rx_at;
		r->rx_at = (r->rx_at + 1) % RX_SLOTS;
		/* Each write of the tail is a trap: give buffers back in batches. */
		if (++taken % 32 == 0) {
			barrier();
			set(n, RDT, last);
		}
	}
	if (taken % 32) {
		barrier();
		set(n, RDT, last);
	}
}

static void ack(struct nic *n) { get(n, ICR); }

const struct nic_driver e1000 = { "e1000", 0x8086, 0x100e, 9000, probe, up, down, send, poll, ack };
