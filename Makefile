# `make demo` and `make test` do everything on a fresh machine: their own virtual environment, pinned
# versions, the C++ extensions. Override PYTHON to choose the interpreter.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=
# A machine lent with its GPU has a Python with torch and needs nothing of ours installed.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)

.PHONY: help install demo test test-slow lint types bench gpu-check clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/.installed  ## virtual environment with everything the project needs

# The stamp depends on what an install reads, so an edited C++ file or pin is picked up.
$(VENV)/.installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools pybind11
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@

demo: install  ## a frozen model follows two rewards, in under three minutes (ARGS="--help")
	$(BIN)/vas demo $(ARGS)

test: install  ## the ordinary tests, a process for each core up to eight (ARGS="-n 0 tests/engine")
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal $(ARGS)

test-slow: install  ## the heavy tests too
	$(BIN)/python -m pytest -m 'slow or not slow' $(ARGS)

lint: install  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install  ## mypy
	$(BIN)/mypy

bench: install  ## benchmarks, written to benchmarks/results (ARGS="-k sampler")
	$(BIN)/python -m pytest benchmarks -o addopts= -o timeout=0 --benchmark-only $(ARGS)

gpu-check:  ## kernels, parity and speed on a GPU, in ten minutes, nothing installed (PART="parity decode")
	$(GPU_PYTHON) -m benchmarks.gpu_check $(if $(PART),--part $(PART)) $(ARGS)

clean:  ## remove what was built
	rm -rf $(VENV) build *.egg-info vas_engine/*.so
