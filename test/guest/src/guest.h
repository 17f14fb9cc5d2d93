/* The test guest: what its files share. */
#ifndef GUEST_H
#define GUEST_H

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed int s32;

#define NULL ((void *)0)
#define PACKED __attribute__((packed))
#define ARRAY_SIZE(a) (sizeof(a) / sizeof((a)[0]))

/* Memory map above 1 MiB. SeaBIOS keeps its own data at the top of memory. */
#define HEAP_START 0x00400000u /* NIC rings and buffers */
#define HEAP_END 0x00f00000u
#define BOOT_RECORD 0x00f00000u /* survives a reset, see main.c */
#define PATTERN_START 0x01000000u /* `mem fill` */
#define PATTERN_SIZE 0x00800000u
#define MEMORY_NEEDED_KIB 0x8000u

/* Port access. */
static inline void outb(u16 p, u8 v) { __asm__ volatile("outb %0, %1" ::"a"(v), "Nd"(p)); }
static inline void outw(u16 p, u16 v) { __asm__ volatile("outw %0, %1" ::"a"(v), "Nd"(p)); }
static inline void outl(u16 p, u32 v) { __asm__ volatile("outl %0, %1" ::"a"(v), "Nd"(p)); }
static inline u8 inb(u16 p) { u8 v; __asm__ volatile("inb %1, %0" : "=a"(v) : "Nd"(p)); return v; }
static inline u16 inw(u16 p) { u16 v; __asm__ volatile("inw %1, %0" : "=a"(v) : "Nd"(p)); return v; }
static inline u32 inl(u16 p) { u32 v; __asm__ volatile("inl %1, %0" : "=a"(v) : "Nd"(p)); return v; }
static inline void insw(u16 p, void *to, u32 words)
{
	__asm__ volatile("rep insw" : "+D"(to), "+c"(words) : "d"(p) : "memory");
}
static inline void insl(u16 p, void *to, u32 longs)
{
	__asm__ volatile("rep insl" : "+D"(to), "+c"(longs) : "d"(p) : "memory");
}
static inline void outsw(u16 p, const void *from, u32 words)
{
	__asm__ volatile("rep outsw" : "+S"(from), "+c"(words) : "d"(p) : "memory");
}
static inline void outsl(u16 p, const void *from, u32 longs)
{
	__asm__ volatile("rep outsl" : "+S"(from), "+c"(longs) : "d"(p) : "memory");
}
static inline void cli(void) { __asm__ volatile("cli" ::: "memory"); }
static inline void sti(void) { __asm__ volatile("sti" ::: "memory"); }
static inline void barrier(void) { __asm__ volatile("" ::: "memory"); }

/* lib.c */
void *memcpy(void *to, const void *from, u32 n);
void *memmove(void *to, const void *from, u32 n);
void *memset(void *to, int c, u32 n);
int memcmp(const void *a, const void *b, u32 n);
u32 strlen(const char *s);
int streq(const char *a, const char *b);
u32 crc32(u32 crc, const void *data, u32 n);
u32 pattern_word(u32 seed, u32 index);
void pattern_fill(u32 seed, u32 first_word, u32 *to, u32 words);
u32 pattern_mismatch(u32 seed, u32 first_word, const u32 *at, u32 words);
u64 div64(u64 n, u32 by);
int parse_number(const char *s, u64 *out);
int parse_ip(const char *s, u32 *out);
int parse_hex(const char *s, u8 *to, u32 max); /* bytes, or -1 */
void *alloc(u32 size, u32 align);                /* never freed; NULL when the heap is full */
void put(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* serial.c */
void serial_init(void);
void serial_putc(char c);
void serial_receive(void);
char *serial_line(void);

/* interrupt.c */
#define HZ 100u
extern volatile u32 ticks;
void interrupt_init(void);
void irq_unmask(u8 irq);
void irq_ack_hook(void (*hook)(u8 irq));
void wait_interrupt(void);
u64 tsc(void);
u32 tsc_us(u64 since);

/* main.c */
void background(void);
void idle(void);
u64 number_arg(int argc, char **argv, int i, u64 otherwise);
int on_off(const char *s);

/* pci.c */
struct pci_device {
	u8 bus, slot, func, irq;
	u16 vendor, device;
	u32 class_code; /* class, subclass, interface */
};
u32 pci_read(const struct pci_device *d, u8 offset);
void pci_write(const struct pci_device *d, u8 offset, u32 value);
u32 pci_scan(struct pci_device *list, u32 max);
u32 pci_bar(const struct pci_device *d, int bar);
void pci_enable(const struct pci_device *d);
void pci_command(int argc, char **argv);

/* ata.c */
void ata_command(int argc, char **argv);
void cd_command(int argc, char **argv);
int ata_background(void);

/* unplug.c */
void unplug_boot(u32 boot);
void unplug_command(int argc, char **argv);

/* state.c */
void mem_command(int argc, char **argv);
void vga_command(int argc, char **argv);
void cmos_command(int argc, char **argv);
void poweroff_command(int argc, char **argv);
void suspend_command(int argc, char **argv);
void reboot_command(int argc, char **argv);
void crash_command(int argc, char **argv);

/* nic.c */
void nic_command(int argc, char **argv);
void nic_poll(void);

#endif
