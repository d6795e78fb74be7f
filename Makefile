# Everything here runs in an environment of its own, made on first use; only Python >= 3.11 and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH ?= torch torchvision
TWO = --numprocesses 2 --dist worksteal  # each process computes with one thread

.PHONY: quickstart test test-fast lint clean

quickstart: $(VENV)/demo  ## prune the embedded demo, reload it without hf_lop, compare it with the dense model
	$(BIN)/hf-lop quickstart

test: $(VENV)/dev lint  ## everything CI runs
	$(BIN)/python -m pytest $(TWO)

test-fast: $(VENV)/dev
	$(BIN)/python -m pytest $(TWO) -m "not slow"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(VENV)/base:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(VENV)/demo: $(VENV)/base pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[demo]"
	touch $@

$(VENV)/dev: $(VENV)/base pyproject.toml
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist lop-quickstart .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
