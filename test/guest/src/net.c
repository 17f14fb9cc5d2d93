/* ARP (RFC 826), IPv4 without fragments or options (RFC 791), ICMP echo
 * (RFC 792), UDP with checksums (RFC 768) and an echo service on port 7. */
#include "nic.h"

#define ETHER 14u
#define IP 20u
#define UDP 8u
#define TYPE_IPV4 0x0800
#define TYPE_ARP 0x0806
#define TYPE_IPV6 0x86dd
#define PROTOCOL_ICMP 1
#define PROTOCOL_UDP 17

static const u8 broadcast[6] = { 0xff, 0xff, 0xff, 0xff, 0xff, 0xff };

/* Where a frame is put together. Nothing polls between filling and sending. */
static u8 out[FRAME_MAX];

/* Sends a frame, padded to Ethernet's least. Waits a little for room; 0: there was none. */
int nic_send(struct nic *n, const u8 *frame, u32 length)
{
	static u8 padded[60];
	u32 start = ticks;

	if (length < sizeof padded) {
		memset(padded, 0, sizeof padded);
		memcpy(padded, frame, length);
		frame = padded;
		length = sizeof padded;
	}
	while (!n->driver->send(n, frame, length))
		if (ticks - start > 1) {
			n->count.no_room++;
			return 0;
		}
	n->count.tx++;
	n->count.tx_bytes += length;
	return 1;
}

static u32 sum(u32 s, const u8 *p, u32 length)
{
	for (; length > 1; length -= 2, p += 2)
		s += get16(p);
	if (length)
		s += (u32)p[0] << 8;
	return s;
}

static u16 fold(u32 s)
{
	while (s >> 16)
		s = (s & 0xffff) + (s >> 16);
	return ~s;
}

static u16 udp_sum(const u8 *ip, u32 length)
{
	return fold(sum(sum(PROTOCOL_UDP + length, ip + 12, 8), ip + IP, length));
}

static void ether_header(struct nic *n, const u8 *to, u16 type)
{
	memcpy(out, to, 6);
	memcpy(out + 6, n->mac, 6);
	put16(out + 12, type);
}

/* Sends `length` bytes already at out + ETHER + IP. */
static int ip_send(struct nic *n, const u8 *mac, u32 to, u8 protocol, u32 length)
{
	static u16 id;
	u8 *ip = out + ETHER;

	if (IP + length > n->mtu)
		return 0;
	ether_header(n, mac, TYPE_IPV4);
	memset(ip, 0, IP);
	ip[0] = 0x45;
	put16(ip + 2, IP + length);
	put16(ip + 4, ++id);
	ip[6] = 0x40; /* do not fragment */
	ip[8] = 64;
	ip[9] = protocol;
	put32(ip + 12, n->ip);
	put32(ip + 16, to);
	put16(ip + 10, fold(sum(0, ip, IP)));
	return nic_send(n, out, ETHER + IP + length);
}

int udp_send(struct nic *n, const u8 *mac, u32 ip, u16 from, u16 to, const void *data, u32 length)
{
	u8 *udp = out + ETHER + IP;
	u16 s;

	if (IP + UDP + length > n->mtu)
		return 0;
	put16(udp, from);
	put16(udp + 2, to);
	put16(udp + 4, UDP + length);
	put16(udp + 6, 0);
	memcpy(udp + UDP, data, length);
	put32(out + ETHER + 12, n->ip); /* for the pseudo header */
	put32(out + ETHER + 16, ip);
	s = udp_sum(out + ETHER, UDP + length);
	put16(udp + 6, s ? s : 0xffff);
	return ip_send(n, mac, ip, PROTOCOL_UDP, UDP + length);
}

static void arp_send(struct nic *n, u16 operation, const u8 *to, u32 ip)
{
	u8 *a = out + ETHER;

	ether_header(n, to, TYPE_ARP);
	put16(a, 1);
	put16(a + 2, TYPE_IPV4);
	a[4] = 6;
	a[5] = 4;
	put16(a + 6, operation);
	memcpy(a + 8, n->mac, 6);
	put32(a + 14, n->ip);
	memset(a + 18, 0, 6);
	if (operation == 2)
		memcpy(a + 18, to, 6);
	put32(a + 24, ip);
	nic_send(n, out, ETHER + 28);
}

static int arp_find(struct nic *n, u32 ip)
{
	u32 i;

	for (i = 0; i < ARP_KEPT; i++)
		if (n->arp[i].ip == ip)
			return i;
	return -1;
}

static void arp_receive(struct nic *n, const u8 *a, u32 length)
{
	u32 from;
	int at;

	if (length < 28 || get16(a) != 1 || get16(a + 2) != TYPE_IPV4 || a[4] != 6 || a[5] != 4)
		return;
	n->count.arp++;
	from = get32(a + 14);
	at = arp_find(n, from);
	if (get32(a + 24) != n->ip && at < 0)
		return;
	if (from) {
		if (at < 0)
			at = n->arp_next++ % ARP_KEPT;
		n->arp[at].ip = from;
		memcpy(n->arp[at].mac, a + 8, 6);
	}
	if (get16(a + 6) == 1 && get32(a + 24) == n->ip)
		arp_send(n, 2, a + 8, from);
}

/* The MAC of an address on the link: three requests, a second each. */
int arp_resolve(struct nic *n, u32 ip, u8 *mac)
{
	u32 tries, start;
	int at;

	for (tries = 0; (at = arp_find(n, ip)) < 0; tries++) {
		if (tries == 3)
			return 0;
		arp_send(n, 1, broadcast, ip);
		for (start = ticks; ticks - start < HZ && arp_find(n, ip) < 0;)
			idle();
	}
	memcpy(mac, n->arp[at].mac, 6);
	return 1;
}

/* Sends one echo request; n->probe is filled in when its answer comes. */
int net_ping(struct nic *n, u32 ip, const u8 *mac, u16 sequence, u32 size)
{
	u8 *icmp = out + ETHER + IP;
	u32 i;

	if (IP + 8 + size > n->mtu)
		return 0;
	n->probe.id = (u32)n >> 4;
	n->probe.sequence = sequence;
	n->probe.size = size;
	n->probe.answered = n->probe.bad = 0;
	memset(icmp, 0, 8);
	icmp[0] = 8;
	put16(icmp + 4, n->probe.id);
	put16(icmp + 6, sequence);
	for (i = 0; i < size; i++)
		icmp[8 + i] = sequence + i;
	put16(icmp + 2, fold(sum(0, icmp, 8 + size)));
	return ip_send(n, mac, ip, PROTOCOL_ICMP, 8 + size);
}

static void icmp_receive(struct nic *n, const u8 *from, u32 ip, const u8 *icmp, u32 length)
{
	u32 i;

	if (length < 8 || fold(sum(0, icmp, length))) {
		n->count.bad_sum++;
		return;
	}
	n->count.icmp++;
	if (icmp[0] == 8) {
		if (IP + length > n->mtu)
			return;
		memcpy(out + ETHER + IP, icmp, length);
		out[ETHER + IP] = 0;
		put16(out + ETHER + IP + 2, 0);
		put16(out + ETHER + IP + 2, fold(sum(0, out + ETHER + IP, length)));
		ip_send(n, from, ip, PROTOCOL_ICMP, length);
	} else if (icmp[0] == 0 && get16(icmp + 4) == n->probe.id && get16(icmp + 6) == n->probe.sequence) {
		n->probe.bad = length != 8 + n->probe.size;
		for (i = 0; i < length - 8; i++)
			n->probe.bad |= icmp[8 + i] != (u8)(n->probe.sequence + i);
		n->probe.answered = 1;
	}
}

static void udp_receive(struct nic *n, const u8 *mac, const u8 *ip, u32 length)
{
	const u8 *udp = ip + IP, *data = udp + UDP;
	u32 from = get32(ip + 12);
	u16 source, port;

	if (length < UDP || get16(udp + 4) < UDP || get16(udp + 4) > length) {
		n->count.bad_ip++;
		return;
	}
	length = get16(udp + 4);
	if (get16(udp + 6) && udp_sum(ip, length)) {
		n->count.bad_sum++;
		return;
	}
	n->count.udp++;
	length -= UDP;
	source = get16(udp);
	port = get16(udp + 2);
	if (port == ECHO_PORT) {
		if (source != ECHO_PORT) /* two echo services would never end */
			udp_send(n, mac, from, ECHO_PORT, source, data, length);
	} else if (n->probe.port && port == n->probe.port) {
		n->probe.bad = length != n->probe.size || pattern_mismatch(n->probe.seed, 0, (const u32 *)data, length / 4);
		n->probe.answered = 1;
	} else if (!bulk_receive(n, from, mac, source, port, data, length)) {
		n->count.unclaimed++;
	}
}

static void ip_receive(struct nic *n, const u8 *frame, u32 length)
{
	const u8 *ip = frame + ETHER;
	u32 total;

	if (length < ETHER + IP || ip[0] != 0x45 || (total = get16(ip + 2)) < IP || total > length - ETHER) {
		n->count.bad_ip++;
		return;
	}
	if (fold(sum(0, ip, IP))) {
		n->count.bad_sum++;
		return;
	}
	if (get32(ip + 16) != n->ip)
		return;
	if (get16(ip + 6) & 0x3fff) {
		n->count.fragments++;
		return;
	}
	if (ip[9] == PROTOCOL_ICMP)
		icmp_receive(n, frame + 6, get32(ip + 12), ip + IP, total - IP);
	else if (ip[9] == PROTOCOL_UDP)
		udp_receive(n, frame + 6, ip, total - IP);
}

/* One frame from a driver, without its check sequence. Frames that are neither
 * IP nor ARP are kept for `nic N last`. */
void net_receive(struct nic *n, const u8 *frame, u32 length)
{
	u32 at;
	u16 type;

	if (length < ETHER)
		return;
	n->count.rx++;
	n->count.rx_bytes += length;
	if (!(frame[0] & 1) && memcmp(frame, n->mac, 6))
		return; /* the receiver is promiscuous */
	type = get16(frame + 12);
	if (type == TYPE_ARP) {
		arp_receive(n, frame + ETHER, length - ETHER);
	} else if (type == TYPE_IPV4) {
		ip_receive(n, frame, length);
	} else if (type == TYPE_IPV6) {
		n->count.ipv6++;
	} else {
		at = n->count.other++ % OTHER_KEPT;
		n->other[at].length = length;
		memcpy(n->other[at].data, frame, length < OTHER_MAX ? length : OTHER_MAX);
	}
}
