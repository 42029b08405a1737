# One command each on a machine with Python 3.11, make and pip: `make quickstart`, `make test`.
.DEFAULT_GOAL := help
.SHELLFLAGS := -eu -c

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
TORCH := $(shell sed -n 's/^torch==//p' requirements-cpu.lock)
CPU_INDEX := https://download.pytorch.org/whl/cpu
PYTEST := $(BIN)/python -m pytest

.PHONY: help install install-dev quickstart test test-integration test-faults lint format bench paper-table ablations \
	seven-types clean

help:
	@echo "make install            the environment in $(VENV), from requirements-cpu.lock"
	@echo "make quickstart         the main job, small, on this machine"
	@echo "make test               unit tests"
	@echo "make test-integration   tests that start Ray and engines"
	@echo "make test-faults        tests that kill and hang parts of a running system"
	@echo "make lint               ruff, formatting, types (make format repairs the first two)"
	@echo "make bench              every benchmark but the next three; BENCH=--quick: each in its short form"
	@echo "make paper-table        which stages learn most from how many demonstrations: hours, can be interrupted"
	@echo "make ablations          what each setting of SRL and RLVR is worth, one change at a time"
	@echo "make seven-types        each model type on real data against its rivals: hours, can be interrupted"
	@echo "make clean              removes $(VENV) and caches"

install: $(VENV)/.installed

install-dev: $(VENV)/.installed-dev

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "error: '$(PYTHON)' is not Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
# Debian's Python has no ensurepip without python3-venv; its own pip can fill the environment too.
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv --clear $(VENV) >/dev/null; then :; \
	elif $(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(VENV)/bin/python install -qq pip; then :; \
	else rm -rf $(VENV); echo "error: '$(PYTHON)' can make no virtual environment; install its venv module (Debian: python3-venv)" >&2; exit 2; fi

# torch comes first and by its CPU version: PyPI's own build for Linux is CUDA's, whose libraries the lock leaves out.
$(VENV)/.installed: requirements-cpu.lock pyproject.toml | $(BIN)/python
	@if [ "$$(uname -s)" != Linux ] || $(PIP) show torch 2>/dev/null | grep -q '^Version: $(TORCH)+cpu'; then :; \
	else $(PIP) install -qq --no-deps 'torch==$(TORCH)+cpu' 2>/dev/null || \
		$(PIP) install --no-deps 'torch==$(TORCH)+cpu' --index-url $(CPU_INDEX) || \
		{ echo "error: no CPU build of torch $(TORCH) on your index nor on $(CPU_INDEX)" >&2; exit 1; }; fi
	@echo "filling $(VENV) from requirements-cpu.lock: a few minutes, about 3 GB"
	@$(PIP) install -qq --no-deps -r requirements-cpu.lock
	@$(PIP) install -qq --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.installed-dev: requirements-dev.lock requirements-bench.lock $(VENV)/.installed
	@$(PIP) install -qq --no-deps -r requirements-dev.lock -r requirements-bench.lock
	@touch $@

quickstart: install
	$(BIN)/srl-rlvr quickstart

test: install-dev
	$(PYTEST)

test-integration: install-dev
	$(PYTEST) -m "integration and not faults" --timeout 900

test-faults: install-dev
	$(PYTEST) -m faults --timeout 900

lint: install-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: install-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

paper-table: install-dev
	@$(BIN)/python benchmarks/paper_table.py

ablations: install-dev
	@$(BIN)/python benchmarks/ablations.py

seven-types: install-dev
	@$(BIN)/python benchmarks/seven_types.py

# One that fails does not keep the others from running.
bench: install-dev
	@failed=; for file in benchmarks/*.py; do \
		[ -e "$$file" ] || { echo "error: benchmarks/ holds no benchmark" >&2; exit 2; }; \
		case $$file in */_*|*/paper_table.py|*/ablations.py|*/seven_types.py) continue;; esac; \
		echo "== $$file"; $(BIN)/python "$$file" $(BENCH) || failed="$$failed $$file"; \
	done; [ -z "$$failed" ] || { echo "error: these benchmarks failed:$$failed" >&2; exit 1; }

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
