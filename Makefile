# Each target creates what it needs: `make train` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
ARGS ?=
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: train test check test-floor clean

train: $(INSTALLED)
	$(BIN)/python examples/digits.py $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

# The same tests at the lowest versions that pyproject.toml claims.
test-floor:
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=.ci/constraints-floor.txt

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-floor out
