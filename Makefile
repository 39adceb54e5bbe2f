# Everything runs in .venv, which is made on demand: `make demo` and `make test` need nothing but
# Python 3.10 or later. Another interpreter: `make test PYTHON=python3.12`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(CURDIR)/$(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# The distribution as users get it. Linters that follow imports read this tree: in the checkout the
# packages fxquant.passes and fxquant.codegen lie elsewhere.
TREE   := build/installed
# Processes that run tests (one a core is best), and further arguments: make test PYTEST="-k nf4 -x".
JOBS   ?= 2
PYTEST ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint types bench golden check-tests tree clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Quantize a real model, print what it cost, and write the kernels to ./dump
	$(BIN)/fxquant demo --dump dump

test: lint types check-tests ## Linters, types and tests: what CI runs

lint: $(VENV)/.test tree ## ruff (rules and format) and the import rule
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(TREE) && $(BIN)/lint-imports --config $(CURDIR)/pyproject.toml --no-cache

types: $(VENV)/.test tree ## mypy, strict, on the installed package
	cd $(TREE) && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml \
	    --cache-dir $(CURDIR)/.mypy_cache -p fxquant

# pytest-xdist 3.8 replaces a process that crashed, and then may wait for ever. The order of files
# is that of tests/conftest.py.
check-tests: $(VENV)/.test
	$(BIN)/pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0 $(PYTEST)

bench: $(VENV)/.test ## Products, models and packing beside other packages: minutes, on an idle machine
	$(BIN)/python -m benchmarks.linear
	$(BIN)/python -m benchmarks.models
	$(BIN)/python -m benchmarks.packing

golden: $(VENV)/.test ## Print the golden kernels again (review the difference like source)
	$(BIN)/python -m tests.golden

clean: ## Remove what the other targets made
	rm -rf $(VENV) build dump .mypy_cache .ruff_cache .pytest_cache .hypothesis

tree: $(VENV)/.test
	@rm -rf build
	@$(PIP) --no-deps --no-build-isolation --target $(TREE) .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (minutes the first time)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e ".[demo,triton]"
	@touch $@

$(VENV)/.test: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "installing into $(VENV) (minutes the first time)"
	@$(PIP) setuptools
	@$(PIP) --no-build-isolation -e ".[test,bench]"
	@touch $@
