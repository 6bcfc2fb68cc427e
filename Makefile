# Everything starts here: `make demo` generates an image, `make test` checks the project. Nothing else has to be set up.
#
#   make demo            a handwritten eight from the bundled model; prints the path of the image
#   make test            lint, then all tests but those marked slow or parity
#   make quick           the unit tests alone, without those marked heavy: what to run all day, about five minutes on two cores
#   make lint            ruff (lint, format) and mypy
#   make parity          full-size models against diffusers (up to 24 GiB of memory; minutes)
#   make bench           the benchmarks, on this machine (BENCH="--models sd15 --budget 600" and so on)
#   make gpu             on a machine with a GPU: its tests, then the benchmarks, in 9 minutes
#   make report          the README's table of speed and the charts, from bench/results/
#   make dryrun          the table of launches in docs/performance.md, counted without a GPU
#   make reference       docs/reference.md, from fastsd/parameters.py
#   make docs            the site, with the book, in site/ (Python 3.11 or later); make docs-serve shows it while you write
#   make test-docs       the site is whole, its figures can be drawn, the notebooks run
#   make slides          slides/fastsd.pdf, printed by Chromium
#   make figures         the book's figures, into docs/book/images/
#   make digits-report   the full check of the bundled model (DATA=folder with the MNIST files)
#
# The environment is in .venv. It is made once, and brought up to date when pyproject.toml or constraints.txt change.
# PYTHON=python3.12 chooses the interpreter; VENV=.venv-3.12 keeps an environment apart, so that several can stay.
# PYTHON=python3 NOVENV=1 uses that interpreter's own packages, installing nothing.
# Tests run in several processes where the machine has the cores and the memory; WORKERS=0 runs them in one.

PYTHON ?= python3
VENV := .venv
NOVENV ?=
WORKERS := auto
PROMPT ?= a handwritten eight
DATA ?= data/mnist
BENCH ?=
GPU ?=

ifeq ($(NOVENV),)
  PY := $(VENV)/bin/python
  RUNTIME := $(VENV)/.runtime
  DEV := $(VENV)/.dev
  MEASURE := $(VENV)/.bench
  SITE := $(VENV)/.docs
else
  PY := $(PYTHON)
  RUNTIME :=
  DEV :=
  MEASURE :=
  SITE :=
endif

PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
TRITON := $(shell sed -n 's/^ *"triton>=\([0-9.]*\),[^;]*\(;.*\)",$$/triton==\1\2/p' pyproject.toml)
OLDEST := $(if $(NOVENV),,$(VENV)/.triton-$(patsubst triton==%;,%,$(firstword $(TRITON))))
VERSION := -c 'import sys; print("%d.%d" % sys.version_info[:2])'
# A file's tests stay in one process, which makes its models once. Files start in their order, so that no long one is last.
PYTEST = $(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && echo '--numprocesses=$(WORKERS)' --dist=loadfile --no-loadscope-reorder)

.PHONY: help interpreter demo test quick lint lint-run parity bench gpu report reference dryrun docs docs-serve test-docs figures slides digits-report
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

# Another Python that was asked for is not ignored because .venv is there already.
interpreter:
ifneq ($(origin PYTHON),file)
	@have=$$($(VENV)/bin/python $(VERSION) 2>/dev/null) || exit 0; want=$$($(PYTHON) $(VERSION)) || exit 1; \
	  [ "$$have" = "$$want" ] || { echo "error: $(VENV) has Python $$have and PYTHON=$(PYTHON) is $$want;" \
	  "keep that one apart with VENV=.venv-$$want, or delete $(VENV)" >&2; exit 1; }
endif

# torch comes first and by its exact pin, so that pip takes the build that the index in use prefers.
$(VENV)/.runtime: pyproject.toml constraints.txt | interpreter
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "error: $(PYTHON) must be Python 3.10 or later; choose another with PYTHON=..." >&2; exit 1; }
	@$(VENV)/bin/python -m pip --version >/dev/null 2>&1 || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing fastsd and its dependencies into $(VENV) (the first time takes minutes)"
	@$(PIP) $(TORCH)
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	@echo "installing the tools for development into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@

# The oldest Triton that pyproject.toml allows, in a folder of its own: every kernel has to compile under it too.
$(VENV)/.triton-%: | $(VENV)/.runtime
	@echo "installing Triton $* into $@, to compile the kernels with it"
	@rm -rf $@.part && mkdir -p $@.part
	@$(filter-out -c constraints.txt,$(PIP)) --no-deps --target $@.part "$(TRITON)"
	@mv $@.part $@

$(VENV)/.bench: $(VENV)/.dev
	@$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/.docs: $(VENV)/.dev
	@$(PIP) -e '.[docs]'
	@touch $@

demo: $(RUNTIME)
	@$(PY) -m fastsd --prompt "$(PROMPT)"

test: lint $(OLDEST)
	$(PYTEST)

quick: $(DEV)
	$(PYTEST) tests -m 'not heavy and not slow and not parity and not docs'

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

reference: $(RUNTIME)
	@$(PY) -m fastsd.cli.reference > docs/reference.md

dryrun: $(DEV)
	@$(PY) -m bench.dryrun --write-docs

docs: $(SITE)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-serve: $(SITE)
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve

test-docs: $(SITE)
	$(PY) -m pytest tests/docs -m docs

slides: $(SITE)
	@$(PY) -m book.slides

figures: $(SITE)
	@$(PY) -m book.figures

digits-report: $(RUNTIME)
	$(PY) -m fastsd evaluate --model digits --data $(DATA)
