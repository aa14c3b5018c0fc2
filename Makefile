# What a person and CI run; `make` alone lists it.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo lint check format test test-all coverage bench proto

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-done
PROTO := tidelock/wire/tidelock.proto
TYPED := src tests $(wildcard benchmarks/*.py examples/*.py)
# A process for each core, each test file in one of them; models this small are slower with more threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n logical --maxprocesses 4 --dist loadfile
BENCHMARKS := $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv and install tidelock with its tools; nothing to do the second time

# An interrupted or moved .venv has no working pip: it is made anew.
$(STAMP): pyproject.toml
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make setup: expected Python 3.10 or newer, got no command '$(PYTHON)'." \
	       "Install one, or name it: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "make setup: expected Python 3.10 or newer, got $$($(PYTHON) --version 2>&1) ($(PYTHON))." \
	       "Name a newer one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@echo "installing tidelock and its tools into .venv: some minutes the first time"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

demo: setup ## the whole story on this machine: a cloud, a device, real sockets
	$(BIN)/tidelock demo

lint: setup ## lint, format, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)

check: lint ## that, import rules, and that generated code is current
	$(BIN)/python -m pytest -q tests/architecture

format: setup ## sort imports, fix what can be fixed, and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup ## every test that is not marked slow
	$(PYTEST) -m 'not slow'

test-all: setup ## every test
	$(PYTEST)

coverage: setup ## every test that is not marked slow, with the branches it missed
	$(BIN)/python -m pytest -q -m 'not slow' --cov --cov-report=term-missing:skip-covered

bench: setup ## every benchmarks/*.py, one after another
	@for file in $(BENCHMARKS); do echo "== $$file"; $(BIN)/python "$$file" || exit 1; done

proto: setup ## regenerate the protobuf code from its .proto file
	$(BIN)/python -m grpc_tools.protoc -I src \
	  --python_out=src --pyi_out=src --grpc_python_out=src $(PROTO)
