# Two commands from a fresh clone: `make demo` and `make test`. They need Python 3.11 or newer, and make.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
RUN    := OMP_NUM_THREADS=1 $(BIN)/python -m
BENCH  := $(PYTHON) -m tests.bench
BOTH   := --device cuda --backend cuda --backend triton

.DEFAULT_GOAL := help
.PHONY: help demo test lint types unit gpu clean
.DELETE_ON_ERROR:

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(READY) ## set up .venv, then run a workload through the real cache and draw where its memory went
	$(BIN)/pagemgr demo

test: lint types unit ## set up .venv, then run every check

lint: $(READY) ## style (ruff)
	$(RUN) ruff check .
	$(RUN) ruff format --check .

types: $(READY) ## types (mypy --strict)
	$(RUN) mypy

unit: $(READY) ## all tests, those of layers and packaging included
	$(RUN) pytest -n 2 --dist loadgroup

gpu: ## on a GPU machine: build, test, benchmark both GPU backends with the python at hand; nothing is installed
	$(PYTHON) -m pagemgr build cuda
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest --gpu \
	  $$($(PYTHON) -c 'import os, xdist; print("-n", os.cpu_count(), "--dist worksteal")' 2>/dev/null)
	@mkdir -p build
	$(BENCH).attention $(BOTH) --json build/attention.json --plot build/roofline.png
	$(BENCH).swap --json build/swap.json
	$(BENCH).attention $(BOTH) --json build/attention-fp8.json --kv-dtype float8_e4m3fn

clean: ## remove .venv and whatever was built or cached
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: pagemgr needs Python 3.11 or newer, '$(PYTHON)' is not; try: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' || { \
	  echo "error: '$(PYTHON)' cannot make virtual environments; on Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@echo "setting up $(VENV): this takes a minute or two, once"
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@
