# Every target first makes the virtual environment .venv and installs this tree into it (editable).
# PYTHON: the interpreters to try, in order; `make test PYTHON=/path/to/python3.12` names one.
PYTHON ?= python3 python3.12 python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*)

.PHONY: help install demo test gpu lint format clean

help:
	@echo "make demo    train MFNet on generated images, print its metrics, draw its predictions"
	@echo "make test    the test suite"
	@echo "make gpu     the tests that need a CUDA device"
	@echo "make lint    ruff, mypy, clang-format; make format repairs what can be repaired"
	@echo "make install only the virtual environment, $(VENV)"
	@echo "make clean   remove the environment and everything built"

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/mfnet demo

test: $(INSTALLED)
	$(BIN)/python -m pytest

gpu: $(INSTALLED)
	$(BIN)/python -m pytest -m gpu

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

clean:
	rm -rf $(VENV) build dist *.egg-info mfops/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ensurepip is what Debian's python3 lacks without its python3-venv package.
$(BIN)/python:
	@for python in $(PYTHON); do \
	    if $$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then $$python -m venv $(VENV) && exit 0; fi; \
	done; \
	echo "error: none of '$(PYTHON)' is a Python >= 3.11 with venv and pip (Debian, Ubuntu:" \
	    "apt install python3-venv): make it so or name another, make PYTHON=/path/to/python" >&2; \
	exit 1

# The build requirements go in first: the extension is then compiled against the very torch that
# runs it, and torch is not fetched a second time into a throw-away build environment.
$(INSTALLED): pyproject.toml setup.py $(SOURCES) | $(BIN)/python
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" \
	    | $(BIN)/python -m pip install -r /dev/stdin
	$(BIN)/python -m pip install --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m mfops
	touch $@
