# double11. Two commands are enough: make demo, make test. Both set up .venv by themselves.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Which build of torch: cpu (default) or cuda. TORCH_INDEX names the package index of the CPU build where the index pip
# uses has only the CUDA one, e.g. make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
VARIANT ?= cpu
TORCH_INDEX ?=
TORCH_VERSION := 2.13.0
PYTHON ?= $(shell for p in python3.11 python3 python; do "$$p" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && echo "$$p" && break; done)
# Threads of one process in make test; the suite starts several.
export OMP_NUM_THREADS ?= $(shell nproc)
PYTEST_ARGS ?=
BENCH ?= retrieval rerank features ingest train

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -qq --progress-bar off
PACKAGES := recsys llm_reranker feature_store streaming
SOURCES := $(PACKAGES) tests
export PATH := $(BIN):$(PATH)

.PHONY: help setup check test demo bench protos docs lock clean

help: ## This list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## */\1\t/' | expand -t 10
	@echo; echo 'Variables: VARIANT=cpu|cuda  TORCH_INDEX=URL  PYTHON=python3.11  PYTEST_ARGS="-k ranker"  BENCH="retrieval features"'

setup: $(VENV)/.installed ## Create .venv with the pinned dependencies and double11 itself

$(VENV)/bin/python:
	@test -n '$(PYTHON)' || { echo 'double11 needs Python 3.11 and found none. Install it, or name it: make PYTHON=/path/to/python3.11' >&2; exit 1; }
	'$(PYTHON)' -m venv '$(VENV)'

# Everything but torch is pinned with hashes; torch is pinned by version, because which file it is depends on the machine.
# --no-deps throughout: the lock is complete, and some packages ask for CUDA builds we do not want (requirements/runtime.in).
$(VENV)/.locked-$(VARIANT): requirements/$(VARIANT).txt requirements/dev.txt | $(VENV)/bin/python
	@echo 'Installing requirements/$(VARIANT).txt and requirements/dev.txt into .venv (minutes) ...'
	$(PIP) --no-deps --require-hashes -r requirements/build.txt
	$(PIP) --no-deps --require-hashes --no-build-isolation -r requirements/$(VARIANT).txt
ifeq ($(VARIANT),cpu)
	$(PIP) $(if $(TORCH_INDEX),--index-url '$(TORCH_INDEX)') torch==$(TORCH_VERSION)
endif
	$(PIP) --no-deps --require-hashes --no-build-isolation -r requirements/dev.txt
	@$(BIN)/python -c 'import torch; v = torch.__version__; print("torch", v); exit(v.split("+")[0] != "$(TORCH_VERSION)")'
	@touch '$@'

$(VENV)/.installed: $(VENV)/.locked-$(VARIANT) pyproject.toml
	$(PIP) --no-deps --no-build-isolation --editable .
	@touch '$@'

check: setup ## Lint, format, types, import layers, protos and their stubs
	ruff format --check $(SOURCES)
	ruff check $(SOURCES)
	mypy
	lint-imports
	protos/check.sh

test: setup ## The whole suite, fast tests first; PYTEST_ARGS="..." is passed on
	pytest $(PYTEST_ARGS)

demo: setup ## Import, stream, train, distil, serve and replay real retail data
	DOUBLE11_PROGRESS=$${DOUBLE11_PROGRESS:-1} double11 demo

bench: setup ## Benchmarks against their peers, BENCH="..." chooses; then the tests that take minutes
	for name in $(BENCH); do double11 bench $$name; done
	pytest -m slow $(PYTEST_ARGS)

protos: setup ## Regenerate the checked-in stubs
	protos/stubs.sh protos

docs: setup ## Rewrite the module list of docs/architecture.md
	python docs/modules.py

lock: ## Pin again what the .in files declare (needs uv; see CONTRIBUTING.md)
	requirements/lock.sh

clean: ## Remove .venv, caches and what the demo wrote
	rm -rf '$(VENV)' build dist ./*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .double11 demo-out
	find $(SOURCES) protos -name __pycache__ -type d -prune -exec rm -rf {} +
