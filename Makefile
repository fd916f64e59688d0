# Needs Python 3.11 or newer, git and make. Everything else goes into .venv.

PYTHON ?= python3
# Where pip takes torch from; empty is the package index it is set up with.
TORCH_INDEX ?=

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
# Python compiles what it imports, once. pip would compile all of it, which takes half of the installation's time.
INSTALL := "$(BIN)/python" -m pip --disable-pip-version-check --quiet install --no-compile --constraint constraints.txt
INPUTS := pyproject.toml constraints.txt
# One process a core; a file's tests share what they have made, so they stay together, in the order of tests/conftest.py.
PYTEST := pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Which tests `make test-slow` runs.
SLOW ?= slow

# The stages are started as `python -m stages.NAME`: the first python on the path is to be ours.
export PATH := $(BIN):$(PATH)
# pip leaves compiling to Python: where an image forbids it to keep what it compiled, DVC and every test that starts a
# process would compile libraries again, for seconds. What stages and commands need beside, they set themselves
# (cdm/system/environment.py).
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help repro baseline table comparison docs install test test-slow check format pins clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

repro: $(VENV)/installed ## Install what is missing, run the pipeline (dvc repro), say where its results are
	@test -e .git || { printf '%s\n' \
		'error: this folder is not a Git repository, and DVC keeps its experiments in Git.' \
		'Clone the repository instead of downloading it, or make the download one:' \
		'  git init && git add . && git commit -m "CDM"' >&2; exit 1; }
	@dvc repro
	@printf '\n%s\n' \
		'Pictures       plots/ (start with plots/overview.png)' \
		'Figures        metrics/quality.json (in short: dvc metrics show, dvc exp show)' \
		'Report         report/index.html (one file, readable offline)' \
		'Student        models/student (a diffusers folder)' \
		'To go on       source .venv/bin/activate, then: dvc exp run -S schedule.max_len=6' \
		'Compare        make table (a row an experiment), cdm compare (intervals, curves, pictures)'
	@cdm baseline --check

baseline: $(VENV)/installed ## Commit the results of this machine, for experiments to be compared with
	@cdm baseline

table: $(VENV)/installed ## The experiments in a table: what was changed, and the main figures
	@cdm compare --brief

comparison: $(VENV)/installed ## Compare the methods, three seeds each (hours; stop it when you like, it goes on)
	@dvc repro latents
	@dvc --cd comparison repro
	@printf '\n%s\n' 'Tables         comparison/table.md, comparison/table.csv' 'Figures        comparison/figures/'

docs: $(VENV)/installed-docs ## Build the site of the documentation in site/, and find dead links in it
	@NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
	@printf '%s\n' 'Site           site/index.html (readable offline)'

install: $(VENV)/installed ## Make .venv and install the pipeline into it

test: $(VENV)/installed-dev ## Install what the tests need and run them
	@$(PYTEST) -m 'not slow'

test-slow: $(VENV)/installed-slow ## Run the tests that take longer, such as whole pipelines of every architecture
	@$(PYTEST) -m '$(SLOW)'

check: $(VENV)/installed-dev ## Lint, formatting and types
	@ruff check
	@ruff format --check
	@mypy

format: $(VENV)/installed-dev ## Format the code and mend what the linter can
	@ruff check --fix-only
	@ruff format

pins: ## Copy the versions of constraints.txt to where uv reads them, in pyproject.toml
	@awk 'FNR == NR { pins = pins "    \"" $$0 "\",\n"; next } \
		/^constraint-dependencies = \[/ { print; printf "%s", pins; skip = 1 } \
		skip && /^\]/ { skip = 0 } !skip' constraints.txt pyproject.toml > pyproject.toml.new
	@mv pyproject.toml.new pyproject.toml

clean: ## Remove the environment, checkpoints and tool caches; results and DVC's cache stay
	rm -rf $(VENV) checkpoints build dist site .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.git/*' -prune -exec rm -rf {} +

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { printf '%s\n' \
		'error: $(PYTHON) is missing or older than Python 3.11; name another: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); printf '%s\n' \
		'error: $(PYTHON) cannot make virtual environments; on Debian and Ubuntu: apt install python3-venv' >&2; exit 1; }

$(VENV)/installed: $(INPUTS) | $(VENV)/bin/python
	@echo 'Installing into $(VENV): a few minutes, once'
ifneq ($(TORCH_INDEX),)
	@$(INSTALL) --index-url $(TORCH_INDEX) "$$(grep '^torch==' constraints.txt)"
endif
	@$(INSTALL) --editable .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo 'Installing what tests and checks need: once'
	@$(INSTALL) --editable '.[dev]'
	@touch $@

$(VENV)/installed-docs: $(VENV)/installed
	@echo 'Installing what the site needs: once'
	@$(INSTALL) --editable '.[docs]'
	@touch $@

$(VENV)/installed-slow: $(VENV)/installed-dev
	@echo 'Installing what slow tests need too: once'
	@$(INSTALL) --editable '.[slow]'
	@touch $@
