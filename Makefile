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
GPU_COMPILE = $(VENV)/gpu-compile

.PHONY: train text train-2 test test-quick check test-floor test-browser test-wheel docs soak bench bench-gpu bench-compare bench-scaling profile nsys ncu clean

train: $(INSTALLED)
	$(BIN)/python examples/digits.py $(ARGS)

# A language model on streamed text.
text: $(INSTALLED)
	$(BIN)/python examples/text.py $(ARGS)

# The same as one run over two processes of this machine: on the CPU, or JAX_PLATFORMS=cuda for a GPU each. An
# interrupt stops both in order, as SIGTERM to one does. Where one fails, the other has 10 s to say so, and is killed.
train-2: $(INSTALLED)
	@port=$$($(BIN)/python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'); \
	export JAX_COORDINATOR_ADDRESS=localhost:$$port JAX_PLATFORMS=$${JAX_PLATFORMS:-cpu}; \
	process() { JAX_LOCAL_DEVICE_IDS=$$1 exec $(BIN)/python examples/digits.py --distributed $$1/2 $(ARGS); }; \
	process 0 & zero=$$!; process 1 >/dev/null & one=$$!; \
	trap 'kill -TERM $$zero' INT TERM; \
	while kill -0 $$zero 2>/dev/null && kill -0 $$one 2>/dev/null; do sleep 0.2; done; \
	kill -0 $$zero 2>/dev/null && ended=$$one other=$$zero || ended=$$zero other=$$one; \
	wait $$ended || { status=$$?; tries=0; \
		while kill -0 $$other 2>/dev/null && [ $$((tries += 1)) -le 50 ]; do sleep 0.2; done; \
		kill -KILL $$other 2>/dev/null; exit $$status; }; \
	wait $$other

# Programs that tests have compiled are kept from one call to the next.
test test-quick: $(GPU_COMPILE)/.installed
test test-quick: export LEARNAX_COMPILATION_CACHE = $(abspath $(VENV))/programs
test: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not soak" $(ARGS)

# Without the tests that start processes, and those that repeat a promise for further settings.
test-quick: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not processes and not thorough and not soak" -q $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) test

# The same tests at the lowest versions that pyproject.toml claims.
test-floor:
	$(MAKE) test VENV=.venv-floor CONSTRAINTS=.ci/constraints-floor.txt

# The page of a run in a real headless Chromium, which is Debian's package.
test-browser: $(INSTALLED)
	command -v chromium || { sudo=$$(test $$(id -u) = 0 || echo sudo); \
		$$sudo apt-get update && $$sudo apt-get install -y --no-install-recommends chromium fonts-dejavu-core; }
	$(BIN)/python -m pytest tests/test_browser.py $(ARGS)

# Builds the wheel, installs it into bare environments at the lowest and the newest versions, and uses it there.
test-wheel: $(INSTALLED)
	$(BIN)/python -m tests.wheel $(ARGS)

# The pages as a site in out/docs; a broken link, or a name without a docstring, ends it. (With --quiet mkdocs does not
# count the warnings that end it.)
docs: $(VENV)/.docs
	$(BIN)/ruff check --quiet learnax
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build $(ARGS)

# Kills runs with SIGKILL, a hundred times, and compares their ends with those of runs that were left alone.
soak: $(INSTALLED)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m soak
	$(BIN)/python -m tests.soak $(ARGS)

# What a step costs beside hand-written loops and Keras; DEVICES=4 forces as many devices on the CPU.
bench: $(VENV)/.bench
	$(if $(DEVICES),JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=$(DEVICES)) \
		$(BIN)/python -m bench $(ARGS)

# What runs on GPUs that are not here: kernels, loops, copies and bytes of compiled programs, beside a hand-written one.
bench-gpu: $(VENV)/.bench $(GPU_COMPILE)/.installed
	PYTHONPATH=$(GPU_COMPILE) $(BIN)/python -m bench.gpu $(ARGS)

# make bench-compare BASE=old.json NEW=new.json: fails, by name, where something got slower beyond noise.
bench-compare: $(VENV)/.bench
	$(BIN)/python -m bench.compare $(BASE) $(NEW)

# What a step costs on 1, 2 and 4 processes of this machine with the same data for each.
bench-scaling: $(VENV)/.bench
	$(BIN)/python -m bench.scaling $(ARGS)

# Where the time goes in a workload of the benchmark, or in SCRIPT="examples/digits.py --epochs 3": the host's by
# sampling, a timeline of kernels, counters of each kernel. ARGS are options of `python -m learnax.profiling`.
profile: $(INSTALLED)
	$(BIN)/python -m learnax.profiling py-spy --out out/profile $(ARGS) $(SCRIPT)

nsys ncu: $(INSTALLED)
	$(BIN)/python -m learnax.profiling $@ --out out/profile $(ARGS) $(SCRIPT)

$(VENV)/.bench: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[bench]'
	touch $@

$(VENV)/.docs: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@

$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable '.[test]'
	touch $@

# What compiles for GPUs that are not here, in a folder of its own: beside JAX it would look for a driver at each start.
$(GPU_COMPILE)/.installed: $(INSTALLED)
	rm -rf $(GPU_COMPILE)
	$(BIN)/python -m pip install --quiet --no-deps --constraint $(CONSTRAINTS) --target $(GPU_COMPILE) \
		$$($(BIN)/python -c 'import tomllib; project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
		print(*project["optional-dependencies"]["gpu-compile"])')
	touch $@

clean:
	rm -rf .venv .venv-floor out
