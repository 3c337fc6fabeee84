# Every target makes the virtual environment and installs its dependencies. The stamp file makes a second call instant.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Number of test processes. Each uses one thread, so that they do not compete for cores.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.PHONY: help install quickstart test test-slow test-long reliability lint

help:
	@echo "make install      the virtual environment with difrl in it, in $(VENV)"
	@echo "make quickstart   fine-tune the built-in text-to-image model against a reward, on a CPU, in minutes"
	@echo "make test         the fast tests"
	@echo "make test-slow    the slow tests only"
	@echo "make test-long    all tests"
	@echo "make reliability  many trials of every fault that was found, with the table of docs/reliability.md; an hour or more"
	@echo "make lint         ruff, mypy, import-linter"

install: $(STAMP)

# Without compilation of the installed sources the installation is faster: modules are compiled when they are imported.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "difrl needs Python 3.11 or newer, '$(PYTHON)' is not: choose one with make PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing difrl and its dependencies into $(VENV): a minute or two"
	@$(BIN)/python -m pip install -qq --no-compile --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: $(STAMP)
	$(BIN)/difrl train configs/quickstart.yaml --resume

test: $(STAMP)
	$(PYTEST) -m 'not slow'

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-long: $(STAMP)
	$(PYTEST)

reliability: $(STAMP)
	$(PYTEST) tests/reliability --full -o faulthandler_timeout=0

lint: $(STAMP)
	$(BIN)/ruff check --output-format concise .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
