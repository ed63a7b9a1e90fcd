# Everything runs in a virtual environment of its own, .venv; no other Python is touched.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo test recipes lint docs clean

VENV := .venv
PYTHON ?=
TORCH ?= torch==2.13.0
CORPUS ?=
PYTEST ?=

# Installed for this pyproject.toml; a newer one installs again.
STAMP := $(VENV)/.installed

help: ## Show this list.
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@printf '%s\n' '' 'Variables:' \
	  '  PYTHON=PATH      interpreter for .venv (default: the newest of Python 3.12 and 3.11)' \
	  '  TORCH=REQ        torch to install (default: $(TORCH))' \
	  '  CORPUS=PATH      text for the demo (default: the standard library of Python)' \
	  '  PYTEST=OPTIONS   more options for make test'

install: $(STAMP) ## Make .venv and install the package with the developers' tools.

$(STAMP): pyproject.toml
	@PYTHON='$(PYTHON)' TORCH='$(TORCH)' bash tools/install.sh $(VENV)
	@touch $@

demo: $(STAMP) ## Prepare real text, train in two stages, evaluate, generate.
	@CORPUS='$(CORPUS)' bash tools/demo.sh

test: $(STAMP) ## Run the tests.
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile $(PYTEST)

recipes: $(STAMP) ## Train two steps of every recipe, made small, on the CPU.
	OMP_NUM_THREADS=1 $(VENV)/bin/python tools/try_recipes.py

lint: $(STAMP) ## Check style, types and the layering.
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

docs: $(STAMP) ## Build the documentation into build/site; broken links and missing pages fail.
	NO_MKDOCS_2_WARNING=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m mkdocs build --strict
	@echo 'python -m http.server --directory build/site, or open build/site/index.html'

clean: ## Remove .venv and caches; runs and data stay.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
