/* IDT, the two 8259A interrupt controllers, the 8254 timer, halting, time. */
#include "guest.h"

#define PIC1 0x20
#define PIC2 0xa0
#define VECTOR 0x20
#define PIT_HZ 1193182u

struct frame {
	u32 edi, esi, ebp, esp, ebx, edx, ecx, eax, vector, code, eip, cs, eflags;
};

extern const u8 interrupt_entries[]; /* boot.S, 16 bytes each */
void interrupt(struct frame *f);

volatile u32 ticks;
static volatile u32 woken;
static u16 mask = 0xfffb; /* all but the cascade */
static void (*ack)(u8 irq);
static u32 tsc_per_tick = 1;
static struct { u16 low, selector, type, high; } PACKED idt[48];

u64 tsc(void)
{
	u64 v;
	__asm__ volatile("rdtsc" : "=A"(v));
	return v;
}

u32 tsc_us(u64 since)
{
	return (u32)div64((tsc() - since) * (1000000 / HZ), tsc_per_tick);
}

void irq_unmask(u8 irq)
{
	mask &= ~(1u << irq);
	outb(PIC1 + 1, mask);
	outb(PIC2 + 1, mask >> 8);
}

/* The hook runs in interrupt context for every line but the timer's and COM1's. */
void irq_ack_hook(void (*hook)(u8 irq))
{
	ack = hook;
}

void interrupt(struct frame *f)
{
	u8 irq = f->vector - VECTOR;

	if (f->vector < VECTOR) {
		put("\npanic vector=%u code=0x%x eip=0x%x eax=0x%x esp=0x%x\n", f->vector, f->code, f->eip, f->eax, f->esp);
		for (;;)
			__asm__ volatile("cli; hlt");
	}
	/* A spurious 7 or 15 is not in service: it must not be acknowledged. */
	if (irq == 7 || irq == 15) {
		u16 pic = irq == 7 ? PIC1 : PIC2;
		outb(pic, 0x0b);
		if (!(inb(pic) & 0x80)) {
			if (irq == 15)
				outb(PIC1, 0x20);
			return;
		}
	}
	if (irq == 0) {
		ticks++;
		serial_receive();
	} else if (irq == 4) {
		serial_receive();
	} else if (ack) {
		ack(irq);
	}
	woken = 1;
	if (irq >= 8)
		outb(PIC2, 0x20);
	outb(PIC1, 0x20);
}

/* Halts until an interrupt came since the last call. Interrupts are on in the meantime, and then as they were. */
void wait_interrupt(void)
{
	u32 flags;

	__asm__ volatile("pushfl; popl %0" : "=r"(flags)::"memory");
	cli();
	if (!woken)
		__asm__ volatile("sti; hlt; cli" ::: "memory");
	woken = 0;
	if (flags & 0x200)
		sti();
}

void interrupt_init(void)
{
	struct { u16 limit; u32 base; } PACKED pointer = { sizeof idt - 1, (u32)idt };
	u32 i, tick;
	u64 start;

	for (i = 0; i < 48; i++) {
		u32 at = (u32)interrupt_entries + 16 * i;
		idt[i].low = at;
		idt[i].selector = 8;
		idt[i].type = 0x8e00;
		idt[i].high = at >> 16;
	}
	__asm__ volatile("lidt %0" ::"m"(pointer));

	outb(PIC1, 0x11);
	outb(PIC2, 0x11);
	outb(PIC1 + 1, VECTOR);
	outb(PIC2 + 1, VECTOR + 8);
	outb(PIC1 + 1, 4);
	outb(PIC2 + 1, 2);
	outb(PIC1 + 1, 1);
	outb(PIC2 + 1, 1);
	outb(0x43, 0x34); /* counter 0, rate generator */
	outb(0x40, (PIT_HZ / HZ) & 0xff);
	outb(0x40, (PIT_HZ / HZ) >> 8);
	irq_unmask(0);
	sti();

	for (tick = ticks; ticks == tick;)
		wait_interrupt();
	start = tsc();
	for (tick = ticks; ticks - tick < 4;)
		wait_interrupt();
	tsc_per_tick = (u32)div64(tsc() - start, 4);
	if (!tsc_per_tick)
		tsc_per_tick = 1;
}
