/* PCI configuration space through mechanism 1 (PCI Local Bus 2.1, 3.2.2.3.2). */
#include "guest.h"

#define ADDRESS 0xcf8
#define DATA 0xcfc

u32 pci_read(const struct pci_device *d, u8 offset)
{
	outl(ADDRESS, 0x80000000u | d->bus << 16 | d->slot << 11 | d->func << 8 | (offset & 0xfc));
	return inl(DATA);
}

void pci_write(const struct pci_device *d, u8 offset, u32 value)
{
	outl(ADDRESS, 0x80000000u | d->bus << 16 | d->slot << 11 | d->func << 8 | (offset & 0xfc));
	outl(DATA, value);
}

/* Bus 0 only: nothing that the guest is tried with has a bridge. Returns how many were found. */
u32 pci_scan(struct pci_device *list, u32 max)
{
	struct pci_device d = { 0 };
	u32 n = 0, id, functions;

	for (d.slot = 0; d.slot < 32; d.slot++) {
		functions = 1;
		for (d.func = 0; d.func < functions; d.func++) {
			id = pci_read(&d, 0x00);
			if ((u16)id == 0xffff)
				continue;
			if (d.func == 0 && pci_read(&d, 0x0c) & 0x00800000)
				functions = 8;
			d.vendor = id;
			d.device = id >> 16;
			d.class_code = pci_read(&d, 0x08) >> 8;
			d.irq = pci_read(&d, 0x3c);
			if (n < max)
				list[n++] = d;
		}
	}
	return n;
}

u32 pci_bar(const struct pci_device *d, int bar)
{
	u32 v = pci_read(d, 0x10 + 4 * bar);

	return v & 1 ? v & ~3u : v & ~15u;
}

/* I/O, memory and bus master on, INTx not disabled. */
void pci_enable(const struct pci_device *d)
{
	pci_write(d, 0x04, ((pci_read(d, 0x04) & 0xffff) | 7) & ~0x400u);
}

void pci_command(int argc, char **argv)
{
	static struct pci_device list[64];
	u32 n = pci_scan(list, ARRAY_SIZE(list)), i, bar;

	(void)argc, (void)argv;
	put("ok pci count=%u", n);
	for (i = 0; i < n; i++) {
		struct pci_device *d = &list[i];
		put(" %02x:%02x.%u=%04x:%04x,%06x,irq%u", d->bus, d->slot, d->func, d->vendor, d->device, d->class_code, d->irq);
		if (pci_read(d, 0x0c) & 0x007f0000)
			continue; /* not an ordinary header: no six BARs */
		for (bar = 0; bar < 6; bar++) {
			u32 v = pci_read(d, 0x10 + 4 * bar);
			if (v)
				put(",bar%u=%s:%x", bar, v & 1 ? "io" : "mem", pci_bar(d, bar));
			if ((v & 7) == 4)
				bar++; /* 64-bit: the next one is its upper half */
		}
	}
	put("\n");
}
