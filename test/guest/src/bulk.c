/* A reliable transfer over UDP, one way: go-back-N, cumulative
 * acknowledgements, a CRC-32 of all at the end. test/guest/peer/bulk.go is the
 * other side and describes the protocol; both must agree. */
#include "nic.h"

#define MAGIC 0x53424c4bu /* "SBLK" */
enum { OPEN = 1, DATA, ACK, FIN, FINACK };
#define FLAG_ANSWER 1 /* acknowledge this segment now */
#define ANSWER_EVERY 8u
#define WINDOW_SEGMENTS 32u
#define WINDOW_BYTES 49152u
#define TIMEOUT_TICKS 30u  /* first wait; doubles up to TIMEOUT_MOST */
#define TIMEOUT_MOST 200u
#define TIMEOUTS_MOST 20u

static u32 packet_words[FRAME_MAX / 4 + 1];
static u8 *const packet = (u8 *)packet_words;

static int post(struct nic *n, struct transfer *t, u8 type, u8 flags, u32 sequence, u32 crc, u32 payload)
{
	put32(packet, MAGIC);
	packet[4] = type;
	packet[5] = flags;
	put16(packet + 6, t->segment);
	put32(packet + 8, t->session);
	put32(packet + 12, sequence);
	put32(packet + 16, t->total);
	put32(packet + 20, crc);
	return udp_send(n, t->mac, t->ip, t->local_port, t->port, packet, BULK_HEADER + payload);
}

void bulk_send(struct nic *n, u32 ip, const u8 *mac, u16 port, u32 bytes, u32 seed)
{
	struct transfer *t = &n->out;

	memset(t, 0, sizeof *t);
	t->state = OPENING;
	t->ip = ip;
	memcpy(t->mac, mac, 6);
	t->port = port;
	t->session = (u32)tsc();
	t->local_port = 0xc000 | (t->session & 0x3fff);
	t->total = bytes;
	t->seed = seed;
	t->segment = (n->mtu - 28 - BULK_HEADER) & ~3u; /* whole words of the pattern */
	t->started = ticks;
	t->timer = ticks - TIMEOUT_TICKS;
}

void bulk_listen(struct nic *n, u16 port)
{
	memset(&n->in, 0, sizeof n->in);
	n->in.state = LISTENING;
	n->in.local_port = port;
	n->in.started = ticks;
}

static u32 segments(struct transfer *t)
{
	return t->total / t->segment + (t->total % t->segment != 0);
}

static u32 segment_size(struct transfer *t, u32 sequence)
{
	return sequence + 1 < segments(t) ? t->segment : t->total - sequence * t->segment;
}

static void send_segments(struct nic *n, struct transfer *t)
{
	u32 window = WINDOW_BYTES / t->segment < WINDOW_SEGMENTS ? WINDOW_BYTES / t->segment : WINDOW_SEGMENTS;
	u32 size, count = segments(t);
	u8 flags;

	while (t->next < count && t->next - t->acked < window) {
		size = segment_size(t, t->next);
		pattern_fill(t->seed, t->next * (t->segment / 4), packet_words + BULK_HEADER / 4, (size + 3) / 4);
		flags = t->next % ANSWER_EVERY == ANSWER_EVERY - 1 || t->next + 1 == count || t->next + 1 - t->acked == window;
		if (!post(n, t, DATA, flags ? FLAG_ANSWER : 0, t->next, 0, size))
			return;
		if (t->next == t->hashed) {
			t->crc = crc32(t->crc, packet + BULK_HEADER, size);
			t->hashed++;
		} else {
			t->resent++;
		}
		t->next++;
		t->timer = ticks;
	}
}

static void go_back(struct transfer *t)
{
	t->recover = t->next;
	t->next = t->acked;
	t->duplicates = 0;
}

/* Sends what is due. */
void bulk_poll(struct nic *n)
{
	struct transfer *t = &n->out;
	u32 wait = TIMEOUT_TICKS << (t->timeouts < 4 ? t->timeouts : 4);
	int late;

	if (t->state != OPENING && t->state != RUNNING && t->state != FINISHING)
		return;
	late = ticks - t->timer >= (wait < TIMEOUT_MOST ? wait : TIMEOUT_MOST);
	if (late && t->timeouts++ == TIMEOUTS_MOST) {
		t->state = FAILED;
		t->ended = ticks;
		return;
	}
	if (late) {
		t->timer = ticks;
		if (t->state == OPENING)
			post(n, t, OPEN, FLAG_ANSWER, 0, 0, 0);
		else if (t->state == FINISHING)
			post(n, t, FIN, FLAG_ANSWER, segments(t), t->crc, 0);
		else
			go_back(t);
	}
	if (t->state == RUNNING)
		send_segments(n, t);
}

static void acknowledged(struct nic *n, struct transfer *t, u8 type, u32 sequence, u32 crc)
{
	if (type == FINACK && t->state == FINISHING) {
		t->state = crc == t->crc ? DONE : FAILED;
		t->ended = ticks;
		return;
	}
	if (type != ACK)
		return;
	if (t->state == OPENING) {
		t->state = RUNNING;
		t->timeouts = 0;
		t->started = ticks;
	}
	if (t->state != RUNNING || sequence > t->hashed)
		return;
	if (sequence > t->acked) {
		t->acked = sequence;
		t->duplicates = t->timeouts = 0;
		if (t->next < sequence)
			t->next = sequence;
		t->timer = ticks;
	} else if (sequence == t->acked && t->next > t->acked && ++t->duplicates == 3 && t->acked >= t->recover) {
		go_back(t);
	}
	if (t->acked == segments(t)) {
		t->state = FINISHING;
		t->timer = ticks;
		post(n, t, FIN, FLAG_ANSWER, segments(t), t->crc, 0);
	}
}

static void received(struct nic *n, struct transfer *t, const u8 *p, u32 length)
{
	u32 sequence = get32(p + 12), payload = length - BULK_HEADER;

	if (p[4] == DATA) {
		if (t->state == RUNNING && sequence == t->next && sequence < segments(t) && payload == segment_size(t, sequence)) {
			t->crc = crc32(t->crc, p + BULK_HEADER, payload);
			t->next++;
			if (!(p[5] & FLAG_ANSWER))
				return;
		}
		post(n, t, ACK, 0, t->next, 0, 0);
	} else if (p[4] == OPEN) {
		post(n, t, ACK, 0, t->next, 0, 0);
	} else if (p[4] == FIN && t->next == segments(t)) {
		if (t->state == RUNNING) {
			t->state = t->crc == get32(p + 20) ? DONE : FAILED;
			t->ended = ticks;
		}
		post(n, t, FINACK, 0, t->next, t->crc, 0);
	}
}

/* A datagram to a port that is none of the fixed ones; 0: not ours either. */
int bulk_receive(struct nic *n, u32 ip, const u8 *mac, u16 from, u16 to, const u8 *p, u32 length)
{
	struct transfer *t;
	u32 session;

	if (length < BULK_HEADER || get32(p) != MAGIC)
		return 0;
	session = get32(p + 8);
	t = &n->out;
	if (t->state != IDLE && to == t->local_port && session == t->session) {
		acknowledged(n, t, p[4], get32(p + 12), get32(p + 20));
		return 1;
	}
	t = &n->in;
	if (t->state == IDLE || to != t->local_port)
		return 0;
	if (t->state == LISTENING) {
		if (p[4] != OPEN || !get16(p + 6))
			return 0;
		t->state = RUNNING;
		t->session = session;
		t->ip = ip;
		t->port = from;
		memcpy(t->mac, mac, 6);
		t->segment = get16(p + 6);
		t->total = get32(p + 16);
		t->started = ticks;
	}
	if (session != t->session)
		return 0;
	received(n, t, p, length);
	return 1;
}
