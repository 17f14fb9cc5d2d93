/* IDE disks and CD drives on the two legacy channels, polled, without DMA
 * (ATA/ATAPI-6: PIO data-in, data-out and PACKET protocols; SCSI MMC-3 and
 * SPC-2 for the packets). Unit 0 is the primary master, 3 the secondary slave. */
#include "guest.h"

/* Registers, from a channel's base. */
#define DATA 0
#define ERROR 1
#define COUNT 2
#define LBA_LOW 3
#define LBA_MID 4
#define LBA_HIGH 5
#define DEVICE 6
#define STATUS 7

#define BSY 0x80
#define DF 0x20
#define DRQ 0x08
#define ERR 0x01
#define NIEN 0x02

#define READ_MULTIPLE 0xc4
#define READ_MULTIPLE_EXT 0x29
#define WRITE_MULTIPLE 0xc5
#define WRITE_MULTIPLE_EXT 0x39
#define SET_MULTIPLE 0xc6
#define FLUSH_CACHE 0xe7
#define IDENTIFY 0xec
#define IDENTIFY_PACKET 0xa1
#define PACKET 0xa0

#define LIMIT_TICKS (60 * HZ)
#define CHUNK_SECTORS 128u /* of 512 bytes: one buffer */
#define CHUNK_FRAMES 16u   /* of 2048 bytes */
#define FRAME 2048u
#define LBA28_END 0x10000000ull

#define KEY_NOT_READY 2
#define KEY_UNIT_ATTENTION 6

struct unit {
	u16 base, control;
	u8 device;    /* value of the device register */
	u8 multiple;  /* sectors a data block */
	u8 key, asc, ascq; /* sense of the last failed packet */
	u64 sectors;
	char model[41];

	/* Background reads of the first chunks, each compared with what it was the first time. */
	int stress, stress_cd;
	u32 at, chunks, known;
	u32 reads, errors, mismatches, changes, not_ready;
	u32 crc[64];
};

static struct unit units[4];
static u32 buffer[CHUNK_SECTORS * 128];

/* Status once the drive is not busy; 0xff: no drive, or it took too long. */
static u8 wait(struct unit *u)
{
	u32 start = ticks, polls;
	u8 s;

	for (polls = 0; ticks - start < LIMIT_TICKS; polls++) {
		s = inb(u->base + STATUS);
		if (s == 0xff || !(s & BSY))
			return s;
		if (polls % 64 == 63)
			background();
	}
	return 0xff;
}

static int select(struct unit *u, u8 device)
{
	u32 i;

	outb(u->control, NIEN);
	outb(u->base + DEVICE, device);
	for (i = 0; i < 4; i++) /* 400 ns */
		inb(u->control);
	return wait(u) != 0xff;
}

static void transfer_in(struct unit *u, void *to, u32 bytes)
{
	if (bytes % 4)
		insw(u->base + DATA, to, bytes / 2);
	else
		insl(u->base + DATA, to, bytes / 4);
}

/* IDENTIFY (PACKET) DEVICE. Returns 0 or the reason why not. */
static const char *identify(struct unit *u, int packet)
{
	u16 *w = (u16 *)buffer;
	u32 i;
	u8 s;

	if (!select(u, u->device | 0xa0))
		return "absent";
	outb(u->base + COUNT, 0);
	outb(u->base + LBA_LOW, 0);
	outb(u->base + LBA_MID, 0);
	outb(u->base + LBA_HIGH, 0);
	outb(u->base + STATUS, packet ? IDENTIFY_PACKET : IDENTIFY);
	s = wait(u);
	if (s == 0 || s == 0xff)
		return "absent";
	if (s & ERR)
		return packet ? "not a packet device" : "not a disk";
	if (!(s & DRQ))
		return "absent";
	transfer_in(u, buffer, 512);
	for (i = 0; i < 20; i++) {
		u->model[2 * i] = w[27 + i] >> 8;
		u->model[2 * i + 1] = (char)w[27 + i];
	}
	for (i = 40; i && u->model[i - 1] == ' '; i--)
		;
	u->model[i] = 0;
	while (i--)
		if (u->model[i] <= ' ' || u->model[i] > '~')
			u->model[i] = '_';
	if (packet)
		return NULL;
	u->sectors = w[60] | (u32)w[61] << 16;
	if (w[83] & 0x0400)
		u->sectors = w[100] | (u32)w[101] << 16 | (u64)w[102] << 32 | (u64)w[103] << 48;
	u->multiple = w[47] & 0xff;
	if (!u->multiple)
		return "no READ MULTIPLE";
	outb(u->base + COUNT, u->multiple);
	outb(u->base + STATUS, SET_MULTIPLE);
	return wait(u) & (ERR | DF) ? "SET MULTIPLE failed" : NULL;
}

/* One command of up to CHUNK_SECTORS between the disk and buffer. */
static int disk_transfer(struct unit *u, u64 lba, u32 sectors, int write)
{
	int ext = lba + sectors > LBA28_END;
	u32 done, part;
	u8 s;

	if (!select(u, ext ? u->device | 0x40 : (u->device | 0xe0) + ((u32)(lba >> 24) & 0x0f)))
		return 0;
	if (ext) {
		outb(u->base + COUNT, sectors >> 8);
		outb(u->base + LBA_LOW, lba >> 24);
		outb(u->base + LBA_MID, lba >> 32);
		outb(u->base + LBA_HIGH, lba >> 40);
	}
	outb(u->base + COUNT, sectors);
	outb(u->base + LBA_LOW, lba);
	outb(u->base + LBA_MID, lba >> 8);
	outb(u->base + LBA_HIGH, lba >> 16);
	outb(u->base + STATUS, write ? (ext ? WRITE_MULTIPLE_EXT : WRITE_MULTIPLE) : (ext ? READ_MULTIPLE_EXT : READ_MULTIPLE));
	for (done = 0; done < sectors; done += part) {
		part = sectors - done < u->multiple ? sectors - done : u->multiple;
		s = wait(u);
		if (s == 0xff || s & (ERR | DF) || !(s & DRQ))
			return 0;
		if (write)
			outsl(u->base + DATA, buffer + done * 128, part * 128);
		else
			transfer_in(u, buffer + done * 128, part * 512);
	}
	s = wait(u);
	return s != 0xff && !(s & (ERR | DF | DRQ));
}

static int flush(struct unit *u)
{
	outb(u->base + STATUS, FLUSH_CACHE);
	return !(wait(u) & (ERR | DF));
}

/* Sends a packet and reads its data, at most max bytes. Returns the bytes, or -1:
 * then the drive's own sense is still to be asked for. */
static int packet_once(struct unit *u, const u8 *cdb, void *to, u32 max)
{
	u32 got = 0, n, take;
	u8 s;

	if (!select(u, u->device | 0xa0))
		return -1;
	outb(u->base + ERROR, 0); /* features: no DMA */
	outb(u->base + LBA_MID, (CHUNK_FRAMES * FRAME) & 0xff);
	outb(u->base + LBA_HIGH, (CHUNK_FRAMES * FRAME) >> 8);
	outb(u->base + STATUS, PACKET);
	s = wait(u);
	if (s == 0xff || s & ERR || !(s & DRQ))
		return -1;
	outsw(u->base + DATA, cdb, 6);
	for (;;) {
		s = wait(u);
		if (s == 0xff || s & ERR)
			return -1;
		if (!(s & DRQ))
			return got;
		n = inb(u->base + LBA_MID) | inb(u->base + LBA_HIGH) << 8;
		take = n < max - got ? n : max - got;
		transfer_in(u, (u8 *)to + got, take & ~1u);
		got += take;
		for (; take < n; take += 2)
			inw(u->base + DATA);
	}
}

static int packet(struct unit *u, const u8 *cdb, void *to, u32 max)
{
	static const u8 request_sense[12] = { 0x03, 0, 0, 0, 18 };
	u8 sense[18] = { 0 };
	int n = packet_once(u, cdb, to, max);

	u->key = u->asc = u->ascq = 0;
	if (n >= 0)
		return n;
	u->key = 0x0f; /* no sense either: the drive is gone */
	if (packet_once(u, request_sense, sense, sizeof sense) >= 14) {
		u->key = sense[2] & 0x0f;
		u->asc = sense[12];
		u->ascq = sense[13];
	}
	return -1;
}

/* READ CAPACITY: the number of 2048-byte frames, 0 on failure. */
static u32 cd_frames(struct unit *u)
{
	static const u8 cdb[12] = { 0x25 };
	u8 r[8];

	if (packet(u, cdb, r, sizeof r) < 8)
		return 0;
	return ((u32)r[0] << 24 | r[1] << 16 | r[2] << 8 | r[3]) + 1;
}

static int cd_read(struct unit *u, u32 lba, u32 frames)
{
	u8 cdb[12] = { 0x28, 0, lba >> 24, lba >> 16, lba >> 8, lba, 0, frames >> 8, frames };

	return packet(u, cdb, buffer, frames * FRAME) == (int)(frames * FRAME);
}

static int test_unit_ready(struct unit *u)
{
	static const u8 cdb[12] = { 0 };

	return packet(u, cdb, buffer, 0) >= 0;
}

/* Passes over what the drive says once after a start or a change of medium. Returns how often it did. */
static u32 clear_attention(struct unit *u)
{
	u32 i;

	for (i = 0; i < 4 && !test_unit_ready(u) && u->key == KEY_UNIT_ATTENTION; i++)
		;
	return i;
}

static void stress_step(struct unit *u)
{
	u32 crc, bytes;
	int good;

	if (u->stress_cd && !u->chunks) {
		u->changes += clear_attention(u);
		u->chunks = cd_frames(u) / CHUNK_FRAMES;
		u->at = u->known = 0;
		if (u->chunks > ARRAY_SIZE(u->crc))
			u->chunks = ARRAY_SIZE(u->crc);
		if (!u->chunks) {
			u->not_ready++;
			return;
		}
	}
	if (u->stress_cd) {
		good = cd_read(u, u->at * CHUNK_FRAMES, CHUNK_FRAMES);
		bytes = CHUNK_FRAMES * FRAME;
		if (!good && (u->key == KEY_UNIT_ATTENTION || u->key == KEY_NOT_READY)) {
			if (u->key == KEY_UNIT_ATTENTION)
				u->changes++;
			else
				u->not_ready++;
			u->chunks = 0;
			return;
		}
	} else {
		good = disk_transfer(u, u->at * CHUNK_SECTORS, CHUNK_SECTORS, 0);
		bytes = CHUNK_SECTORS * 512;
	}
	u->reads++;
	if (!good) {
		u->errors++;
		return;
	}
	crc = crc32(0, buffer, bytes);
	if (u->at >= u->known)
		u->crc[u->known++] = crc;
	else if (u->crc[u->at] != crc)
		u->mismatches++;
	u->at = (u->at + 1) % u->chunks;
}

/* One read on each unit under stress; 0 if there is none. */
int ata_background(void)
{
	u32 i, any = 0;

	for (i = 0; i < 4; i++)
		if (units[i].stress) {
			stress_step(&units[i]);
			any = 1;
		}
	return any;
}

static void stress(const char *name, struct unit *u, int on)
{
	if (on > 0) {
		u->reads = u->errors = u->mismatches = u->changes = u->not_ready = 0;
		u->at = u->known = 0;
		u->stress_cd = streq(name, "cd");
		if (u->stress_cd)
			clear_attention(u); /* from before: no change of medium that the reads saw */
		u->chunks = 0;
		if (!u->stress_cd)
			u->chunks = u->sectors / CHUNK_SECTORS < ARRAY_SIZE(u->crc) ? (u32)u->sectors / CHUNK_SECTORS : ARRAY_SIZE(u->crc);
		if (!u->stress_cd && !u->chunks) {
			put("err %s disk smaller than %u sectors\n", name, CHUNK_SECTORS);
			return;
		}
	}
	if (on >= 0)
		u->stress = on;
	put("ok %s stress=%d reads=%u errors=%u mismatches=%u changes=%u not_ready=%u\n", name, u->stress, u->reads, u->errors,
	    u->mismatches, u->changes, u->not_ready);
}

static struct unit *unit_arg(int argc, char **argv)
{
	u64 n = number_arg(argc, argv, 1, 4);
	struct unit *u;

	if (argc < 3 || n > 3)
		return NULL;
	u = &units[n];
	u->base = n < 2 ? 0x1f0 : 0x170;
	u->control = n < 2 ? 0x3f6 : 0x376;
	u->device = (n & 1) << 4;
	return u;
}

void ata_command(int argc, char **argv)
{
	struct unit *u = unit_arg(argc, argv);
	u64 lba = number_arg(argc, argv, 3, 0), count = number_arg(argc, argv, 4, 1), left;
	u32 seed = number_arg(argc, argv, 5, 1), crc = 0, bad = 0, part, start = ticks;
	int read, write, verify;
	const char *what, *why;

	if (!u) {
		put("err ata usage: ata 0..3 identify | read LBA COUNT | write|verify LBA COUNT SEED | stress [on|off]\n");
		return;
	}
	what = argv[2];
	if (streq(what, "stress") && argc == 3) {
		stress("ata", u, -1);
		return;
	}
	if ((why = identify(u, 0))) {
		u->stress = streq(what, "stress") ? 0 : u->stress;
		put("err ata %s\n", why);
		return;
	}
	if (streq(what, "identify")) {
		put("ok ata sectors=%llu multiple=%u model=%s\n", u->sectors, u->multiple, u->model);
		return;
	}
	if (streq(what, "stress")) {
		stress("ata", u, on_off(argv[3]));
		return;
	}
	read = streq(what, "read");
	write = streq(what, "write");
	verify = streq(what, "verify");
	if (!read && !write && !verify) {
		put("err ata unknown operation %s\n", what);
		return;
	}
	if (count > u->sectors || lba > u->sectors - count) {
		put("err ata beyond the end: sectors=%llu\n", u->sectors);
		return;
	}
	if (write)
		u->known = 0; /* what stress reads may be another content from now on */
	for (left = count; left; left -= part, lba += part) {
		part = left < CHUNK_SECTORS ? (u32)left : CHUNK_SECTORS;
		if (write)
			pattern_fill(seed, (u32)lba * 128, buffer, part * 128);
		if (!disk_transfer(u, lba, part, write)) {
			put("err ata %s lba=%llu status=0x%02x error=0x%02x\n", what, lba, inb(u->base + STATUS), inb(u->base + ERROR));
			return;
		}
		crc = crc32(crc, buffer, part * 512);
		if (verify)
			bad += pattern_mismatch(seed, (u32)lba * 128, buffer, part * 128);
		background();
	}
	if (write && !flush(u)) {
		put("err ata flush status=0x%02x error=0x%02x\n", inb(u->base + STATUS), inb(u->base + ERROR));
		return;
	}
	put("%s ata sectors=%llu crc=%08x ms=%u", bad ? "err" : "ok", count, crc, (ticks - start) * (1000 / HZ));
	if (verify)
		put(" bad=%u", bad);
	put("\n");
}

static void cd_failed(struct unit *u, const char *what)
{
	put("err cd %s key=%x asc=%02x ascq=%02x\n", what, u->key, u->asc, u->ascq);
}

static void cd_crc(struct unit *u, int argc, char **argv)
{
	u32 size, lba, count, left, part, crc = 0, start = ticks;

	clear_attention(u);
	size = cd_frames(u);
	if (!size) {
		cd_failed(u, "crc");
		return;
	}
	lba = number_arg(argc, argv, 3, 0);
	count = number_arg(argc, argv, 4, lba < size ? size - lba : 0);
	if (count > size || lba > size - count) {
		put("err cd beyond the end: frames=%u\n", size);
		return;
	}
	for (left = count; left; left -= part, lba += part) {
		part = left < CHUNK_FRAMES ? left : CHUNK_FRAMES;
		if (!cd_read(u, lba, part)) {
			cd_failed(u, "crc");
			return;
		}
		crc = crc32(crc, buffer, part * FRAME);
		background();
	}
	put("ok cd crc=%08x frames=%u bytes=%llu ms=%u\n", crc, count, (u64)count * FRAME, (ticks - start) * (1000 / HZ));
}

/* A packet without data. */
static void cd_simple(struct unit *u, const char *what, u8 operation, u8 byte4)
{
	u8 cdb[12] = { operation, 0, 0, 0, byte4 };

	if (packet(u, cdb, buffer, 0) < 0)
		cd_failed(u, what);
	else
		put("ok cd %s\n", what);
}

void cd_command(int argc, char **argv)
{
	/* GET EVENT STATUS NOTIFICATION, polled, media class. */
	static const u8 event[12] = { 0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8 };
	struct unit *u = unit_arg(argc, argv);
	const char *what, *why;
	u8 r[8];
	u32 frames;

	if (!u) {
		put("err cd usage: cd 0..3 identify | ready | size | crc [LBA COUNT] | lock on|off | eject | load | event | stress [on|off]\n");
		return;
	}
	what = argv[2];
	if (streq(what, "stress")) {
		if (argc > 3 && on_off(argv[3]) == 1 && (why = identify(u, 1)))
			put("err cd %s\n", why);
		else
			stress("cd", u, argc > 3 ? on_off(argv[3]) : -1);
		return;
	}
	if ((why = identify(u, 1))) {
		put("err cd %s\n", why);
		return;
	}
	if (streq(what, "identify")) {
		put("ok cd model=%s\n", u->model);
	} else if (streq(what, "ready")) {
		if (test_unit_ready(u))
			put("ok cd ready=1\n");
		else
			put("ok cd ready=0 key=%x asc=%02x ascq=%02x\n", u->key, u->asc, u->ascq);
	} else if (streq(what, "size")) {
		clear_attention(u);
		frames = cd_frames(u);
		if (frames)
			put("ok cd frames=%u bytes=%llu\n", frames, (u64)frames * FRAME);
		else
			cd_failed(u, "size");
	} else if (streq(what, "crc")) {
		cd_crc(u, argc, argv);
	} else if (streq(what, "lock") && argc > 3 && on_off(argv[3]) >= 0) {
		cd_simple(u, "lock", 0x1e, on_off(argv[3])); /* PREVENT ALLOW MEDIUM REMOVAL */
	} else if (streq(what, "eject")) {
		cd_simple(u, "eject", 0x1b, 2); /* START STOP UNIT */
	} else if (streq(what, "load")) {
		cd_simple(u, "load", 0x1b, 3);
	} else if (streq(what, "event")) {
		if (packet(u, event, r, sizeof r) < 8)
			cd_failed(u, "event");
		else
			put("ok cd event=%u tray=%u medium=%u\n", r[4] & 0x0f, r[5] & 1, r[5] >> 1 & 1);
	} else {
		put("err cd unknown operation %s\n", what);
	}
}
