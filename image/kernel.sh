#!/bin/bash
# Usage: kernel.sh SOURCE.tar.xz CONFIG BUILDDIR DESTDIR
#
# Builds the stubdomain's kernel. Runs in the chroot that scripts/build-image makes. DESTDIR gets boot/vmlinuz-RELEASE,
# boot/config-RELEASE and boot/System.map-RELEASE. A run that was interrupted goes on in BUILDDIR.
set -euo pipefail
export LC_ALL=C
source=$1 config=$2 build=$3 dest=$4

# What else the kernel would put into itself: who built it, where and when.
export KBUILD_BUILD_USER=stubinit KBUILD_BUILD_HOST=stubinit KBUILD_BUILD_VERSION=1 KBUILD_BUILD_TIMESTAMP="@$SOURCE_DATE_EPOCH"

if [ ! -e "$build/.unpacked" ]; then
	echo "unpacking Linux"
	rm -rf "$build"
	mkdir -p "$build"
	tar -x -f "$source" -C "$build" --strip-components 1
	touch "$build/.unpacked"
fi
cd "$build"
make -s KCONFIG_ALLCONFIG="$config" allnoconfig

# Kconfig drops without a word what depends on something that is not set.
refused=$(grep -E '^(CONFIG_|# CONFIG_.* is not set)' "$config" | sort | comm -23 - <(sort .config))
[ -z "$refused" ] || { printf 'kernel.sh: Kconfig does not take these lines of %s:\n%s\n' "$config" "$refused" >&2; exit 1; }

release=$(make -s kernelrelease)
echo "compiling Linux $release"
# Flags of single objects, as the kernel's own Makefiles give them.
objects=(
	# Under Xen a kernel without SMP looks for an MP table in the first MiB as if there were a BIOS: it maps and unmaps what is left
	# of it 4096 times (smp_scan_config), in 140 000 hypercalls. One with SMP does not (xen_smp_init), and puts this in its place.
	CFLAGS_x86_init.o=-Dmpparse_find_mptable=x86_init_noop
)
# The initramfs is unpacked by code that is for speed, not for size.
for object in decompress/{huf_decompress,zstd_decompress,zstd_decompress_block} common/{entropy_common,fse_decompress} xxhash; do
	objects+=("CFLAGS_$object.o=-O2")
done
# The linker script aligns code, constants and data to 2 MiB, for large pages, which a PV domain does not have; and what is between
# code and code is not given back. It uses PMD_SIZE and PMD_SHIFT for these alignments only. The pair of functions against SRSO
# still needs one that differs in four bits, the first with all of them clear, the highest bit 20; the linker checks it.
objects+=("CPPFLAGS_vmlinux.lds=-Ux86_64 -D_ASM_X86_PGTABLE_64_DEFS_H -DPMD_SHIFT=12 '-DPMD_SIZE=(. & 0x100000 ? 0x200000 : 0x8000)'")
make -s -j"$(nproc)" "${objects[@]}" bzImage
mkdir -p "$dest/boot"
cp arch/x86/boot/bzImage "$dest/boot/vmlinuz-$release"
cp .config "$dest/boot/config-$release"
cp System.map "$dest/boot/System.map-$release"
