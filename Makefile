# `make demo` shows it, `make test` checks it, `make test-fast` checks most of it sooner.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Wheels of TensorRT for RTX exist for x86-64 Linux only; elsewhere the demo stops at ONNX.
ifeq ($(shell uname -sm),Linux x86_64)
EXTRAS ?= rtx,dev
else
EXTRAS ?= dev
endif

.PHONY: help install demo plugins test test-fast test-versions lint docs format clean evidence-real

help:
	@echo "make demo       install, export the demo model, validate it, let it write"
	@echo "make test       lint, types, import rules and all tests"
	@echo "make test-versions  dependencies, the wheel, a browser and npm clients; needs registries"
	@echo "make test-fast  the tests of every package that take little time"
	@echo "make plugins    the TensorRT plugin for all GPUs, to dist/; TENSORRT_INCLUDE_DIR, nvcc, cmake"
	@echo "make lint       only the static checks"
	@echo "make docs       write all generated pages"
	@echo "make format     format the code"
	@echo "make evidence-real  measure Gemma 3 270M: hours, goes on where it stopped, not in CI"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

demo: install
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python scripts/demo.py

# One of the folders that tests take will do: a library serves every release.
plugins:
	cmake -S plugins -B build/plugins \
		-DTENSORRT_INCLUDE_DIR="$(firstword $(subst :, ,$(TENSORRT_INCLUDE_DIR)))"
	cmake --build build/plugins --parallel --target lminf_tensorrt
	sh plugins/release.sh build/plugins dist

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m scripts.checks.cpp_lint

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not registry"

test-versions: install
	$(BIN)/python -m scripts.checks.dependency_matrix --ci
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m registry tests/test_packages.py \
		tests/test_kubernetes.py tests/test_dynamo_example.py tests/test_triton_run.py \
		tests/test_session_store_s3.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_serve_page.py tests/test_serve_javascript.py

test-fast: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal -m "not slow and not registry"

evidence-real: install
	OMP_NUM_THREADS=1 $(BIN)/python -m scripts.evidence --real

docs: install
	$(BIN)/python -m scripts.docs.write_all

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python -m scripts.checks.cpp_lint --fix

clean:
	rm -rf $(VENV) demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
