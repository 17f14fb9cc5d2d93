/* The lab's test guest: commanded over COM1, one line in, one line out.
 *
 * Answers begin with `ok COMMAND` or `err COMMAND`; `tick N` (once a second,
 * N = seconds of timer interrupts since boot) may come between, never inside.
 * test/guest/README.md lists the commands. */
#include "guest.h"

extern u16 boot_kib, boot_64kib; /* boot.S */

/* Boots since power-on; a reset keeps memory, a new domain does not. The id
 * tells one boot from another in both cases. */
static struct {
	u32 magic, boots, id;
} *const record = (void *)BOOT_RECORD;
#define RECORD_MAGIC 0x54534547u

static int show_ticks = 1;

static u32 memory_kib(void)
{
	return 1024 + boot_kib + boot_64kib * 64;
}

/* Argument i as a number, or otherwise when it is missing or none. */
u64 number_arg(int argc, char **argv, int i, u64 otherwise)
{
	u64 v;

	return i < argc && parse_number(argv[i], &v) ? v : otherwise;
}

/* 1, 0, or -1 for neither. */
int on_off(const char *s)
{
	return streq(s, "on") ? 1 : streq(s, "off") ? 0 : -1;
}

/* What goes on beside a command. Called from every loop that takes long, never
 * while an output line is unfinished. Every second gets its line, late or not. */
void background(void)
{
	static u32 shown;

	for (; shown < ticks / HZ; )
		if (++shown, show_ticks)
			put("tick %u\n", shown);
	nic_poll();
}

/* One round of waiting in a loop that has nothing else to do, and that is not
 * in the middle of a disk command. */
void idle(void)
{
	if (!ata_background())
		wait_interrupt();
	background();
}

static void info_command(int argc, char **argv)
{
	(void)argc, (void)argv;
	put("ok info boot=%u id=%08x ticks=%u uptime=%u memory_kib=%u\n", record->boots, record->id, ticks, ticks / HZ, memory_kib());
}

static void ticks_command(int argc, char **argv)
{
	int on = argc > 1 ? on_off(argv[1]) : -1;

	if (on < 0) {
		put("err ticks usage: ticks on|off\n");
		return;
	}
	show_ticks = on;
	put("ok ticks on=%d ticks=%u\n", on, ticks);
}

static void echo_command(int argc, char **argv)
{
	int i;

	put("ok echo");
	for (i = 1; i < argc; i++)
		put(" %s", argv[i]);
	put("\n");
}

static void sleep_command(int argc, char **argv)
{
	u32 ms = number_arg(argc, argv, 1, 1000), start = ticks;

	while (ticks - start < ms / (1000 / HZ))
		idle();
	put("ok sleep ms=%u ticks=%u\n", ms, ticks);
}

static const struct {
	const char *name;
	void (*run)(int argc, char **argv);
} commands[] = {
	{ "info", info_command },       { "ticks", ticks_command },   { "echo", echo_command },
	{ "sleep", sleep_command },     { "ata", ata_command },       { "cd", cd_command },
	{ "pci", pci_command },         { "unplug", unplug_command }, { "nic", nic_command },
	{ "mem", mem_command },         { "vga", vga_command },       { "cmos", cmos_command },
	{ "poweroff", poweroff_command }, { "suspend", suspend_command }, { "reboot", reboot_command },
	{ "crash", crash_command },
};

static void run_line(char *line)
{
	static char *argv[256];
	int argc = 0;
	u32 i;

	while (*line && argc < (int)ARRAY_SIZE(argv)) {
		while (*line == ' ')
			*line++ = 0;
		if (*line)
			argv[argc++] = line;
		while (*line && *line != ' ')
			line++;
	}
	if (!argc)
		return;
	for (i = 0; i < ARRAY_SIZE(commands); i++)
		if (streq(argv[0], commands[i].name)) {
			commands[i].run(argc, argv);
			return;
		}
	put("err %s unknown command\n", argv[0]);
}

void guest_main(void)
{
	char *line;

	interrupt_init();
	serial_init();
	if (record->magic != RECORD_MAGIC) {
		record->magic = RECORD_MAGIC;
		record->boots = 0;
	}
	record->boots++;
	record->id = (u32)tsc() ^ (u32)(tsc() >> 32) * 0x9e3779b1u;
	put("\nstubinit-guest ready boot=%u id=%08x memory_kib=%u\n", record->boots, record->id, memory_kib());
	if (memory_kib() < MEMORY_NEEDED_KIB)
		put("err boot memory_kib=%u needed=%u\n", memory_kib(), MEMORY_NEEDED_KIB);
	unplug_boot(record->boots);
	for (;;) {
		idle();
		while ((line = serial_line()))
			run_line(line);
	}
}
