/* Realtek RTL8139C+ in its C mode (RTL8139C(L) data sheet; one ring of bytes
 * for receiving, four send registers). */
#include "nic.h"

#define IDR0 0x00
#define TSD0 0x10
#define TSAD0 0x20
#define RBSTART 0x30
#define CR 0x37
#define CAPR 0x38
#define IMR 0x3c
#define ISR 0x3e
#define TCR 0x40
#define RCR 0x44

#define CR_BUFE 0x01
#define CR_TE 0x04
#define CR_RE 0x08
#define CR_RST 0x10
#define TSD_OWN 0x2000
#define INT_RX 0x03 /* good, error. The overflow bit stays off: QEMU would drop instead of wait. */
#define RX_ROK 0x0001
#define RING 32768u
/* All frames to all addresses; 32 KiB ring, a frame at its end runs on behind it; no DMA limit or threshold. */
#define RCR_VALUE (0x0f | 0x80 | 2 << 11 | 7 << 8 | 7 << 13)
#define TCR_VALUE (3 << 24 | 7 << 8)
#define LONGEST 1792u

struct rings {
	u8 rx[RING + 16 + 2048];
	u8 tx[4][LONGEST];
	u32 rx_at, tx_at;
};

static int probe(struct nic *n)
{
	u32 i;

	n->io = pci_bar(&n->pci, 0);
	for (i = 0; i < 6; i++)
		n->mac[i] = inb(n->io + IDR0 + i);
	return 1;
}

static void down(struct nic *n)
{
	outw(n->io + IMR, 0);
	outb(n->io + CR, 0);
}

static int up(struct nic *n)
{
	struct rings *r = n->rings;
	u32 i;

	if (!r && !(r = n->rings = alloc(sizeof *r, 4096)))
		return 0;
	outb(n->io + CR, CR_RST);
	for (i = 0; inb(n->io + CR) & CR_RST; i++)
		if (i == 100000)
			return 0;
	r->rx_at = r->tx_at = 0;
	outl(n->io + RBSTART, (u32)r->rx);
	outb(n->io + CR, CR_TE | CR_RE);
	outl(n->io + TCR, TCR_VALUE);
	outl(n->io + RCR, RCR_VALUE);
	for (i = 0; i < 4; i++)
		outl(n->io + TSAD0 + 4 * i, (u32)r->tx[i]);
	outw(n->io + ISR, 0xffff);
	outw(n->io + IMR, INT_RX);
	return 1;
}

static int send(struct nic *n, const u8 *frame, u32 length)
{
	struct rings *r = n->rings;
	u32 slot = r->tx_at;

	if (length > LONGEST || !(inl(n->io + TSD0 + 4 * slot) & TSD_OWN))
		return 0;
	memcpy(r->tx[slot], frame, length);
	barrier();
	outl(n->io + TSD0 + 4 * slot, length); /* OWN cleared: the chip's turn */
	r->tx_at = (slot + 1) % 4;
	return 1;
}

static void poll(struct nic *n)
{
	struct rings *r = n->rings;
	u32 status, length;

	while (!(inb(n->io + CR) & CR_BUFE)) {
		status = r->rx[r->rx_at] | r->rx[r->rx_at + 1] << 8;
		length = r->rx[r->rx_at + 2] | r->rx[r->rx_at + 3] << 8;
		if (!(status & RX_ROK) || length < 8 || length > 2048) {
			n->count.errors++;
			up(n); /* the only way to find the next frame's start */
			return;
		}
		net_receive(n, r->rx + r->rx_at + 4, length - 4);
		r->rx_at = ((r->rx_at + 4 + length + 3) & ~3u) % RING;
		outw(n->io + CAPR, r->rx_at - 16);
	}
}

static void ack(struct nic *n) { outw(n->io + ISR, inw(n->io + ISR)); }

const struct nic_driver rtl8139 = { "rtl8139", 0x10ec, 0x8139, 1500, probe, up, down, send, poll, ack };
