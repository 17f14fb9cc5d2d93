# make lab    boots Xen in an emulator, and in it a guest whose QEMU runs under stubinit
# make test   runs every tier of tests that this machine can run, the lab included
# make help   lists the rest

SUITE ?= trixie
SUITES ?= trixie bookworm
# Suites whose small image is tested too. It takes 8 minutes to compile where there is no cache of it.
IMAGES ?=
BUILD := build
VERSION := $(shell git describe --always --dirty 2>/dev/null || echo unknown)
GO ?= go
# What PID 1 is built with: static, and the same bytes from the same source.
GOSTATIC := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false

# The lab's clocks count instructions, so that a busy machine changes no result; ICOUNT=0 is quicker by hand.
ICOUNT ?= 1
LABFLAGS := $(if $(filter 1,$(ICOUNT)),-icount)

.DELETE_ON_ERROR:
.PHONY: help deps build initrd image image-twice guest lab lab-shell test test-plain test-integration test-lab bench check soak clean FORCE

help:
	@sed -n 's/^# \(make .*\)/\1/p' $(MAKEFILE_LIST)
# make deps   installs the Debian packages that all this needs
# make build  builds stubinit and mkinitramfs
# make initrd builds the image for SUITE (trixie, bookworm) in build/SUITE
# make image  builds the small image for trixie in build/trixie-small: QEMU and kernel compiled from Debian's sources, once
# make image-twice  compiles them again in a fresh chroot, and fails if one byte differs
# make check  is for before a commit: format, vet, staticcheck, race detector, arm64
# make soak   is for what takes too long for every change
# make bench  measures both images against a shell script (docs/bench), and the QMP endpoint against Debian's (docs/vchan-bench.md)
# make lab-shell  gives a shell in the lab's dom0

deps:
	@scripts/install-deps

build: $(BUILD)/stubinit $(BUILD)/mkinitramfs

$(BUILD)/stubinit: FORCE
	@$(GOSTATIC) -ldflags "-s -w -X main.version=$(VERSION)" -o $@ ./cmd/stubinit

$(BUILD)/mkinitramfs: FORCE
	@$(GO) build -o $@ ./cmd/mkinitramfs

initrd: initrd-$(SUITE)

# Made anew each time: the builder takes seconds, and knows its inputs better than make does.
initrd-%: deps build
	@$(BUILD)/mkinitramfs -suite $* -o $(BUILD)/$*

image: image-$(SUITE)

# What was compiled once is found again by a hash of all its inputs (scripts/build-image).
image-%: deps build
	@scripts/build-image $* $(BUILD)/root/$*-small
	@$(BUILD)/mkinitramfs -root $(BUILD)/root/$*-small -manifest configs/initramfs-small.manifest -compress zstd-19 -o $(BUILD)/$*-small

image-twice: image
	@STUBINIT_TWICE=1 scripts/build-image $(SUITE) $(BUILD)/root/$(SUITE)-small

include test/guest/guest.mk

lab: initrd guest
	@$(GO) run ./test/lab/cmd/lab -suite $(SUITE) $(if $(IMAGE),-image $(IMAGE))

lab-shell: initrd guest
	@$(GO) run ./test/lab/cmd/lab -suite $(SUITE) $(if $(IMAGE),-image $(IMAGE)) -shell

test: test-plain test-integration test-lab

# Each tier runs everything and fails at its end, so that one failure does not hide another.
test-plain: deps
	$(GO) test ./...

test-integration: deps guest
	@[ "$$(id -u)" = 0 ] || { echo "make test-integration: needs root (network namespaces)" >&2; exit 1; }
	$(GO) test -tags integration -count 1 ./...

# The first suite's tests are seen as they run; the others run beside it and are shown after it.
test-lab: $(SUITES:%=initrd-%) $(IMAGES:%=image-%) guest
	@$(GO) vet -tags lab ./test/...
	@scripts/test-lab $(LABFLAGS) -- $(SUITES) $(IMAGES:%=%-small)

soak: $(SUITES:%=initrd-%) $(IMAGES:%=image-%) guest
	@scripts/test-lab $(LABFLAGS) -soak -- $(SUITES) $(IMAGES:%=%-small)

bench: initrd image guest
	@scripts/bench/build-images $(SUITE) $(BUILD)/bench/$(SUITE)
	$(GO) run ./test/bench -suite $(SUITE) -o docs/bench
	$(GO) test -tags lab -count 1 -timeout 60m -v ./test/e2e -suite $(SUITE) -name bench -icount -run 'TestVchan/Speed' -vchan-table $(CURDIR)/docs/vchan-bench.md

check: deps
	@unformatted=$$(gofmt -l $$(git ls-files '*.go')); [ -z "$$unformatted" ] || { echo "gofmt -w $$unformatted" >&2; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags integration ./...
	$(GO) vet -tags lab ./test/...
	$(GO) tool staticcheck ./...
	GOARCH=arm64 $(GOSTATIC) -o /dev/null ./cmd/stubinit
	$(GO) mod tidy -diff
	$(GO) test -race ./...

clean:
	rm -rf $(BUILD)

FORCE:
