# `make help` lists what there is. Everything happens in .venv; nothing outside the checkout is touched.

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DOCS   := $(VENV)/.installed-docs
# Versions that are tested together. `make install LOCK=` takes the newest that pyproject.toml allows.
LOCK   ?= requirements.lock
# The Python to build .venv with, e.g. `make install PYTHON=/opt/python3.12/bin/python3`.
PYTHON ?=
# More arguments for pytest, e.g. `make test ARGS="-k resume -x"`.
ARGS   ?=

# Processes that share the tests: a number, or auto for one a core (8 at most).
WORKERS ?= auto
PYTEST  := $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses=8 --dist=loadfile

# One thread a process: several ranks share the cores, and results do not depend on the machine.
export OMP_NUM_THREADS := 1

# A name on PATH proves little (a version manager's stub may refuse to run, a distribution may leave out venv),
# so each candidate has to run.
CHECK_PYTHON := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-gpu test-slurm quickstart docs docs-serve schema lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## create .venv and install the package, the tests' tools and the demo's libraries

$(BIN)/python:
	@for candidate in $(or $(PYTHON),python3.12 python3.11 python3); do \
	    if "$$candidate" -c '$(CHECK_PYTHON)' >/dev/null 2>&1; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	    echo "No Python >= 3.11 with venv and pip runs here (tried: $(or $(PYTHON),python3.12 python3.11 python3))." >&2; \
	    echo "Install one (Debian: apt-get install python3 python3-venv), or name it: make install PYTHON=/path/to/python3" >&2; \
	    exit 1; \
	fi; \
	echo "creating $(VENV) with $$found ($$("$$found" --version))"; \
	"$$found" -m venv $(VENV)

$(STAMP): pyproject.toml $(LOCK) | $(BIN)/python
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(LOCK),-c $(LOCK)) -e ".[dev,demo]"
	@touch $@

test: $(STAMP) ## install, then run the tests that take seconds (no GPU, no SLURM)
	$(PYTEST) $(ARGS)

# pytest exits with 5 where no test is selected: that is not a failure of these targets.
test-slow: $(STAMP) ## the slow tests
	$(PYTEST) -m "slow and not gpu and not slurm" $(ARGS) || [ $$? -eq 5 ]

test-gpu: $(STAMP) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu $(ARGS) || [ $$? -eq 5 ]

test-slurm: $(STAMP) ## the tests that need a SLURM cluster
	$(BIN)/python -m pytest -m slurm $(ARGS) || [ $$? -eq 5 ]

quickstart: $(STAMP) ## the whole job on real handwritten digits, on the CPU, in minutes
	$(BIN)/python tools/quickstart.py $(ARGS)

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --disable-pip-version-check $(if $(LOCK),-c $(LOCK)) -e ".[docs]"
	@touch $@

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(DOCS) ## build the pages of docs/ as a site, in build/site; a broken link or reference fails
	$(BIN)/mkdocs build --strict

docs-serve: export NO_MKDOCS_2_WARNING := 1
docs-serve: $(DOCS) ## show that site at http://localhost:8000, again after each change
	$(BIN)/mkdocs serve

schema: $(STAMP) ## write dit/commandline/schema.json anew, after a flag, a configuration key or a choice has changed
	$(BIN)/python tools/schema.py

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## let ruff rewrite what it can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv, builds and caches (runs/ and data/ stay)
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
