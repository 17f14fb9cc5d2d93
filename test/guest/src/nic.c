/* The NICs on the bus and the `nic` commands. */
#include "nic.h"

#define NICS 8

static const struct nic_driver *const drivers[] = { &e1000, &rtl8139, &virtio_net };
static struct nic nics[NICS];
static u32 found;

/* In interrupt context: whoever shares the line lowers it. Frames are taken by the next poll. */
static void ack_line(u8 irq)
{
	u32 i;

	for (i = 0; i < found; i++)
		if (nics[i].up && nics[i].pci.irq == irq)
			nics[i].driver->ack(&nics[i]);
}

void nic_poll(void)
{
	u32 i;

	for (i = 0; i < found; i++)
		if (nics[i].up) {
			nics[i].driver->poll(&nics[i]);
			bulk_poll(&nics[i]);
		}
}

/* Finds new NICs and sees which have been unplugged; a number stays a NIC's for good. */
static void scan(void)
{
	static struct pci_device list[64];
	u32 count = pci_scan(list, ARRAY_SIZE(list)), i, k, d;

	irq_ack_hook(ack_line);
	for (k = 0; k < found; k++) {
		struct nic *n = &nics[k];
		n->gone = (u16)pci_read(&n->pci, 0) != n->pci.vendor;
		if (n->gone)
			n->up = 0;
	}
	for (i = 0; i < count; i++) {
		for (d = 0; d < ARRAY_SIZE(drivers); d++)
			if (list[i].vendor == drivers[d]->vendor && list[i].device == drivers[d]->device)
				break;
		for (k = 0; k < found; k++)
			if (nics[k].pci.slot == list[i].slot && nics[k].pci.func == list[i].func)
				break;
		if (d == ARRAY_SIZE(drivers) || k < found || found == NICS)
			continue;
		nics[k].driver = drivers[d];
		nics[k].pci = list[i];
		pci_enable(&list[i]);
		if (drivers[d]->probe(&nics[k]))
			found++;
	}
}

static void put_mac(const u8 *m)
{
	put("%02x:%02x:%02x:%02x:%02x:%02x", m[0], m[1], m[2], m[3], m[4], m[5]);
}

static void list_command(void)
{
	u32 i;

	put("ok nic count=%u", found);
	for (i = 0; i < found; i++) {
		struct nic *n = &nics[i];
		put(" %u=%s,", i, n->driver->name);
		put_mac(n->mac);
		put(",slot=%02x,irq=%u,up=%d,gone=%d", n->pci.slot, n->pci.irq, n->up, n->gone);
	}
	put("\n");
}

static void up_command(struct nic *n, int argc, char **argv)
{
	u32 mtu = number_arg(argc, argv, 4, 1500), ip;

	if (argc < 4 || !parse_ip(argv[3], &ip)) {
		put("err nic usage: nic N up IP [MTU]\n");
		return;
	}
	if (mtu < 576 || mtu > n->driver->max_mtu) {
		put("err nic mtu=%u %s takes 576 to %u\n", mtu, n->driver->name, n->driver->max_mtu);
		return;
	}
	/* A frame may come at any time, on a line that others have unmasked: nobody may interrupt while ack_line does not know this one. */
	cli();
	n->up = 0;
	n->ip = ip;
	n->mtu = mtu;
	memset(&n->count, 0, sizeof n->count);
	memset(&n->arp, 0, sizeof n->arp);
	memset(&n->probe, 0, sizeof n->probe);
	n->in.state = n->out.state = IDLE;
	n->up = n->driver->up(n);
	sti();
	if (!n->up) {
		put("err nic %s does not come up\n", n->driver->name);
		return;
	}
	if (n->pci.irq < 16)
		irq_unmask(n->pci.irq);
	put("ok nic model=%s mac=", n->driver->name);
	put_mac(n->mac);
	put(" ip=%s mtu=%u irq=%u\n", argv[3], mtu, n->pci.irq);
}

/* Waits for n->probe's answer. */
static int answered(struct nic *n)
{
	u32 start = ticks;

	while (!n->probe.answered && ticks - start < 2 * HZ && n->up)
		idle();
	return n->probe.answered;
}

static void ping_command(struct nic *n, u32 ip, const u8 *mac, int argc, char **argv)
{
	u32 size = number_arg(argc, argv, 4, 56), count = number_arg(argc, argv, 5, 1), i, received = 0, bad = 0, us = 0, least = ~0u;
	u64 start;

	for (i = 0; i < count; i++) {
		start = tsc();
		if (!net_ping(n, ip, mac, i, size)) {
			put("err nic ping size=%u cannot be sent mtu=%u\n", size, n->mtu);
			return;
		}
		if (!answered(n))
			continue;
		us = tsc_us(start);
		least = us < least ? us : least;
		received++;
		bad += n->probe.bad;
	}
	put("%s nic ping sent=%u received=%u bad=%u least_us=%u\n", received == count && !bad ? "ok" : "err", count, received, bad,
	    received ? least : 0);
}

/* One datagram of pattern to an echo service, compared when it is back. */
static void udp_command(struct nic *n, u32 ip, const u8 *mac, int argc, char **argv)
{
	static u32 words[FRAME_MAX / 4];
	u32 port = number_arg(argc, argv, 4, ECHO_PORT), size = number_arg(argc, argv, 5, 64), before = n->count.bad_sum;

	if (size > sizeof words) {
		put("err nic udp size=%u cannot be sent mtu=%u\n", size, n->mtu);
		return;
	}
	n->probe.seed = number_arg(argc, argv, 6, 1);
	n->probe.size = size;
	n->probe.answered = n->probe.bad = 0;
	n->probe.port = 0xb000 | (tsc() & 0xfff);
	pattern_fill(n->probe.seed, 0, words, (size + 3) / 4);
	if (!udp_send(n, mac, ip, n->probe.port, port, words, size)) {
		put("err nic udp size=%u cannot be sent mtu=%u\n", size, n->mtu);
		n->probe.port = 0;
		return;
	}
	answered(n);
	n->probe.port = 0;
	put("%s nic udp echoed=%d bad=%d bad_sum=%u\n", n->probe.answered && !n->probe.bad ? "ok" : "err", n->probe.answered, n->probe.bad,
	    n->count.bad_sum - before);
}

static int active(const struct transfer *t)
{
	return t->state != IDLE && t->state != DONE && t->state != FAILED;
}

static void put_transfer(const char *name, const struct transfer *t, int sender)
{
	static const char *const states[] = { "idle", "listening", "opening", "running", "finishing", "done", "failed" };
	u32 bytes = (sender ? t->acked : t->next) * t->segment;

	if (t->state == IDLE)
		return;
	put(" %s=%u %s_state=%s %s_crc=%08x %s_ms=%u", name, bytes < t->total ? bytes : t->total, name, states[t->state], name, t->crc, name,
	    ((active(t) ? ticks : t->ended) - t->started) * (1000 / HZ));
	if (sender)
		put(" resent=%u", t->resent);
}

/* Waits for the NIC's transfers and says how they ended. */
static void wait_command(struct nic *n, u32 seconds)
{
	u32 start = ticks;
	int good;

	while ((active(&n->in) || active(&n->out)) && n->up && ticks - start < seconds * HZ)
		idle();
	good = (n->in.state == DONE || n->in.state == IDLE) && (n->out.state == DONE || n->out.state == IDLE);
	put("%s nic", good ? "ok" : "err");
	put_transfer("sent", &n->out, 1);
	put_transfer("received", &n->in, 0);
	put("\n");
}

static void raw_command(struct nic *n, int argc, char **argv)
{
	static u8 frame[FRAME_MAX];
	int length = argc > 3 ? parse_hex(argv[3], frame, n->mtu + 18) : -1;
	u32 size = number_arg(argc, argv, 4, length);

	if (length < 14 || size < (u32)length || size > n->mtu + 18) {
		put("err nic usage: nic N raw HEX [SIZE], 14 to %u bytes\n", n->mtu + 18);
		return;
	}
	memset(frame + length, 0, size - length);
	if (nic_send(n, frame, size))
		put("ok nic raw length=%u\n", size);
	else
		put("err nic raw no room to send\n");
}

/* The last frame that was neither IP nor ARP, or the last one of an EtherType. */
static void last_command(struct nic *n, int argc, char **argv)
{
	u32 type = number_arg(argc, argv, 3, 0), i, k, at, shown;

	for (i = n->count.other; i && n->count.other - i < OTHER_KEPT; i--) {
		at = (i - 1) % OTHER_KEPT;
		if (type && get16(n->other[at].data + 12) != type)
			continue;
		shown = n->other[at].length < OTHER_MAX ? n->other[at].length : OTHER_MAX;
		put("ok nic length=%u hex=", n->other[at].length);
		for (k = 0; k < shown; k++)
			put("%02x", n->other[at].data[k]);
		put("\n");
		return;
	}
	put("err nic no such frame received\n");
}

static void stats_command(struct nic *n)
{
	put("ok nic up=%d rx=%u tx=%u rx_bytes=%u tx_bytes=%u arp=%u icmp=%u udp=%u ipv6=%u other=%u", n->up, n->count.rx, n->count.tx,
	    n->count.rx_bytes, n->count.tx_bytes, n->count.arp, n->count.icmp, n->count.udp, n->count.ipv6, n->count.other);
	put(" bad_ip=%u bad_sum=%u fragments=%u unclaimed=%u no_room=%u errors=%u\n", n->count.bad_ip, n->count.bad_sum, n->count.fragments,
	    n->count.unclaimed, n->count.no_room, n->count.errors);
}

/* The commands that name another host: its MAC first. */
static int remote_command(struct nic *n, const char *what, int argc, char **argv)
{
	int ping = streq(what, "ping"), udp = streq(what, "udp"), send = streq(what, "send");
	u32 ip;
	u8 mac[6];

	if (!ping && !udp && !send)
		return 0;
	if (argc < 4 || !parse_ip(argv[3], &ip)) {
		put("err nic usage: nic N %s IP ...\n", what);
	} else if (send && (argc < 7 || active(&n->out))) {
		put("err nic %s\n", argc < 7 ? "usage: nic N send IP PORT BYTES SEED [bg]" : "send: one is running");
	} else if (!arp_resolve(n, ip, mac)) {
		put("err nic %s %s does not answer ARP\n", what, argv[3]);
	} else if (ping) {
		ping_command(n, ip, mac, argc, argv);
	} else if (udp) {
		udp_command(n, ip, mac, argc, argv);
	} else {
		n->in.state = active(&n->in) ? n->in.state : IDLE;
		bulk_send(n, ip, mac, number_arg(argc, argv, 4, 0), number_arg(argc, argv, 5, 0), number_arg(argc, argv, 6, 1));
		if (argc > 7 && streq(argv[7], "bg"))
			put("ok nic send started\n");
		else
			wait_command(n, 600);
	}
	return 1;
}

void nic_command(int argc, char **argv)
{
	struct nic *n;
	const char *what;
	u64 index;

	scan();
	if (argc == 2 && streq(argv[1], "list")) {
		list_command();
		return;
	}
	index = number_arg(argc, argv, 1, NICS);
	if (argc < 3) {
		put("err nic usage: nic list | nic N up|down|ping|udp|send|recv|wait|raw|last|stats ...\n");
		return;
	}
	if (index >= found) {
		put("err nic no such NIC, count=%u\n", found);
		return;
	}
	n = &nics[index];
	what = argv[2];
	if (n->gone) {
		put("err nic %u is unplugged\n", (u32)index);
	} else if (streq(what, "up")) {
		up_command(n, argc, argv);
	} else if (streq(what, "stats")) {
		stats_command(n);
	} else if (streq(what, "last")) {
		last_command(n, argc, argv);
	} else if (!n->up) {
		put("err nic %u is down\n", (u32)index);
	} else if (streq(what, "down")) {
		cli();
		n->driver->down(n);
		n->up = 0;
		sti();
		put("ok nic down\n");
	} else if (streq(what, "recv")) {
		u32 port = number_arg(argc, argv, 3, 0);
		if (port == 0 || port > 65535 || active(&n->in)) {
			put("err nic %s\n", port && port <= 65535 ? "recv: one is running" : "usage: nic N recv PORT [bg]");
			return;
		}
		n->out.state = active(&n->out) ? n->out.state : IDLE;
		bulk_listen(n, port);
		if (argc > 4 && streq(argv[4], "bg"))
			put("ok nic recv started\n");
		else
			wait_command(n, 600);
	} else if (streq(what, "wait")) {
		wait_command(n, number_arg(argc, argv, 3, 600));
	} else if (streq(what, "raw")) {
		raw_command(n, argc, argv);
	} else if (!remote_command(n, what, argc, argv)) {
		put("err nic unknown operation %s\n", what);
	}
}
