# The one way to set up, check and run gpumove. `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PYTEST := $(PY) -m pytest
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv tools browser test test-slow test-gpu lint format types demo move-demo parity-demo bench clean distclean
MAKEFLAGS += --no-print-directory

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

venv: $(VENV)/.stamp ## create .venv with gpumove and everything that development needs

# torch goes first: it decides which builds of other packages fit, and it is the slow part.
$(VENV)/.stamp: pyproject.toml setup.py constraints-dev.txt $(wildcard gpumove/format/native/*.[ch])
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt torch
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints-dev.txt -e '.[dev]'
	@touch $@

tools: ## install the object-store servers of the tests into .tools
	@PYTHON=$(PYTHON) tools/install-test-servers

test: venv tools ## all tests but the slow ones and those that need a GPU (ARGS="-k name" goes to pytest)
	@$(PYTEST) -m "not slow and not gpu" $(ARGS)

test-slow: venv tools browser ## the slow tests
	@$(PYTEST) -m "slow and not gpu" $(ARGS)

browser: ## install Chromium and the checkers of the report's page (400 MB, for one slow test)
	@tools/install-test-browser

test-gpu: venv ## the tests that need a CUDA device
	@$(PYTEST) -m gpu $(ARGS)

lint: venv ## style and formatting, without changing anything
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: venv ## apply the formatting
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

types: venv ## static types
	@$(PY) -m mypy

demo: venv ## train, kill and resume a small job, and compare every loss
	@$(PY) -m examples.demo $(ARGS)

move-demo: venv tools ## train in one cloud, move to another one meanwhile, and compare every loss
	@$(PY) -m examples.move_between_clouds $(ARGS)

parity-demo: venv ## certify a job on machines that differ, and resumes that are broken, and compare every verdict
	@$(PY) -m examples.parity $(ARGS)

bench: venv tools ## the benchmarks
	@$(PY) -m benchmarks $(ARGS)

clean: ## remove what runs leave behind
	@rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -not -path './.tools/*' -prune -exec rm -rf {} +

distclean: clean ## the same, and .venv and .tools
	@rm -rf $(VENV) .tools
