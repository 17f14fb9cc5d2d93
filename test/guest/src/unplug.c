/* The emulated device unplug protocol (Xen's hvm-emulated-unplug document):
 * ports 0x10 and 0x12 of the Xen platform device. Without Xen they read as
 * all ones and every command but `probe` refuses. */
#include "guest.h"

#define PORT 0x10
#define PORT_LOG 0x12
#define MAGIC 0x49d2
#define MAGIC_BLACKLISTED 0xd249
#define PRODUCT_EXPERIMENTAL 0xffff
#define BUILD 1

#define UNPLUG_DISKS 1
#define UNPLUG_NICS 2
#define UNPLUG_AUX_DISKS 4

static void log_bytes(const char *s, u32 n)
{
	while (n--)
		outb(PORT_LOG, *s++);
}

static void log_line(const char *s)
{
	log_bytes(s, strlen(s));
	log_bytes("\n", 1);
}

/* Steps 1 to 5 of the protocol. Returns the last magic number read. */
static u16 handshake(u8 *version)
{
	u16 magic = inw(PORT);

	*version = 0;
	if (magic != MAGIC)
		return magic;
	*version = inb(PORT_LOG);
	if (*version == 0)
		return magic;
	outw(PORT_LOG, PRODUCT_EXPERIMENTAL);
	outl(PORT, BUILD);
	return inw(PORT);
}

/* At boot: the handshake and one log line; unplugs nothing. */
void unplug_boot(u32 boot)
{
	static char text[] = "stubinit-guest boot 0";
	u8 version;
	u16 magic = handshake(&version);

	text[sizeof text - 2] = '0' + boot % 10;
	if (magic == MAGIC || magic == MAGIC_BLACKLISTED)
		log_line(text);
	put("unplug magic=0x%04x version=%u\n", magic, version);
}

void unplug_command(int argc, char **argv)
{
	static const struct { const char *name; u16 bits; } kinds[] = {
		{ "disks", UNPLUG_DISKS }, { "nics", UNPLUG_NICS }, { "aux", UNPLUG_AUX_DISKS },
	};
	const char *what = argc > 1 ? argv[1] : "probe";
	u16 magic = inw(PORT), bits = 0;
	u8 version;
	u32 i, k;

	if (magic != MAGIC && magic != MAGIC_BLACKLISTED) {
		put("err unplug magic=0x%04x\n", magic);
		return;
	}
	if (streq(what, "probe")) {
		magic = handshake(&version);
		put("ok unplug magic=0x%04x version=%u\n", magic, version);
	} else if (streq(what, "log")) {
		/* The rest of the line, its words joined by one space again. */
		for (i = 2; i < (u32)argc; i++) {
			if (i > 2)
				log_bytes(" ", 1);
			log_bytes(argv[i], strlen(argv[i]));
		}
		log_bytes("\n", 1);
		put("ok unplug logged=%u\n", argc - 2);
	} else if (streq(what, "raw")) {
		static u8 bytes[4096];
		int n = argc > 2 ? parse_hex(argv[2], bytes, sizeof bytes) : -1;
		if (n < 0) {
			put("err unplug usage: unplug raw HEX\n");
			return;
		}
		log_bytes((char *)bytes, n);
		put("ok unplug bytes=%d\n", n);
	} else if (streq(what, "flood")) {
		static const char text[] = "flood from the guest's driver, one line of sixty-four bytes...\n";
		u32 total = number_arg(argc, argv, 2, 65536), done, part;
		for (done = 0; done < total; done += part) {
			part = total - done < sizeof text - 1 ? total - done : sizeof text - 1;
			log_bytes(text, part);
			background();
		}
		put("ok unplug bytes=%u\n", total);
	} else {
		for (i = 1; i < (u32)argc; i++) {
			for (k = 0; k < ARRAY_SIZE(kinds) && !streq(argv[i], kinds[k].name); k++)
				;
			if (k == ARRAY_SIZE(kinds)) {
				put("err unplug usage: unplug probe|log TEXT|raw HEX|flood BYTES|[nics] [disks] [aux]\n");
				return;
			}
			bits |= kinds[k].bits;
		}
		magic = handshake(&version);
		if (magic != MAGIC) {
			put("err unplug magic=0x%04x blacklisted\n", magic);
			return;
		}
		outw(PORT, bits);
		put("ok unplug mask=%u\n", bits);
	}
}
