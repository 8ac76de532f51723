# Two commands on a fresh machine: `make demo` and `make test`. Each makes .venv, installs what it needs, and runs.
# `make gpu` builds, tests, measures and tunes on a CUDA machine; `make gpu DRY_RUN=1` rehearses it without one.
# `make nightly`: 10,000 random calls of the C++ and CUDA entries under sanitizers, and 10,000 damaged recipes, data files,
# files of runs and adapters each; `make tests` runs 400 and 500 of them.
# `make wheel` builds one for PyPI, in dist/, with a manylinux tag.
# GPU_OPTIONS: further options of `python -m bench gpu`, such as "--phases tests tune --again".
# PYTHON: the interpreter. TORCH: the torch to install (default: 2.13.0 without an NVIDIA GPU, the newest with one).

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
TORCH ?= $(if $(GPU),torch,torch==2.13.0)
JOBS ?= 2

.PHONY: demo test install lint types tests nightly wheel bench gpu clean

demo: install
	$(BIN)/fastlora train

test: lint types tests

install: $(VENV)/.installed

# torch is installed first, by itself, so that no other package's requirements choose its build.
$(VENV)/.installed: pyproject.toml setup.py fastlora_kernels.py $(wildcard csrc/*.h csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip uninstall --quiet --yes fastlora 2>/dev/null  # it would own the import name too
	rm -rf fastlora.egg-info
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

tests: install
	$(BIN)/python -m pytest -v -m gpu
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -m "not gpu"

nightly: install
	FASTLORA_FUZZ_CASES=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/native/test_sanitized.py $(shell find tests -name test_fuzz.py)

# The tag is that of this machine's C library: build in an old manylinux image to serve older systems.
wheel: install
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist build/wheel/*.whl
	$(BIN)/auditwheel show dist/*.whl

bench: install
	$(BIN)/python -m bench kernels --device $(if $(GPU),cuda,cpu)

# A python that sees a GPU is used as it is: no second torch is downloaded. So is one without a network.
SEES_GPU = $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null

gpu:
	@if $(SEES_GPU) || ! $(MAKE) --no-print-directory install; then python=$(PYTHON); else python=$(BIN)/python; fi; \
	$$python -m bench gpu $(if $(DRY_RUN),--dry-run) $(GPU_OPTIONS)

clean:
	rm -rf $(VENV) .editable build dist runs .pytest_cache .mypy_cache .ruff_cache fastlora/lib *.egg-info
