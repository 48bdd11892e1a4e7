# Every target sets itself up: it makes .venv, installs the pinned requirements, and runs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help study test check format prove docs study-docs clean

help:
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(READY): requirements/lock.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements/lock.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

study: $(READY) ## Does averaging help? 3 seeds of a regression, then a short digits: tables, plots, a page
	$(BIN)/polyak study regression --seeds 3 --jobs 2 --out study-regression --force
	$(BIN)/polyak study digits --short --seeds 3 --jobs 2 --out study-digits --force

test: $(READY) ## All tests, doctests included
	$(BIN)/python -m pytest -n 2

check: $(READY) ## What CI runs: format, lint, types, tests, docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test
	$(MAKE) docs

format: $(READY) ## Put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## The documentation as a site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

prove: $(READY) ## Long proofs: the weight law at length, every interrupt of the exchange
	$(BIN)/python -m pytest -n 2 -m prove

study-docs: $(READY) ## The committed study results of docs/: about half an hour on 2 cores
	$(BIN)/polyak study regression --seeds 10 --jobs 2 --out docs/studies/regression --force
	$(BIN)/polyak study text --seeds 5 --jobs 2 --out docs/studies/text --force
	$(BIN)/polyak study digits --seeds 5 --jobs 2 --out docs/studies/digits --force

clean: ## Remove what the targets made
	rm -rf .venv site .pytest_cache .mypy_cache .ruff_cache study-regression study-digits
