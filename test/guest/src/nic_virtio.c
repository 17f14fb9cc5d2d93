/* virtio-net over PCI, legacy interface (OASIS Virtio 1.1, 4.1.4.8 and 5.1):
 * QEMU's virtio-net is transitional on the PC's bus, its first BAR is legacy. */
#include "nic.h"

#define HOST_FEATURES 0
#define GUEST_FEATURES 4
#define QUEUE_PFN 8
#define QUEUE_SIZE 12
#define QUEUE_SELECT 14
#define QUEUE_NOTIFY 16
#define STATUS 18
#define ISR 19
#define CONFIG_MAC 20

#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define F_MAC (1u << 5)
#define F_MRG_RXBUF (1u << 15)
#define NEXT 1
#define WRITE 2
#define NO_INTERRUPT 1
#define QUEUE_MAX 1024u
#define RX_SLOTS 256u

struct descriptor {
	u64 address;
	u32 length;
	u16 flags, next;
} PACKED;

struct available {
	u16 flags, index, ring[];
} PACKED;

struct used {
	u16 flags, index;
	struct {
		u32 id, length;
	} PACKED ring[];
} PACKED;

struct queue {
	u32 size;
	volatile struct descriptor *descriptor;
	volatile struct available *available;
	volatile struct used *used;
	u16 seen; /* used entries taken */
	/* Descriptors, available ring, and on the next page the used ring, for up to QUEUE_MAX entries. */
	u8 memory[16 * QUEUE_MAX + 4096 + 3 * 4096] __attribute__((aligned(4096)));
};

struct rings {
	struct queue rx, tx;
	u8 rx_data[RX_SLOTS][RX_BUFFER];
	u8 tx_data[TX_SLOTS][FRAME_MAX];
	u8 header[12]; /* all zero: no offload */
	u8 whole[FRAME_MAX];
	u32 header_size, tx_sent;
};

static int probe(struct nic *n)
{
	u32 i;

	if (!(pci_read(&n->pci, 0x10) & 1))
		return 0; /* no legacy interface */
	n->io = pci_bar(&n->pci, 0);
	for (i = 0; i < 6; i++)
		n->mac[i] = inb(n->io + CONFIG_MAC + i);
	return 1;
}

static void down(struct nic *n) { outb(n->io + STATUS, 0); }

static int queue_up(struct nic *n, u16 index, struct queue *q)
{
	outw(n->io + QUEUE_SELECT, index);
	q->size = inw(n->io + QUEUE_SIZE);
	if (!q->size || q->size > QUEUE_MAX)
		return 0;
	memset(q->memory, 0, sizeof q->memory);
	q->descriptor = (void *)q->memory;
	q->available = (void *)(q->memory + 16 * q->size);
	q->used = (void *)(((u32)q->available + 6 + 2 * q->size + 4095) & ~4095u);
	q->seen = 0;
	outl(n->io + QUEUE_PFN, (u32)q->memory >> 12);
	return 1;
}

static void offer(struct queue *q, u16 id)
{
	q->available->ring[q->available->index % q->size] = id;
	barrier();
	q->available->index++;
}

static int up(struct nic *n)
{
	struct rings *r = n->rings;
	u32 features, i;

	if (!r && !(r = n->rings = alloc(sizeof *r, 4096)))
		return 0;
	outb(n->io + STATUS, 0);
	outb(n->io + STATUS, ACKNOWLEDGE);
	outb(n->io + STATUS, ACKNOWLEDGE | DRIVER);
	features = inl(n->io + HOST_FEATURES) & (F_MAC | F_MRG_RXBUF);
	outl(n->io + GUEST_FEATURES, features);
	r->header_size = features & F_MRG_RXBUF ? 12 : 10;
	if (n->mtu > 1500 && !(features & F_MRG_RXBUF))
		return 0;
	if (!queue_up(n, 0, &r->rx) || !queue_up(n, 1, &r->tx))
		return 0;
	r->tx.available->flags = NO_INTERRUPT;
	r->tx_sent = 0;
	for (i = 0; i < TX_SLOTS && 2 * i + 1 < r->tx.size; i++) {
		r->tx.descriptor[2 * i].address = (u32)r->header;
		r->tx.descriptor[2 * i].length = r->header_size;
		r->tx.descriptor[2 * i].flags = NEXT;
		r->tx.descriptor[2 * i].next = 2 * i + 1;
		r->tx.descriptor[2 * i + 1].address = (u32)r->tx_data[i];
	}
	for (i = 0; i < RX_SLOTS && i < r->rx.size; i++) {
		r->rx.descriptor[i].address = (u32)r->rx_data[i];
		r->rx.descriptor[i].length = RX_BUFFER;
		r->rx.descriptor[i].flags = WRITE;
		offer(&r->rx, i);
	}
	outb(n->io + STATUS, ACKNOWLEDGE | DRIVER | DRIVER_OK);
	outw(n->io + QUEUE_NOTIFY, 0);
	return 1;
}

static int send(struct nic *n, const u8 *frame, u32 length)
{
	struct rings *r = n->rings;
	u32 slots = r->tx.size / 2 < TX_SLOTS ? r->tx.size / 2 : TX_SLOTS, slot = r->tx_sent % slots;

	/* QEMU ends them in order: what is in flight is sent minus used. */
	if ((u16)(r->tx_sent - r->tx.used->index) >= slots)
		return 0;
	memcpy(r->tx_data[slot], frame, length);
	r->tx.descriptor[2 * slot + 1].length = length;
	offer(&r->tx, 2 * slot);
	r->tx_sent++;
	barrier();
	outw(n->io + QUEUE_NOTIFY, 1);
	return 1;
}

static void poll(struct nic *n)
{
	struct rings *r = n->rings;
	struct queue *q = &r->rx;
	u32 taken = 0;

	while (q->seen != q->used->index) {
		u32 length = 0, buffers = 1, i;
		int broken = 0;

		/* A frame in several buffers is made visible as a whole. */
		for (i = 0; i < buffers && q->seen != q->used->index; i++) {
			u32 id = q->used->ring[q->seen % q->size].id, part = q->used->ring[q->seen % q->size].length;
			u32 skip = i ? 0 : r->header_size;

			q->seen++;
			if (id >= RX_SLOTS || part < skip || part > RX_BUFFER) {
				broken = 1;
				continue;
			}
			if (!i && r->header_size == 12)
				buffers = r->rx_data[id][10] | r->rx_data[id][11] << 8;
			if (part - skip > FRAME_MAX - length) {
				broken = 1;
			} else {
				memcpy(r->whole + length, r->rx_data[id] + skip, part - skip);
				length += part - skip;
			}
			offer(q, id);
			taken++;
		}
		if (broken || i < buffers)
			n->count.errors++;
		else
			net_receive(n, r->whole, length);
	}
	if (taken)
		outw(n->io + QUEUE_NOTIFY, 0);
}

static void ack(struct nic *n) { inb(n->io + ISR); }

const struct nic_driver virtio_net = { "virtio-net", 0x1af4, 0x1000, 9000, probe, up, down, send, poll, ack };
