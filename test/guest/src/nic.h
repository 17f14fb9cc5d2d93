/* NICs: what the drivers, the small network stack and the commands share. */
#ifndef NIC_H
#define NIC_H

#include "guest.h"

#define FRAME_MAX 9234u /* MTU 9000, header, VLAN tag, to a multiple of 2 and some */
#define RX_BUFFER 2048u /* one receive buffer; longer frames come in several */
#define TX_SLOTS 32u
#define OTHER_KEPT 8u
#define OTHER_MAX 1600u
#define ARP_KEPT 8u

struct nic;

struct nic_driver {
	const char *name;
	u16 vendor, device;
	u32 max_mtu;
	int (*probe)(struct nic *n); /* read the MAC; 0: not usable */
	int (*up)(struct nic *n);    /* reset, receive and send from now on; 0: failed */
	void (*down)(struct nic *n);
	int (*send)(struct nic *n, const u8 *frame, u32 length); /* 0: no room now */
	void (*poll)(struct nic *n);                             /* calls net_receive for each frame */
	void (*ack)(struct nic *n);                              /* in interrupt context: lower the line */
};

enum transfer_state { IDLE, LISTENING, OPENING, RUNNING, FINISHING, DONE, FAILED };

/* One direction of the bulk protocol, see bulk.c. */
struct transfer {
	enum transfer_state state;
	u32 ip, session, total, segment, seed;
	u16 port, local_port;
	u8 mac[6];
	u32 next;  /* sender: next to send; receiver: next expected */
	u32 acked, hashed, recover, duplicates, resent, timeouts;
	u32 timer, started, ended, crc;
};

struct nic {
	const struct nic_driver *driver;
	struct pci_device pci;
	u16 io;
	volatile u8 *mmio;
	void *rings; /* the driver's own */
	u8 mac[6];
	int up, gone;
	u32 ip, mtu;
	struct {
		u32 rx, tx, rx_bytes, tx_bytes, arp, icmp, udp, ipv6, other;
		u32 bad_ip, bad_sum, fragments, unclaimed, no_room, errors;
	} count;
	struct {
		u32 ip;
		u8 mac[6];
	} arp[ARP_KEPT];
	u32 arp_next;
	struct {
		u32 length;
		u8 data[OTHER_MAX];
	} other[OTHER_KEPT];
	struct {
		u16 id, sequence; /* ICMP */
		u16 port;         /* UDP: ours; 0: none waits */
		int answered, bad;
		u32 seed, size;
	} probe;
	struct transfer out, in;
};

static inline u16 get16(const u8 *p) { return p[0] << 8 | p[1]; }
static inline u32 get32(const u8 *p) { return (u32)get16(p) << 16 | get16(p + 2); }
static inline void put16(u8 *p, u16 v) { p[0] = v >> 8, p[1] = v; }
static inline void put32(u8 *p, u32 v) { put16(p, v >> 16), put16(p + 2, v); }

/* net.c */
#define ECHO_PORT 7
int nic_send(struct nic *n, const u8 *frame, u32 length);
void net_receive(struct nic *n, const u8 *frame, u32 length);
int arp_resolve(struct nic *n, u32 ip, u8 *mac);
int net_ping(struct nic *n, u32 ip, const u8 *mac, u16 sequence, u32 size);
int udp_send(struct nic *n, const u8 *mac, u32 ip, u16 from, u16 to, const void *data, u32 length);

/* bulk.c */
#define BULK_HEADER 24u
void bulk_send(struct nic *n, u32 ip, const u8 *mac, u16 port, u32 bytes, u32 seed);
void bulk_listen(struct nic *n, u16 port);
void bulk_poll(struct nic *n);
int bulk_receive(struct nic *n, u32 ip, const u8 *mac, u16 from, u16 to, const u8 *data, u32 length);

extern const struct nic_driver e1000, rtl8139, virtio_net;

#endif
