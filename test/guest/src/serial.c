/* COM1, a 16550A (National Semiconductor PC16550D): polled output, received
 * bytes taken by IRQ 4 and at each timer tick. */
#include "guest.h"

#define COM1 0x3f8
#define LSR_DATA 0x01
#define LSR_ROOM 0x20

static volatile u8 ring[16384];
static volatile u32 head, tail; /* head: next to write, by interrupt; tail: next to read */
static char line[8192];
static u32 length;

void serial_init(void)
{
	outb(COM1 + 1, 0);
	outb(COM1 + 3, 0x80);
	outb(COM1 + 0, 1); /* 115200 baud */
	outb(COM1 + 1, 0);
	outb(COM1 + 3, 0x03); /* 8n1 */
	outb(COM1 + 2, 0x07); /* FIFOs on and cleared, interrupt at one byte */
	outb(COM1 + 4, 0x0b); /* DTR, RTS, OUT2: the interrupt gate */
	outb(COM1 + 1, 0x01);
	irq_unmask(4);
}

/* A port that nobody drains must not stop the guest: after three seconds without
 * room, bytes are dropped until there is some again. */
void serial_putc(char c)
{
	static int stuck;
	u32 start = ticks, tries = 0;

	while (!(inb(COM1 + 5) & LSR_ROOM)) {
		/* The count is for when interrupts are off and no tick comes. */
		if (stuck || ticks - start > 3 * HZ || ++tries == 5000000) {
			stuck = 1;
			return;
		}
	}
	stuck = 0;
	outb(COM1, c);
}

/* Called with interrupts off. */
void serial_receive(void)
{
	while (inb(COM1 + 5) & LSR_DATA) {
		u8 c = inb(COM1);
		if (head - tail < sizeof ring)
			ring[head++ % sizeof ring] = c;
	}
}

/* The next whole line without its end, or NULL. What is longer than the buffer is cut off. */
char *serial_line(void)
{
	while (tail != head) {
		u8 c = ring[tail++ % sizeof ring];
		if (c == '\r' || c == '\n') {
			if (!length)
				continue;
			line[length] = 0;
			length = 0;
			return line;
		}
		if (length < sizeof line - 1)
			line[length++] = c;
	}
	return NULL;
}
