# `make demo` and `make test` work on a fresh machine: they make .venv, install torch if there is none, build, and run.
#   PYTHON=python3.12      the interpreter that .venv is made from; a torch that it has is used
#   TORCH="torch==2.13.0"  what is installed where there is none
#   VENV=/path             an environment of your own instead of .venv
#   ARGS="-k conv"         passed to pytest, the demo or the benchmark
#   TEST_JOBS=2            processes that run the Python tests, each with threads of its own; 0 for one
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch torchvision
OTHER_TORCH ?= torch==2.13.0
ARGS ?=
TEST_JOBS ?= 2

BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
OTHER := $(abspath .venv-other)
PIP_FLAGS := -qq --disable-pip-version-check
export PATH := $(BIN):$(PATH)

CXX_FILES = $(shell git ls-files '*.h' '*.cc' '*.cpp' '*.cu' '*.cuh')

.PHONY: build environments test test-csrc sanitize demo bench check style wheel-check gpu-check clean

build: $(READY)
	@mkdir -p build
	@$(BIN)/python setup.py build_ext --inplace > build/build.log 2>&1 || { tail -40 build/build.log; exit 1; }
	@grep '^qkernels:' build/build.log
	@if grep -v '^ninja: ' build/build.log | grep -E 'warning *:|Potential Performance Loss'; then echo 'the build gave warnings'; exit 1; fi

# .venv, and the one with another torch that wheels are tried in.
environments: $(READY) $(OTHER)/.ready

test: build
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist loadfile $(ARGS)

demo: build
	$(BIN)/python -m qkernels demo $(ARGS)

bench: build
	$(BIN)/python -m qkernels bench $(ARGS)

# The C++ tests of csrc/, without torch.
test-csrc:
	cmake --preset release > /dev/null && cmake --build --preset release && ctest --preset release

# The same under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize:
	cmake --preset asan-ubsan > /dev/null && cmake --build --preset asan-ubsan && ctest --preset asan-ubsan

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

style: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# A wheel built against one torch runs under another, both ways.
wheel-check: $(READY) $(OTHER)/.ready
	$(BIN)/python tests/packaging/wheel_check.py $(BIN)/python $(BIN)/python $(OTHER)/bin/python
	$(BIN)/python tests/packaging/wheel_check.py $(OTHER)/bin/python $(OTHER)/bin/python $(BIN)/python

# On a machine with a GPU, where nothing may be downloadable: the Python at hand, without .venv if there is none.
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/gpu/gpu_check.py $(ARGS)

clean:
	rm -rf build dist *.egg-info qkernels/*.so

$(READY): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $$($(PYTHON) -c 'import torch' 2> /dev/null && echo --system-site-packages) $(VENV)
	@$(BIN)/python -c 'import torch' 2> /dev/null || { \
	  echo 'installing $(TORCH) into $(VENV)'; $(BIN)/python -m pip install $(PIP_FLAGS) $(TORCH); }
	@$(BIN)/python build_backend/requirements.py dev > $(VENV)/requirements.txt
	@$(BIN)/python -m pip install $(PIP_FLAGS) -U 'setuptools>=77' ninja -r $(VENV)/requirements.txt
	@touch $@

$(OTHER)/.ready: pyproject.toml
	@test -x $(OTHER)/bin/python || $(PYTHON) -m venv $(OTHER)
	@$(OTHER)/bin/python build_backend/requirements.py > $(OTHER)/requirements.txt
	@$(OTHER)/bin/python -m pip install $(PIP_FLAGS) -U 'setuptools>=77' ninja '$(OTHER_TORCH)' -r $(OTHER)/requirements.txt
	@touch $@
