# `make` alone lists the commands. ARGS is handed on, PYTHON names another interpreter, which gets an
# environment of its own:
#   make demo ARGS="--help"      make test ARGS="-k views"      make test PYTHON=python3.12

PYTHON ?= python3
NAME := $(patsubst -python3,,-$(notdir $(PYTHON)))
VENV := .venv$(NAME)
OLDEST := .venv-oldest$(NAME)
BIN := $(VENV)/bin

# For the build backend as well: it is installed on its own, where `pip -c` does not reach.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test test-oldest coverage lint format docs package-check constraints clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

RECIPE ?= densesiam

demo: $(VENV)/.demo ## pre-train on procedural scenes (CPU, a few minutes); RECIPE=croc, dupr, d3ssl, soco, densesiam_segment, picie, detect or fcn for another
	$(BIN)/python recipes/$(RECIPE).py $(ARGS)

TESTS := -m pytest -n auto --dist worksteal # a half each: what a module prepares is prepared once

test: $(VENV)/.dev ## run the tests
	$(BIN)/python $(TESTS) $(ARGS)

test-oldest: $(OLDEST)/.test ## run the tests on the oldest supported versions
	$(OLDEST)/bin/python $(TESTS) $(ARGS)

coverage: $(VENV)/.dev ## run all tests, the slow ones too, and report which lines they reach
	$(BIN)/python $(TESTS) -m "" --cov --cov-report=term $(ARGS)

lint: $(VENV)/.dev ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(VENV)/.dev ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## write the lists of names and the first page, and build the documentation strictly with mkdocs (site/) and Zensical
	$(BIN)/python tests/api_pages.py
	$(BIN)/python -m mkdocs build --strict
	$(BIN)/zensical build --strict --clean

package-check: $(VENV)/.dev ## build wheel and source, and try them where nothing else is installed
	$(BIN)/python tests/package_check.py $(ARGS)

constraints: ## pin the newest versions of everything
	rm -rf .venv-new
	$(PYTHON) -m venv .venv-new
	PIP_CONSTRAINT= PIP_BUILD_CONSTRAINT= .venv-new/bin/python -m pip install -e ".[dev]"
	.venv-new/bin/python -m pip freeze --all --exclude-editable --exclude pip > constraints.txt
	rm -rf .venv-new

clean: ## remove the environments and everything that is built
	rm -rf .venv .venv-* build dist site .cache .pytest_cache .ruff_cache .hypothesis .coverage

# $(1) = environment, $(2) = extra
define install
@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found: install Python 3.11 or newer, or name one, as in 'make test PYTHON=python3.12'."; exit 1; }
@$(PYTHON) -V >/dev/null || { echo "$(PYTHON) could not be started: install Python 3.11 or newer, or name one, as in 'make test PYTHON=python3.12'."; exit 1; }
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$(PYTHON) is $$($(PYTHON) -V), and densekit needs 3.11 or newer: name one, as in 'make test PYTHON=python3.12'."; exit 1; }
@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv or pip module: install them (on Debian and Ubuntu: apt install python3-venv)."; exit 1; }
@$(1)/bin/python -V >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(1)
$(1)/bin/python -m pip install -e ".[$(2)]"
@touch $@
endef

$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,$(VENV),recipes)

$(VENV)/.dev: pyproject.toml constraints.txt
	$(call install,$(VENV),dev)

$(OLDEST)/.test: export PIP_CONSTRAINT := constraints-oldest.txt
$(OLDEST)/.test: export PIP_BUILD_CONSTRAINT := constraints-oldest.txt
$(OLDEST)/.test: pyproject.toml constraints-oldest.txt
	$(call install,$(OLDEST),test)
