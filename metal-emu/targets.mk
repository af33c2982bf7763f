# Included by the Makefile at the root. The emulator runs llama.cpp's Metal kernels on this machine's CPU.

METAL_EMU := build/metal-emu

.PHONY: metal-emu metal-emu-clang metal-emu-for-tests test-metal
metal-emu: build-cpu metal-emu-clang ## llama.cpp's Metal backend with its kernels compiled for this CPU (needs clang 16 or newer)
	@$(MAKE) -C metal-emu -j$(or $(JOBS),$(shell nproc)) SRC=$(CURDIR)/build/src BIN=$(CURDIR)/build/cpu/bin \
		OUT=$(CURDIR)/$(METAL_EMU)

# root on Debian gets the compiler, everybody else a message from the build
metal-emu-clang:
	@$(MAKE) -s -C metal-emu have-clang 2>/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		echo "metal-emu: installing clang-16" && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends clang-16 >/dev/null; } || true

# For `make test`: without clang the tests of the kernels are skipped, with the reason; in CI that is an error.
metal-emu-for-tests: build-cpu metal-emu-clang
	@if test "$$(uname)" != Linux; then echo "test: the emulated Metal device needs Linux, its tests are skipped"; \
		elif test -n "$${CI:-}" || $(MAKE) -s -C metal-emu have-clang 2>/dev/null; then $(MAKE) metal-emu; \
		else echo "test: no clang 16 or newer, the tests of the Metal kernels are skipped"; fi

test-metal: metal-emu ## every K/V pair, lane order and GPU family on the emulated Metal device, planted faults included
	@$(RUN) models get $(DEMO_MODEL) && $(RUN) corpora get $(DEMO_CORPUS)
	@$(PYTHON) metal-emu/run_tests.py --src build/src --bin build/cpu/bin --out $(METAL_EMU) \
		--model "$$($(RUN) models path $(DEMO_MODEL))" --text "$$($(RUN) corpora path $(DEMO_CORPUS))"
