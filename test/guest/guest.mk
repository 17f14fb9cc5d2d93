# The lab's test guest: a raw disk image that boots it (README.md beside this file).
#
# Stands alone, `make -f test/guest/guest.mk`, and can be included by the
# Makefile of the project's root. Two builds give the same bytes. The body of
# the disk, from sector 128 on, is zero: tests write there.

GUEST_DIR := $(dir $(lastword $(MAKEFILE_LIST)))src
GUEST_BUILD ?= build
GUEST_IMG := $(GUEST_BUILD)/guest.img
GUEST_OBJ_DIR := $(GUEST_BUILD)/guest
GUEST_SRC := $(wildcard $(GUEST_DIR)/*.c) $(GUEST_DIR)/boot.S
GUEST_OBJ := $(patsubst $(GUEST_DIR)/%,$(GUEST_OBJ_DIR)/%.o,$(GUEST_SRC))
GUEST_SIZE := 8M
GUEST_CC ?= gcc
GUEST_CFLAGS := -m32 -march=i686 -mgeneral-regs-only -std=gnu11 -Os -ffreestanding -fno-pic -fno-pie -fno-stack-protector \
	-fno-strict-aliasing -fno-asynchronous-unwind-tables -fcf-protection=none -Wall -Wextra

.PHONY: guest
guest: $(GUEST_IMG)

$(GUEST_OBJ_DIR)/%.o: $(GUEST_DIR)/% $(GUEST_DIR)/guest.h $(wildcard $(GUEST_DIR)/*.h) $(lastword $(MAKEFILE_LIST))
	@mkdir -p $(GUEST_OBJ_DIR)
	@$(GUEST_CC) $(GUEST_CFLAGS) -c -o $@ $<

$(GUEST_OBJ_DIR)/guest.elf: $(GUEST_OBJ) $(GUEST_DIR)/guest.ld
	@ld -m elf_i386 -nostdlib -static --build-id=none -z noexecstack --no-warn-rwx-segments -T $(GUEST_DIR)/guest.ld -o $@ $(GUEST_OBJ)

$(GUEST_IMG): $(GUEST_OBJ_DIR)/guest.elf
	@objcopy -O binary -j .boot $< $(GUEST_OBJ_DIR)/boot.bin
	@objcopy -O binary -j .body $< $(GUEST_OBJ_DIR)/body.bin
	@cat $(GUEST_OBJ_DIR)/boot.bin $(GUEST_OBJ_DIR)/body.bin > $@.new
	@truncate -s $(GUEST_SIZE) $@.new
	@mv $@.new $@
