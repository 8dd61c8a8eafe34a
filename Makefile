# The daily loop: make check, make test.  Every target sets up .venv itself, once.
#   make PYTHON=python3.12 ...    another interpreter (3.11 or later)
#   make TORCH_INDEX=cpu ...      torch without CUDA, from PyTorch's CPU index; a URL points at another index
#                                 (read when .venv is made: `make clean` first to change it)
PYTHON ?= python3
TORCH_INDEX ?=
CONFIG ?= examples/demo.yaml
ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --constraint constraints.txt
READY := .venv/.ready
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest

TORCH_URL := $(if $(filter cpu,$(TORCH_INDEX)),https://download.pytorch.org/whl/cpu,$(TORCH_INDEX))
CODE := kernels quant sched minserve bench examples tests

.PHONY: serve test soak check bench gpu clean
.DELETE_ON_ERROR:

serve: $(READY)  ## the demo: three models, one pool (CONFIG=my.yaml for yours, ARGS="--port 9000")
	$(PY) -m minserve.serve $(CONFIG) $(ARGS)

test: $(READY)  ## everything that needs no GPU and is not slow
	$(PYTEST) -m "not gpu and not slow" $(ARGS)

soak: $(READY)  ## the long runs: random kills, many configurations, many clients
	$(PYTEST) -m "slow and not gpu" $(ARGS)

gpu: $(READY)  ## the whole suite and the gpu cases, on an NVIDIA GPU
	$(PYTEST) -m "not slow" $(ARGS)

check: $(READY)  ## style, types, import direction, sizes
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check --quiet $(CODE)
	$(PY) -m mypy
	$(PYTEST) --noconftest -p no:cacheprovider tests/test_layers.py tests/test_sizes.py

bench: $(READY)  ## tokens a second against transformers, on whatever device is there
	$(PY) -m bench.offline $(ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis bench/out
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first, alone: from its own index where one is named, and before anything can pull another build of it
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "minserve needs Python 3.11 or later, got: $$($(PYTHON) --version 2>&1).  make PYTHON=... names another"; exit 1; }
	@echo "setting up .venv (a few minutes the first time, once)"
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) setuptools
	$(if $(TORCH_URL),$(PIP) --no-deps --index-url $(TORCH_URL) torch)
	$(PIP) torch
	@$(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("triton") is None)' || $(PIP) triton==3.6.0
	$(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@
