# The front door. `make` lists what there is; `make demo` goes from a fresh clone to a table.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
RUN := $(BIN)/turbo-eval
JOBS ?=
TOOLS ?=
CUDA_ARCHS ?=
DEMO_MODEL := smollm2-135m
DEMO_CORPUS := news-prose

.PHONY: help setup source demo docs test check vulkan-for-tests test-vulkan test-sanitize golden clean \
	patches-status patches-apply patches-refresh patches-check patches-rebase

help: ## this list
	@grep -hE '^[a-z% -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z% -]+):.*## (.*)/  \1\n      \2/'

# -- prepare ---------------------------------------------------------------------------------------

setup: $(VENV)/.installed source ## venv, package, upstream source, patched worktree, Python bindings
	@$(RUN) patches status | grep -q 'edits the series does not hold' || $(RUN) patches apply >/dev/null
	@$(RUN) bindings --quiet

$(VENV)/.installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "setup: Python 3.11 or newer is needed; install it or set PYTHON=" >&2; exit 4; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "setup: installing packages into $(VENV)"
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@

source: $(VENV)/.installed ## fill llama.cpp/ at the pin (from upstream, else from the package index)
	@$(RUN) source --quiet

build-%: setup ## build one backend into build/BACKEND/bin; TOOLS=minimal leaves out llama-server, llama-cli …
	@$(RUN) build $* $(if $(JOBS),--jobs $(JOBS)) $(if $(CUDA_ARCHS),--cuda-archs '$(CUDA_ARCHS)') \
		$(if $(TOOLS),--tools $(TOOLS))

# -- measure ---------------------------------------------------------------------------------------

demo: ## everything from a fresh clone to a table of perplexities, and how long each stage took
	@stages=(); total=$$SECONDS; \
	stage() { local name=$$1 start=$$SECONDS; shift; echo "── $$name"; "$$@"; \
		stages+=("$$(printf '%-32s %4d s' "$$name" $$((SECONDS - start)))"); }; \
	stage 'setup (packages, source)' $(MAKE) setup; \
	stage 'build (CPU)' $(MAKE) build-cpu; \
	stage 'model and corpus' bash -c '$(RUN) models get $(DEMO_MODEL) && $(RUN) corpora get $(DEMO_CORPUS)'; \
	stage 'sweep' $(RUN) sweep configs/demo.toml; \
	echo; printf '%s\n' "$${stages[@]}"; printf '%-32s %4d s\n' total $$((SECONDS - total)); \
	echo "next: $(RUN) serve $(DEMO_MODEL) --max-kld 0.05"

# -- judge -----------------------------------------------------------------------------------------

docs: setup ## the documentation as a site in build/site; any warning ends it
	@said=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build 2>&1) || { echo "$$said"; exit 1; } # -q would hide warnings from --strict

check: setup docs ## what needs no compiler: ruff, mypy, order of the rooms, patch series, documentation, its tables
	@$(BIN)/ruff check . && $(BIN)/ruff format --check -q .
	@$(BIN)/mypy && $(BIN)/mypy docs/hooks
	@$(BIN)/lint-imports --no-cache >/dev/null || $(BIN)/lint-imports --no-cache
	@$(BIN)/python -m tests.support.structure
	@$(RUN) patches check
	@$(RUN) report --readme --check

test: build-cpu metal-emu-for-tests vulkan-for-tests check ## check, llama.cpp's own tests for the turbo types, pytest with real sweeps
	@build/cpu/bin/test-quantize-fns
	@$(BIN)/python -m tests.kernels.turbo_ops
	@$(BIN)/pytest

# For `make test`: without shader compiler or headers the tests on Vulkan are skipped, with the reason; in CI that is an error.
vulkan-for-tests: setup
	@if said=$$($(RUN) build vulkan --key 2>&1) || test -n "$${CI:-}"; then $(MAKE) build-vulkan TOOLS=minimal; \
		else echo "test: the tests on Vulkan are skipped: $$said"; fi

test-vulkan: build-cpu ## operations and a whole model on a Vulkan device (llvmpipe where there is no GPU), planted faults included
	@$(MAKE) build-vulkan TOOLS=minimal
	@CI=1 $(BIN)/pytest -m '' tests/kernels/test_vulkan.py

SANITIZE := build/sanitize

test-sanitize: setup ## the exact window and a whole model with AddressSanitizer and UBSan: every library is built anew (30 minutes of processor time)
	@$(BIN)/cmake -S build/src -B $(SANITIZE) -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" --log-level=ERROR \
		-DCMAKE_BUILD_TYPE=Release -DLLAMA_SANITIZE_ADDRESS=ON -DLLAMA_SANITIZE_UNDEFINED=ON -DGGML_OPENMP=OFF \
		-DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_APP=OFF -DLLAMA_BUILD_UI=OFF \
		-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=ON
	@$(BIN)/ninja -C $(SANITIZE) $(if $(JOBS),-j$(JOBS)) test-kv-window llama-completion
	@$(RUN) models get $(DEMO_MODEL)
	@$(BIN)/python -m tests.kernels.sanitize $(SANITIZE)/bin "$$($(RUN) models path $(DEMO_MODEL))"

golden: setup ## after a change of output on purpose: write tests/data/golden anew, then read the diff
	@$(BIN)/python -m tests.support.golden

# What a model costs is measured once for all its profiles: they share build/profiles/MODEL.kv-profile.tune.
profiles: setup ## tune the small models of the registry anew: configs/profiles (12 min for the 0.5B on two cores)
	@for model in smollm2-135m qwen2.5-coder-0.5b; do for bits in 3.25 4.25; do \
	  file=build/profiles/$$model.kv-profile.gguf; \
	  $(RUN) tune $$model --bits $$bits --out $$file && \
	  cp $$file configs/profiles/$$model-$$bits.kv-profile.gguf || exit 1; done; done

patches-status: setup ## pin, series, and what build/src holds
	@$(RUN) patches status
patches-apply: setup ## pin + series into build/src
	@$(RUN) patches apply
patches-refresh: setup ## build/src's commits out into patches/
	@$(RUN) patches refresh
patches-check: setup ## is the series sound?
	@$(RUN) patches check
patches-rebase: setup ## move the pin: make patches-rebase REV=b10234
	@$(RUN) patches rebase "$(REV)"

clean: ## remove builds and the worktree (edits in build/src are lost), keep .venv and downloads
	@rm -rf build && if [ -e llama.cpp/.git ]; then git -C llama.cpp worktree prune; fi

include metal-emu/targets.mk
