# The two commands of the README; both need only Python >= 3.10 and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-compat lint format docs clean

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python scripts/demo.py --out demo-output

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist worksteal tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The contract tests with the oldest supported transformers, in an environment of their own.
test-compat:
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)-oldest/bin/pip install --quiet --disable-pip-version-check -c constraints-oldest.txt -e '.[dev]'
	$(VENV)-oldest/bin/python -m pytest -n auto --dist worksteal tests/anatomy tests/calibration tests/pipeline/ways tests/test_contract.py tests/experts tests/storage tests/cli

clean:
	rm -rf $(VENV) $(VENV)-oldest demo-output build dist
