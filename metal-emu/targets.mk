# Included by the Makefile at the root. The emulator runs llama.cpp's Metal kernels on this machine's CPU.

METAL_EMU := build/metal-emu

.PHONY: metal-emu test-metal
metal-emu: build-cpu ## llama.cpp's Metal backend with its kernels compiled for this CPU (needs clang 16 or newer)
	@$(MAKE) -s -C metal-emu have-clang 2>/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
		echo "metal-emu: installing clang-16" && apt-get update -qq && \
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends clang-16 >/dev/null; } || true
	@$(MAKE) -C metal-emu -j$(or $(JOBS),$(shell nproc)) SRC=$(CURDIR)/build/src BIN=$(CURDIR)/build/cpu/bin \
		OUT=$(CURDIR)/$(METAL_EMU)

test-metal: metal-emu ## every K/V pair, lane order and GPU family on the emulated Metal device, planted faults included
	@$(RUN) models get $(DEMO_MODEL) && $(RUN) corpora get $(DEMO_CORPUS)
	@$(PYTHON) metal-emu/run_tests.py --src build/src --bin build/cpu/bin --out $(METAL_EMU) \
		--model "$$($(RUN) models path $(DEMO_MODEL))" --text "$$($(RUN) corpora path $(DEMO_CORPUS))"
