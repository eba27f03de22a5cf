# Every target sets up what it needs: a fresh clone and Python 3.11 or newer are enough.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TEST_PROCESSES ?= 2
SEEDS ?= 200
FIRST ?= 0
RUNS ?= 3
JOBS ?= 2
MINUTES ?=
SCRIPT ?=
PYTEST := $(BIN)/python -m pytest

.PHONY: help venv demo test lint format model fault machine schemas bench conformance bank lock clean

help: ## these lines
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

venv: $(READY) ## the virtual environment, from requirements.lock

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'shardmove needs Python 3.11 or newer: make PYTHON=python3.12 …' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --retries 10 --timeout 60 -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY) ## a move under load on embedded servers
	$(BIN)/shardmove demo

test: lint ## everything that CI runs
	$(PYTEST) -n $(TEST_PROCESSES) --dist worksteal -m "not slow" --durations 25

lint: $(READY) ## style, types, and the floors of the house
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(READY) ## puts the source in shape
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

model: $(READY) ## the protocol's model, every order of its steps: needs the packages spin and gcc
	$(BIN)/python -m tests.model.check large

fault: $(READY) ## every control point × every victim, RUNS=3 times or for MINUTES, JOBS=2 at once; then the tests in which something dies
	$(BIN)/python -m tests.campaign --runs $(RUNS) --jobs $(JOBS) $(if $(MINUTES),--minutes $(MINUTES)) --write docs/reliability.md
	SHARDMOVE_KILLS=50 $(PYTEST) -m fault

machine: $(READY) ## random lives of moves for MINUTES=30; a kept one once more: SCRIPT=file
	$(BIN)/python -m tests.machine $(or $(SCRIPT),--minutes $(or $(MINUTES),30))

schemas: $(READY) ## moves of random schemas: SEEDS=200 of them, from FIRST=0 on; one failed: FIRST=n SEEDS=1
	SHARDMOVE_SCHEMAS=$(SEEDS) SHARDMOVE_SCHEMAS_FIRST=$(FIRST) \
	  $(PYTEST) -n $(TEST_PROCESSES) --dist worksteal tests/test_random_schemas.py

bench: $(READY) ## the benchmarks, beside their peers
	$(PYTEST) benchmarks --benchmark-only
	$(BIN)/python -m benchmarks.router

conformance: $(READY) ## drivers' own test suites through the router: PSYCOPG=path ASYNCPG=path of their sources
	$(BIN)/python -m tests.conformance $(if $(PSYCOPG),--psycopg $(PSYCOPG)) $(if $(ASYNCPG),--asyncpg $(ASYNCPG))

bank: $(READY) ## a bank behind two routers that are killed, while its accounts move, for MINUTES=5
	$(BIN)/python -m tests.bank --minutes $(or $(MINUTES),5)

lock: $(READY) ## requirements.lock anew, from pyproject.toml
	$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --extra embedded --extra dev \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links \
	  --output-file requirements.lock pyproject.toml

clean: ## removes what was made
	rm -rf $(VENV) build dist .benchmarks .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
