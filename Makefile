# make run     train the built-in handwritten digits on 4 ranks          RANKS=8 ARGS="--set train.epochs=3"
# make test    a test of every kind, in minutes                          ARGS="-k floors"   TORCH=1: against PyTorch, too
# make test-slow   more cases of the same: the tests marked slow           ARGS=... and TORCH=1 as above
# make test-all    every test, the long ones too: both MPIs, every rank count, many seeds
# make test-slurm  jobs/ on a real Slurm of four nodes, which it starts on this machine; as root, with slurm-wlm and munge
# make docs    the documentation, into build/docs: open build/docs/index.html
# make check   ruff, ruff format, mypy --strict
# make bench   the benchmarks, against PyTorch
# make test-gpu    tests/gpu on this machine's GPU, with its own Python, CuPy and PyTorch      ARGS="-k products"
# make bench-gpu   what only a GPU can show, in less than eight minutes: benchmarks/results/gpu_NAME.json
# make wheels-gpu  fetch what such a machine may lack into .wheels/, for one without network: 50 MiB at most
# make clean   remove the environments
#
# Needs Python 3.11 or newer and make, nothing else: MPI comes from PyPI. Each target, those for GPUs excepted, makes the
# environment it needs and makes it anew when pyproject.toml changes. Open MPI and MPICH both install bin/mpirun, so MPICH lives in an environment
# of its own that holds nothing else.

PYTHON ?= python3
RANKS ?= 4
ARGS ?=
TORCH ?=

VENV := .venv
MPICH := .venv-mpich
BIN := $(VENV)/bin
MPIRUN := $(BIN)/mpirun --oversubscribe

# Open MPI refuses to run as root unless told twice.
ifeq ($(shell id -u),0)
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1
endif

.PHONY: docs run test test-slow test-all test-slurm check bench test-gpu bench-gpu wheels-gpu clean
.DELETE_ON_ERROR:

run: $(VENV)/.run
	$(MPIRUN) -n $(RANKS) $(BIN)/python -m nettorrent_mpi.train --output runs/make --overwrite $(ARGS)

test: MARKED := -m "not slow and not long"
test-slow: MARKED := -m "slow and not long"
test test-slow test-all: $(VENV)/.dev $(MPICH)/.made $(if $(TORCH),$(VENV)/.compare)
	$(BIN)/python -m pytest $(MARKED) $(ARGS)

test-slurm: $(VENV)/.dev $(MPICH)/.made
	tests/slurm/with_slurm.sh $(BIN)/python -m pytest tests/slurm $(ARGS)

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict nettorrent_mpi

docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

bench: $(VENV)/.dev $(VENV)/.compare
	$(BIN)/python -m benchmarks $(ARGS)

# With the machine's own Python, which has CuPy and PyTorch: no environment is made.
test-gpu:
	. benchmarks/gpu/bare_machine.sh && $(PYTHON) -m pytest tests/gpu -m "not slow and not long" $(ARGS)

bench-gpu:
	. benchmarks/gpu/bare_machine.sh && $(PYTHON) -m benchmarks.gpu $(ARGS)

wheels-gpu:
	$(PYTHON) -m benchmarks.gpu.wheels download $(ARGS)

clean:
	rm -rf $(VENV) $(MPICH)

define make_venv
@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; nettorrent_mpi needs 3.11 or newer: make PYTHON=/path/to/python3.12" % v[:2])'
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

$(VENV)/.run: pyproject.toml setup.py
	$(call make_venv,$(VENV))
	$(BIN)/python -m pip install --quiet -e '.[mpi]'
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/python -m pip install --quiet -e '.[mpi,fast,plots,images,tune,docs,dev]'
	touch $@

$(VENV)/.compare: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -e '.[compare]'
	touch $@

$(MPICH)/.made: pyproject.toml
	$(call make_venv,$(MPICH))
	$(MPICH)/bin/python -m pip install --quiet 'mpich>=5'
	touch $@
