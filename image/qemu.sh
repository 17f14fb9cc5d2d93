#!/bin/bash
# Usage: qemu.sh QEMU.tar.xz PIXMAN.tar.gz DEVICES XS.c BUILDDIR DESTDIR
#
# Builds the stubdomain's QEMU: one static program without patches. Runs in the chroot that scripts/build-image makes.
# DESTDIR gets usr/bin/qemu-system-i386. A run that was interrupted goes on in BUILDDIR.
set -euo pipefail
export LC_ALL=C
source=$1 pixman=$2 devices=$3 xs=$4 build=$5 dest=$6
mkdir -p "$build"
cd "$build"

# Debian has no static pixman. Its fast paths for each instruction set are for desktops; nobody draws here.
if [ ! -e pixman.done ]; then
	echo "compiling pixman"
	rm -rf pixman
	mkdir pixman
	tar -x -f "$pixman" -C pixman --strip-components 1
	CFLAGS='-fstack-protector-strong -ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-unwind-tables' \
		meson setup pixman/build pixman --prefix=/usr --libdir=lib/x86_64-linux-gnu --buildtype=minsize -Ddefault_library=static \
		-Db_staticpic=true -Dmmx=disabled -Dsse2=disabled -Dssse3=disabled -Dtests=disabled -Ddemos=disabled -Dlibpng=disabled \
		-Dgtk=disabled -Dopenmp=disabled >pixman.log ||
		{ tail -n 30 pixman.log >&2; exit 1; }
	ninja -C pixman/build install >>pixman.log || { tail -n 30 pixman.log >&2; exit 1; }
	touch pixman.done
fi

# Why: xs.c.
if [ ! -e xs.done ]; then
	gcc -Os -fPIE -Wall -Wextra -Werror -fstack-protector-strong -ffunction-sections -fdata-sections -c -o xs.o "$xs"
	rm -f /usr/lib/x86_64-linux-gnu/libxenstore.a
	ar rcsD /usr/lib/x86_64-linux-gnu/libxenstore.a xs.o
	touch xs.done
fi

if [ ! -e qemu.configured ]; then
	echo "configuring QEMU"
	rm -rf qemu
	mkdir -p qemu/build
	tar -x -f "$source" -C qemu --strip-components 1
	cp "$devices" qemu/configs/devices/i386-softmmu/stubdom.mak
	# With a bzip2 QEMU's build unpacks UEFI firmware, which Debian's source does not have.
	rm -f /usr/bin/bzip2
	# The defaults bring hundreds of devices and a dozen libraries that no stubdomain uses.
	(cd qemu/build && ../configure --target-list=i386-softmmu --static --prefix=/usr --firmwarepath=/usr/share/qemu:/usr/share/seabios:/usr/lib/ipxe/qemu --disable-relocatable \
		--without-default-features --without-default-devices --with-devices-i386=stubdom \
		--enable-stack-protector --enable-seccomp --enable-pixman --enable-vnc --enable-trace-backends=log \
		--enable-xen --enable-xen-pci-passthrough --disable-tcg --disable-kvm --audio-drv-list= \
		--disable-download --disable-fdt --disable-docs --disable-tools --disable-guest-agent --disable-user --disable-install-blobs \
		-Doptimization=s --disable-debug-info \
		--extra-cflags='-ffunction-sections -fdata-sections -fno-asynchronous-unwind-tables -fno-unwind-tables' \
		--extra-ldflags='-Wl,--gc-sections -Wl,-z,pack-relative-relocs -Wl,-z,now -Wl,-z,noexecstack') >qemu.log 2>&1 ||
		{ tail -n 40 qemu.log >&2; exit 1; }
	touch qemu.configured
fi
echo "compiling QEMU"
# ninja counts what is left: every hundredth line is enough.
ninja -C qemu/build qemu-system-i386 | tee ninja.log | while read -r count _; do [[ $count != *00/* ]] || echo "$count"; done ||
	{ grep -A 20 FAILED ninja.log >&2; exit 1; }
mkdir -p "$dest/usr/bin"
strip -o "$dest/usr/bin/qemu-system-i386" qemu/build/qemu-system-i386
