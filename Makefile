# Each target creates what it needs: `make train` and `make test` work from a fresh clone.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
ARGS ?=
DEVICES ?=
WORKLOAD ?= mlp-128
SCRIPT ?= -m bench.train $(WORKLOAD)
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

.PHONY: train test check test-floor soak bench bench-compare profile nsys ncu clean

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

# Kills runs with SIGKILL, a hundred times, and compares their ends with those of runs that were left alone.
soak: $(INSTALLED)
	$(BIN)/python -m tests.soak $(ARGS)

# What a step costs beside hand-written loops and Keras; DEVICES=4 forces as many devices on the CPU.
bench: $(VENV)/.bench
	$(if $(DEVICES),JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=$(DEVICES)) \
		$(BIN)/python -m bench $(ARGS)

# make bench-compare BASE=old.json NEW=new.json: fails, by name, where something got slower beyond noise.
bench-compare: $(VENV)/.bench
	$(BIN)/python -m bench.compare $(BASE) $(NEW)

# Where the time goes in a workload of the benchmark, or in SCRIPT="examples/digits.py --epochs 3": the host's by
# sampling, a timeline of kernels, counters of each kernel. ARGS are options of `python -m learnax.profiling`.
profile: $(INSTALLED)
	$(BIN)/python -m learnax.profiling py-spy --out out/profile $(ARGS) $(SCRIPT)

nsys ncu: $(INSTALLED)
	$(BIN)/python -m learnax.profiling $@ --out out/profile $(ARGS) $(SCRIPT)

$(VENV)/.bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[bench]'
	touch $@

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

clean:
	rm -rf .venv .venv-floor out
