/* Boot sector: loads the body with one INT 13h extended read (EDD 3.0, AH=42h),
 * notes the memory size (INT 15h AX=E801h), enters 32-bit flat protected mode.
 * Then the interrupt entry points. */

	.section .boot, "ax"
	.code16
	.globl start
start:
	cli
	xorw	%ax, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	$0x7c00, %sp
	sti
	cld
	ljmp	$0, $1f
1:	movb	%dl, boot_drive

	movw	$5, %bp			/* tries */
2:	movb	boot_drive, %dl
	movw	$packet, %si
	movb	$0x42, %ah
	int	$0x13
	jnc	3f
	xorw	%ax, %ax		/* reset the drive, try again */
	movb	boot_drive, %dl
	int	$0x13
	decw	%bp
	jnz	2b
	movw	$message, %si
	jmp	fail

3:	movw	$0xe801, %ax
	xorw	%bx, %bx
	xorw	%cx, %cx
	xorw	%dx, %dx
	int	$0x15
	jc	4f
	testw	%cx, %cx
	jz	5f
	movw	%cx, %ax		/* some BIOSes answer in CX and DX only */
	movw	%dx, %bx
5:	movw	%ax, boot_kib		/* KiB from 1 to 16 MiB */
	movw	%bx, boot_64kib		/* 64 KiB blocks above 16 MiB */
4:
	inb	$0x92, %al		/* A20, without a reset by bit 0 */
	orb	$2, %al
	andb	$0xfe, %al
	outb	%al, $0x92

	cli
	lgdtl	gdt_pointer
	movl	%cr0, %eax
	orl	$1, %eax
	movl	%eax, %cr0
	ljmpl	$8, $flat

fail:	movw	$0x3fd, %dx		/* the message goes to COM1 */
6:	inb	%dx, %al
	testb	$0x20, %al
	jz	6b
	lodsb
	testb	%al, %al
	jz	7f
	movw	$0x3f8, %dx
	outb	%al, %dx
	jmp	fail
7:	hlt
	jmp	7b

	.code32
flat:	movw	$16, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movw	%ax, %fs
	movw	%ax, %gs
	movl	$stack_top, %esp
	movl	$bss_start, %edi
	movl	$bss_end, %ecx
	subl	%edi, %ecx
	shrl	$2, %ecx
	xorl	%eax, %eax
	rep stosl
	pushl	$0
	jmp	guest_main

	.balign 8
gdt:	.quad	0
	.quad	0x00cf9a000000ffff	/* code, 0 to 4 GiB */
	.quad	0x00cf92000000ffff	/* data, 0 to 4 GiB */
gdt_pointer:
	.word	. - gdt - 1
	.long	gdt
	.balign 4
packet:	.byte	16, 0
	.word	body_sectors
	.word	0, 0x1000		/* to 1000:0000 */
	.quad	1			/* from LBA 1 */
message: .asciz	"err boot disk read failed\r\n"
	.globl boot_kib, boot_64kib, boot_drive
boot_drive: .byte 0
	.balign 2
boot_kib: .word 0
boot_64kib: .word 0
	.org	510
	.word	0xaa55

/* Interrupt entry points: vectors 0 to 47 push a uniform frame and call
 * interrupt(struct frame *). */
	.section .text, "ax"
	.globl interrupt_entries
	.balign 16
interrupt_entries:
	.set	i, 0
	.rept	48
	.balign 16
	.if !(i == 8 || (i >= 10 && i <= 14) || i == 17)
	pushl	$0			/* the processor pushed no error code */
	.endif
	pushl	$i
	jmp	common
	.set	i, i + 1
	.endr

common:	pushal
	cld
	pushl	%esp
	call	interrupt
	addl	$4, %esp
	popal
	addl	$8, %esp
	iret

	.section .bss
	.balign 16
	.skip	65536
stack_top:
