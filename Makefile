# Everything starts here: `make demo` draws a picture, `make test` checks the project. Nothing else has to be set up.
#
#   make demo            a handwritten eight from the bundled model; prints the path of the picture
#   make test            lint, then the fast tests
#   make lint            ruff (lint, format) and mypy
#   make parity          full-size models against diffusers (up to 24 GiB of memory; minutes)
#   make bench           what is fast and what is not, on this machine (BENCH="--models sd15 --budget 600" and so on)
#   make gpu             on a machine with a GPU: its tests, then the benchmarks, in 9 minutes
#   make report          the README's table of speed and the charts, from bench/results/
#   make digits-report   the full check of the bundled model (DATA=folder with the MNIST files)
#
# The environment is in .venv. It is made once, and brought up to date when pyproject.toml or constraints.txt change.
# PYTHON=python3.12 chooses the interpreter; PYTHON=python3 NOVENV=1 uses that interpreter's own packages, installing nothing.

PYTHON ?= python3
NOVENV ?=
PROMPT ?= a handwritten eight
DATA ?= data/mnist
BENCH ?=
GPU ?=

ifeq ($(NOVENV),)
  PY := .venv/bin/python
  RUNTIME := .venv/.runtime
  DEV := .venv/.dev
  MEASURE := .venv/.bench
else
  PY := $(PYTHON)
  RUNTIME :=
  DEV :=
  MEASURE :=
endif

PIP := .venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
TRITON := $(shell sed -n 's/^ *"triton>=\([0-9.]*\),[^;]*\(;.*\)",$$/triton==\1\2/p' pyproject.toml)
OLDEST := $(if $(NOVENV),,.venv/.triton-$(patsubst triton==%;,%,$(firstword $(TRITON))))

.PHONY: help demo test lint lint-run parity bench gpu report digits-report
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# torch comes first and by its exact pin, so that pip takes the build that the index in use prefers.
.venv/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) must be Python 3.10 or later; choose another with PYTHON=..." >&2; exit 1; }
	@.venv/bin/python -m pip --version >/dev/null 2>&1 || { echo "making .venv"; $(PYTHON) -m venv .venv; }
	@echo "installing fastsd and its dependencies into .venv (the first time takes minutes)"
	@$(PIP) $(TORCH)
	@$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.runtime
	@echo "installing the tools for development into .venv"
	@$(PIP) -e '.[dev]'
	@touch $@

# The oldest Triton that pyproject.toml allows, in a folder of its own: every kernel has to compile under it too.
.venv/.triton-%: | .venv/.runtime
	@echo "installing Triton $* into $@, to compile the kernels with it"
	@rm -rf $@.part && mkdir -p $@.part
	@$(filter-out -c constraints.txt,$(PIP)) --no-deps --target $@.part "$(TRITON)"
	@mv $@.part $@

.venv/.bench: .venv/.dev
	@$(PIP) -e '.[bench]'
	@touch $@

demo: $(RUNTIME)
	@$(PY) -m fastsd --prompt "$(PROMPT)"

test: lint $(OLDEST)
	$(PY) -m pytest

lint: $(DEV)
ifneq ($(NOVENV),)
	@if $(PY) -c 'import mypy, ruff' 2>/dev/null; then $(MAKE) --no-print-directory lint-run; \
	  else echo "lint skipped: $(PY) has no ruff or no mypy"; fi
else
	@$(MAKE) --no-print-directory lint-run
endif

lint-run:
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

parity: $(DEV)
	$(PY) -m pytest -m parity -s

bench: $(MEASURE)
	$(PY) -m pytest bench --benchmark $(BENCH)

gpu: $(MEASURE)
	@$(PY) -m bench.gpu $(GPU)

report: $(MEASURE)
	@$(PY) -m bench.report

digits-report: $(RUNTIME)
	$(PY) -m fastsd evaluate --model digits --data $(DATA)
