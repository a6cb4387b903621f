# make venv | demo | serve | test | soak | fuzz | check | bench | bench-nodes: see README.md and CONTRIBUTING.md.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

DATA ?= hiss-data
ARGS ?=
FUZZ_SECONDS ?= 3600
# Test processes at once.
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Clients that are built here come before those of the system.
export PATH := $(CURDIR)/.cache/bin:$(PATH)
# A node is half a dozen processes, and tests start hundreds of nodes: our sources are compiled once.
unexport PYTHONDONTWRITEBYTECODE

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## create .venv with everything; needs Python 3.11 or newer, nothing else

# WsgiDAV comes as source only: it is built with the locked setuptools, so that nothing unlocked is ever fetched.
$(STAMP): requirements.lock pyproject.toml
	@python=$$(.ci/python) && { test -x $(BIN)/pip || $$python -m venv $(VENV); }
	@sed -n '/^setuptools==/,/[^\\]$$/p' requirements.lock > $(VENV)/setuptools.lock
	$(PIP) --require-hashes -r $(VENV)/setuptools.lock
	$(PIP) --require-hashes --no-build-isolation --only-binary :all: --no-binary wsgidav -r requirements.lock
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP) ## a node, a kernel, real frames at full rate, read back: under two minutes
	@$(BIN)/hiss demo $(ARGS)

serve: $(STAMP) ## run a node on DATA (default hiss-data) until Ctrl-C
	@exec $(BIN)/hiss serve --data $(DATA) $(ARGS)

apt: ## install the programs that tests use as peers, or say what is missing
	@.ci/peers

test: $(STAMP) apt ## all tests; ARGS="-k name" for some
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not soak" $(ARGS)

soak: $(STAMP) apt ## the tests that take long: random kills, every legal state after a power cut
	$(BIN)/python -m pytest -m soak $(ARGS)

fuzz: $(STAMP) ## what reads a stranger's bytes, FUZZ_SECONDS (an hour) in all; findings in .cache/fuzz
	@for target in heads framings documents wire request; do \
	    echo "$$target"; $(BIN)/python -m tests.fuzz $$target --seconds $$(( $(FUZZ_SECONDS) / 5 )) || exit 1; done

check: $(STAMP) ## format, lint, types, imports between rooms
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

bench: $(STAMP) ## measure beside the ceilings; writes bench/results/DATE.json
	$(BIN)/python -m bench --json bench/results/$$(date +%Y%m%d-%H%M%S).json $(ARGS)

bench-nodes: $(STAMP) apt ## measure 1, 2 and 4 nodes on shaped links (root); writes bench/results/DATE-nodes.json
	$(BIN)/python -m bench.nodes --json bench/results/$$(date +%Y%m%d-%H%M%S)-nodes.json $(ARGS)

format: $(STAMP) ## put the format right, and what the linter can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## remove what make made here
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

.PHONY: help venv demo serve apt test soak fuzz check bench bench-nodes format clean
