/* Strings, CRC-32, the test pattern, output. No C library is linked. */
#include "guest.h"

void *memcpy(void *to, const void *from, u32 n)
{
	void *d = to;
	__asm__ volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(n)::"memory");
	return to;
}

void *memmove(void *to, const void *from, u32 n)
{
	u8 *d = to;
	const u8 *s = from;

	if (d <= s || d >= s + n)
		return memcpy(to, from, n);
	while (n--)
		d[n] = s[n];
	return to;
}

void *memset(void *to, int c, u32 n)
{
	void *d = to;
	__asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
	return to;
}

int memcmp(const void *a, const void *b, u32 n)
{
	const u8 *x = a, *y = b;

	for (; n; n--, x++, y++)
		if (*x != *y)
			return *x - *y;
	return 0;
}

u32 strlen(const char *s)
{
	u32 n = 0;

	while (s[n])
		n++;
	return n;
}

int streq(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return *a == *b;
}

/* CRC-32 as in IEEE 802.3 and Go's hash/crc32.ChecksumIEEE; start with 0. */
u32 crc32(u32 crc, const void *data, u32 n)
{
	static u32 table[256];
	const u8 *p = data;
	u32 i, bit, c;

	if (!table[1])
		for (i = 0; i < 256; i++) {
			for (c = i, bit = 0; bit < 8; bit++)
				c = c >> 1 ^ (c & 1 ? 0xedb88320u : 0);
			table[i] = c;
		}
	for (crc = ~crc; n; n--)
		crc = table[(u8)crc ^ *p++] ^ crc >> 8;
	return ~crc;
}

/* The test pattern: little-endian 32-bit words, each a hash of the seed and its
 * index, so that any part can be made alone and a shifted or stale block
 * differs. Disks count from LBA 0 (128 words a sector), transfers and memory
 * from their start. The Go side is Pattern in test/guest/peer. */
u32 pattern_word(u32 seed, u32 index)
{
	u32 x = seed * 0x9e3779b1u + index;

	x = (x ^ x >> 16) * 0x85ebca6bu;
	x = (x ^ x >> 13) * 0xc2b2ae35u;
	return x ^ x >> 16;
}

void pattern_fill(u32 seed, u32 first_word, u32 *to, u32 words)
{
	u32 i;

	for (i = 0; i < words; i++)
		to[i] = pattern_word(seed, first_word + i);
}

/* Words that differ. */
u32 pattern_mismatch(u32 seed, u32 first_word, const u32 *at, u32 words)
{
	u32 i, bad = 0;

	for (i = 0; i < words; i++)
		if (at[i] != pattern_word(seed, first_word + i))
			bad++;
	return bad;
}

u64 div64(u64 n, u32 by)
{
	u32 high = n >> 32, low = (u32)n, rest = high % by, quotient;

	__asm__("divl %2" : "=a"(quotient), "+d"(rest) : "rm"(by), "a"(low));
	return (u64)(high / by) << 32 | quotient;
}

static int hex_digit(char c)
{
	if (c >= '0' && c <= '9')
		return c - '0';
	c |= 0x20;
	if (c >= 'a' && c <= 'f')
		return c - 'a' + 10;
	return -1;
}

/* Decimal, or hexadecimal after 0x. Returns 0 if s is no number. */
int parse_number(const char *s, u64 *out)
{
	u32 base = 10;
	u64 v = 0;

	if (s[0] == '0' && (s[1] | 0x20) == 'x')
		base = 16, s += 2;
	if (!*s)
		return 0;
	for (; *s; s++) {
		int d = hex_digit(*s);
		if (d < 0 || (u32)d >= base)
			return 0;
		v = v * base + d;
	}
	*out = v;
	return 1;
}

/* Dotted IPv4 address to host order. */
int parse_ip(const char *s, u32 *out)
{
	u32 ip = 0, part, i;

	for (i = 0; i < 4; i++) {
		if (*s < '0' || *s > '9')
			return 0;
		for (part = 0; *s >= '0' && *s <= '9'; s++)
			if ((part = part * 10 + (*s - '0')) > 255)
				return 0;
		ip = ip << 8 | part;
		if (*s != (i < 3 ? '.' : 0))
			return 0;
		s++;
	}
	*out = ip;
	return 1;
}

int parse_hex(const char *s, u8 *to, u32 max)
{
	u32 n = 0;

	for (; *s; s += 2) {
		int high = hex_digit(s[0]), low = high < 0 ? -1 : hex_digit(s[1]);
		if (low < 0 || n == max)
			return -1;
		to[n++] = high << 4 | low;
	}
	return n;
}

void *alloc(u32 size, u32 align)
{
	static u32 next = HEAP_START;
	u32 at = (next + align - 1) & ~(align - 1);

	if (size > HEAP_END - at)
		return NULL;
	next = at + size;
	memset((void *)at, 0, size);
	return (void *)at;
}

static void put_number(u64 v, u32 base, u32 width, char pad)
{
	char digits[24];
	u32 n = 0;

	do {
		u64 q = div64(v, base);
		digits[n++] = "0123456789abcdef"[(u32)(v - q * base)];
		v = q;
	} while (v);
	while (width-- > n)
		serial_putc(pad);
	while (n)
		serial_putc(digits[--n]);
}

/* A printf with %s %c %d %u %x %%, ll, zero padding and width; \n ends a line with CR LF. */
void put(const char *format, ...)
{
	__builtin_va_list args;

	__builtin_va_start(args, format);
	for (; *format; format++) {
		u32 width = 0, wide = 0;
		char pad = ' ';

		if (*format == '\n')
			serial_putc('\r');
		if (*format != '%') {
			serial_putc(*format);
			continue;
		}
		format++;
		if (*format == '0')
			pad = '0';
		while (*format >= '0' && *format <= '9')
			width = width * 10 + (*format++ - '0');
		while (*format == 'l')
			wide++, format++;
		switch (*format) {
		case 's': {
			const char *s = __builtin_va_arg(args, const char *);
			while (*s)
				serial_putc(*s++);
			break;
		}
		case 'c':
			serial_putc(__builtin_va_arg(args, int));
			break;
		case 'd': {
			s32 v = __builtin_va_arg(args, s32);
			if (v < 0)
				serial_putc('-');
			put_number(v < 0 ? -(u32)v : (u32)v, 10, width, pad);
			break;
		}
		case 'u':
		case 'x': {
			u64 v = wide == 2 ? __builtin_va_arg(args, u64) : __builtin_va_arg(args, u32);
			put_number(v, *format == 'x' ? 16 : 10, width, pad);
			break;
		}
		default:
			serial_putc(*format);
		}
	}
	__builtin_va_end(args);
}
