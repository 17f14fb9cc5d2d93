/* Memory and device state that a save must carry, and the ways to end. */
#include "guest.h"

void mem_command(int argc, char **argv)
{
	u32 *at = (u32 *)PATTERN_START, words = PATTERN_SIZE / 4, bad;
	u32 seed = number_arg(argc, argv, 2, 1);

	if (argc > 1 && streq(argv[1], "fill")) {
		pattern_fill(seed, 0, at, words);
		put("ok mem bytes=%u seed=%u\n", PATTERN_SIZE, seed);
	} else if (argc > 1 && streq(argv[1], "check")) {
		bad = pattern_mismatch(seed, 0, at, words);
		put("%s mem bytes=%u seed=%u bad=%u\n", bad ? "err" : "ok", PATTERN_SIZE, seed, bad);
	} else {
		put("err mem usage: mem fill|check SEED\n");
	}
}

/* The VGA's 80x25 text page. */
void vga_command(int argc, char **argv)
{
	u32 *at = (u32 *)0xb8000, words = 80 * 25 * 2 / 4, bad;
	u32 seed = number_arg(argc, argv, 2, 1);
	int fill = argc > 1 && streq(argv[1], "fill");

	if (!fill && !(argc > 1 && streq(argv[1], "check"))) {
		put("err vga usage: vga fill|check SEED\n");
		return;
	}
	if (fill)
		pattern_fill(seed, 0, at, words);
	barrier();
	bad = pattern_mismatch(seed, 0, at, words);
	put("%s vga bytes=%u seed=%u bad=%u\n", bad ? "err" : "ok", words * 4, seed, bad);
}

/* One byte of the MC146818's CMOS memory, read or written. */
void cmos_command(int argc, char **argv)
{
	u64 index = number_arg(argc, argv, 1, 256), value;

	if (index > 127) {
		put("err cmos usage: cmos 0..127 [VALUE]\n");
		return;
	}
	if (argc > 2) {
		value = number_arg(argc, argv, 2, 0);
		outb(0x70, index);
		outb(0x71, value);
	}
	outb(0x70, index);
	put("ok cmos index=%u value=%u\n", (u32)index, inb(0x71));
}

/* PM1 control's port: the PIIX4's power management base is in its configuration
 * space (Intel 82371AB, PMBA at 40h); hvmloader sets 0xb000, SeaBIOS on QEMU 0x600. */
static u16 pm1_control(void)
{
	static struct pci_device list[64];
	u32 n = pci_scan(list, ARRAY_SIZE(list)), i;

	for (i = 0; i < n; i++)
		if (list[i].vendor == 0x8086 && list[i].device == 0x7113)
			return (pci_read(&list[i], 0x40) & 0xffc0) + 4;
	return 0xb004;
}

/* Sleep type 0 is S5 and 1 is S3, in QEMU's PIIX4 and in hvmloader's DSDT alike. */
static void sleep(const char *name, u16 type)
{
	u16 port = pm1_control();
	u32 start = ticks;

	put("ok %s port=0x%x\n", name, port);
	outw(port, 0x2000 | type << 10);
	while (ticks - start < 2 * HZ)
		wait_interrupt();
	put("err %s port=0x%x did not end the guest\n", name, port);
}

void poweroff_command(int argc, char **argv)
{
	(void)argc, (void)argv;
	sleep("poweroff", 0);
}

/* No waking vector is set: a wake-up boots the guest afresh. */
void suspend_command(int argc, char **argv)
{
	(void)argc, (void)argv;
	sleep("suspend", 1);
}

void reboot_command(int argc, char **argv)
{
	u32 start;

	(void)argc, (void)argv;
	put("ok reboot\n");
	outb(0xcf9, 0x02);
	outb(0xcf9, 0x06);
	for (start = ticks; ticks - start < HZ;)
		wait_interrupt();
	outb(0x64, 0xfe); /* the keyboard controller's reset line */
	for (start = ticks; ticks - start < HZ;)
		wait_interrupt();
	put("err reboot neither port 0xcf9 nor 0x64 reset the guest\n");
}

/* A triple fault: an exception without an interrupt table. */
void crash_command(int argc, char **argv)
{
	struct { u16 limit; u32 base; } PACKED none = { 0, 0 };

	(void)argc, (void)argv;
	put("ok crash\n");
	__asm__ volatile("cli; lidt %0; int3" ::"m"(none));
}
