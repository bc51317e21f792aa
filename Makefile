# From a fresh clone, with Python 3.11 or newer and a C++20 compiler: make train, make test.
#
#   VENV=path     the virtual environment (default .venv)
#   PYTHON=path   the Python that makes it
#   ARGS="..."    passed on: make train ARGS="--impl torch", make test ARGS="-k conv2d"

VENV ?= .venv
ARGS ?=
# A few processes side by side, for most of a test is one thread of Python: ARGS=-n0 for one alone.
PYTEST = $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
SUITABLE := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.13; do \
	$$python -c '$(SUITABLE)' 2>/dev/null && echo $$python && break; done)

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CPP_FILES = $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
BUILD_FILES := $(shell find csrc build_support -type f -not -name '*.pyc') setup.py pyproject.toml

.DELETE_ON_ERROR:
.PHONY: help env build train experiments test bench bench-check lint format wheel-test cuda-compile clean \
	test-matrix build-memory test-large fuzz sanitize

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1 \t/p' $(MAKEFILE_LIST) | expand -t 24

env: $(VENV)/.env ## make the virtual environment with torch and what the examples and tests need
build: $(VENV)/.built ## build dlops and install it, editable

train: build ## train the default network on dlops' layers
	$(PY) examples/train.py $(ARGS)

experiments: build ## run every experiment on its defaults (eight minutes on two cores)
	$(PY) examples/run_all.py $(ARGS)

test: build ## run the test suite
	$(PYTEST) $(ARGS)

test-large: build ## tests of more than 2^31 elements: minutes, and up to 15 GiB of free memory
	DLOPS_TEST_LARGE=1 $(PY) -m pytest tests/large -rP $(ARGS)

fuzz: build ## 20,000 generated calls of each op against native
	DLOPS_FUZZ_EXAMPLES=20000 $(PY) -m pytest tests/fuzz $(ARGS)

sanitize: env ## run the op tests under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer
	scripts/sanitize.sh $(PY) $(ARGS)

bench: build ## time every op against the native one
	$(PY) -m benchmarks $(ARGS)

bench-check: build ## a short benchmark; names what is slower than in the committed results
	$(PY) -m benchmarks --check benchmarks/results/cpu-float32-emerald-rapids.json $(ARGS)

lint: $(VENV)/.dev ## check format, style and types
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.dev ## format every source file
	$(VENV)/bin/clang-format -i $(CPP_FILES)
	$(VENV)/bin/ruff check --fix-only .
	$(VENV)/bin/ruff format .

wheel-test: build $(VENV)/.dev ## build sdist and wheel, install the wheel elsewhere and test that
	scripts/wheel_test.sh $(PY) $(ARGS)

test-matrix: ## build and test with the oldest and the newest supported Python, torch and all else
	scripts/test_matrix.sh all $(ARGS)

build-memory: env ## build with two jobs and without network; fails above 4 GiB
	$(PY) scripts/build_memory.py

cuda-compile: env ## compile and link the CUDA kernels (needs no GPU and no system toolkit)
	scripts/cuda_compile.sh $(PY)

clean: ## remove what builds and runs made, but not the virtual environment
	rm -rf build dist runs ./*.egg-info dlops/_C*.so dlops/_build_config.py $(VENV)/.built

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo "There is no Python 3.11 or newer with the venv module here." \
		"Fix: install one (Debian, Ubuntu: apt install python3-venv), or make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.env: pyproject.toml scripts/requirements.py | $(VENV)/bin/pip
	$(PY) scripts/requirements.py examples test > $(VENV)/requirements.txt
	$(PIP) install -r $(VENV)/requirements.txt
	@touch $@

$(VENV)/.dev: $(VENV)/.env
	$(PY) scripts/requirements.py dev > $(VENV)/requirements-dev.txt
	$(PIP) install --quiet -r $(VENV)/requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.env $(BUILD_FILES)
	@echo "Building dlops' C++; a few minutes the first time."
	$(PIP) install --no-build-isolation --no-deps -e .
	@touch $@
