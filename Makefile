# Everything here runs in an environment of its own, made on first use; only Python >= 3.11 and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
TORCH ?= torch torchvision
LOWEST = $(VENV)-lowest
LOWEST_TORCH ?= torch==2.9.0 torchvision==0.24.0
TWO = --numprocesses 2 --dist worksteal  # each process computes with one thread

.PHONY: quickstart test test-fast test-lowest lint clean

quickstart: $(VENV)/demo  ## prune the embedded demo, reload it without hf_lop, compare it with the dense model
	$(BIN)/hf-lop quickstart

test: $(VENV)/dev lint  ## everything CI runs
	$(BIN)/python -m pytest $(TWO)

test-fast: $(VENV)/dev
	$(BIN)/python -m pytest $(TWO) -m "not slow"

test-lowest: $(LOWEST)/dev  ## the same with the lowest versions that pyproject.toml allows
	$(LOWEST)/bin/python -m pytest $(TWO) -m "not slow"

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

$(LOWEST)/dev: pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip uv
	$(LOWEST)/bin/python -m pip install --quiet $(LOWEST_TORCH)
	$(LOWEST)/bin/uv pip compile --quiet --resolution lowest-direct --extra dev --python $(LOWEST)/bin/python \
		--output-file $(LOWEST)/lowest.txt pyproject.toml
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --requirements $(LOWEST)/lowest.txt
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --no-deps --editable .
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist lop-quickstart .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
