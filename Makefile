# The commands of the house. `make quickstart` and `make test` are all that a newcomer needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
LOCK ?= requirements.lock
BIN := $(VENV)/bin
CLIENTS := .venv-clients
STAMP := $(VENV)/.installed
BEGUN := $(VENV)/.installing
SOURCES := omni_ray actors pipelines clusters notebooks tests docs
PYTEST := $(BIN)/python -m pytest
CKPT ?= runs/quickstart/checkpoint
NAME ?= overlap
ARGS ?=

export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

.PHONY: help install quickstart test test-fast test-full check serve clients docs bench clean distclean

help: ## Say what there is.
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 \t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 22

install: $(STAMP) ## Install into .venv; does nothing when nothing changed.

# One step, whole or not at all. The stamp is written last and holds the seconds that the step took. A killed pip can
# leave a package that looks installed and is not, so a step that was begun and not ended starts from an empty folder.
$(STAMP): $(LOCK) pyproject.toml
	@test -n "$(PYTHON)" || { echo "omni-ray needs Python 3.11; none was found on PATH" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v[:2] != (3, 11) and f"omni-ray is pinned for Python 3.11; {sys.executable} is {v[0]}.{v[1]}. Name one: make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "$(PYTHON) has no ensurepip; install it (Debian: apt-get install python3-venv)" >&2; exit 1; }
	@if [ -L $(VENV) ]; then echo "$(VENV) is a link and not up to date; run make install where it points to, or remove the link" >&2; exit 1; fi
	@rm -f $(STAMP)
	@if [ -e $(BEGUN) ]; then echo "an earlier install was interrupted; starting afresh" >&2; rm -rf $(VENV); fi
	@began=$$(date +%s); \
	mkdir -p $(VENV); touch $(BEGUN); \
	$(PYTHON) -m venv $(VENV); \
	echo "installing into $(VENV); the first time takes minutes" >&2; \
	$(BIN)/python -m pip install --require-hashes -r $(LOCK); \
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .; \
	rm -f $(BEGUN); \
	echo $$(( $$(date +%s) - began )) > $(STAMP).part; mv $(STAMP).part $(STAMP); \
	echo "installed into $(VENV) in $$(cat $(STAMP)) s" >&2

quickstart: $(STAMP) ## Build data, train a tiny omni model, evaluate it, let it answer.
	@OMNI_RAY_INSTALL_SECONDS="$$(cat $(STAMP))" $(BIN)/omni-ray quickstart $(ARGS)

test: $(STAMP) ## All tests but those that take minutes each.
	@$(PYTEST) -m "not full" $(ARGS)

test-fast: $(STAMP) ## Tests without Ray: a third of the time.
	@$(PYTEST) -m "not ray and not slow and not full and not gpu" $(ARGS)

test-full: $(STAMP) ## Every test.
	@$(PYTEST) $(ARGS)

check: $(STAMP) ## Lint, formatting, types, import contracts, lengths.
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python docs/house_rules.py

serve: $(STAMP) ## Serve the quickstart's model on 127.0.0.1; stays up (CKPT=PATH for another).
	@$(BIN)/omni-ray serve $(CKPT) $(ARGS)

clients: $(CLIENTS)/.installed ## Install pipecat, livekit and schemathesis into .venv-clients, for their tests.

$(CLIENTS)/.installed: tests/clients/requirements.txt
	@$(PYTHON) -m venv $(CLIENTS)
	@$(CLIENTS)/bin/pip install -q -r $<
	@touch $@

docs: $(STAMP) ## Write build/docs (modules, commands) and check links and named files.
	@$(BIN)/python docs/build.py build/docs

bench: $(STAMP) ## Run a bench: make bench NAME=overlap ARGS=--json
	@$(BIN)/omni-ray bench $(NAME) $(ARGS)

clean: ## Remove what was built, but not .venv and runs.
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Remove .venv, runs and built data as well.
	@rm -rf $(VENV) $(CLIENTS) runs .cache
