# Every target but gpu first makes the virtual environment .venv and installs this tree into it
# (editable).
# PYTHON: the interpreters to try, in order; `make test PYTHON=/path/to/python3.12` names one.
PYTHON ?= python3 python3.13 python3.12 python3.11
VENV := .venv
BIN := $(VENV)/bin
BUILD_REQUIREMENTS := $(VENV)/.build-requirements
INSTALLED := $(VENV)/.installed
SOURCES := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*/*)
EMULATOR := $(filter %.cpp %.h %.cuh,$(wildcard $(foreach depth,* */* */*/*,tests/mfops/emulator/$(depth))))

# Of make gpu, in this order.
GPU_PARTS := gpu-build gpu-test gpu-test-triton gpu-bench gpu-bench-op gpu-bench-factorizers gpu-sanitize
.PHONY: help install demo test lowest bench bench-check docs lint format clean gpu gpu-first $(GPU_PARTS)

help:
	@echo "make demo    train MFNet on generated images, print its metrics, draw its predictions"
	@echo "make test    the test suite"
	@echo "make lowest  the test suite on the oldest versions that pyproject.toml allows"
	@echo "make bench   measure on this machine: rows for benchmarks/results (benchmarks/README.md)"
	@echo "make bench-check  a short run: have the op and the factorizers become slower?"
	@echo "make gpu     on a machine with an NVIDIA GPU: build for it, test, measure (docs/gpu.md);"
	@echo "             make gpu-first: the same in short, to begin with"
	@echo "make lint    ruff, mypy, clang-format; make format repairs what can be repaired"
	@echo "make docs    the pages and the API reference, as a web site in site/"
	@echo "make install only the virtual environment, $(VENV)"
	@echo "make clean   remove the environment and everything built"

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/mfnet demo

# Two processes of one thread each; a file's tests stay together, as they share what is costly.
test: $(INSTALLED)
	$(BIN)/python -m pytest -m timed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not timed" -n 2 --dist loadfile --no-loadscope-reorder

# The suite on the oldest versions that pyproject.toml allows, in an environment of its own.
lowest: $(INSTALLED)
	$(BIN)/python -m venv .venv-lowest
	$(BIN)/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable '.[test]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m "not timed" -n 2 --dist loadfile

# BENCH: further options of the suite, for instance make bench BENCH='--data DIR'.
BENCH ?=
bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks $(BENCH)

bench-check: $(INSTALLED)
	$(BIN)/python -m benchmarks.check

# What a GPU is needed for runs in the machine's own Python with its torch, and fetches nothing.
GPU_PYTHON := $(firstword $(PYTHON))
GPU_TEST = $(GPU_PYTHON) -m pytest -m gpu --continue-on-collection-errors
# $(call measure,BENCHMARKS,OPTIONS). Figures that the budget does not suffice for are left out, by
# name; pytest ends with 5 where BENCH selects nothing.
measure = $(GPU_PYTHON) -m pytest $(patsubst %,benchmarks/bench_%.py,$(1)) --seconds 2 $(2) $(BENCH) \
    || [ $$? -eq 5 ]

# A part that fails does not keep the later ones from running.
gpu:
	@failed=; for part in $(GPU_PARTS); do \
	    echo "=== make $$part"; $(MAKE) --no-print-directory $$part || failed="$$failed $$part"; \
	done; \
	if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed" >&2; exit 1; fi; \
	echo "make gpu: all parts passed"

# --force: without it a changed header or architecture would not count as a change; what ninja has
# compiled before it does not compile again.
gpu-build:
	archs=$${TORCH_CUDA_ARCH_LIST:-$$($(GPU_PYTHON) -c 'import torch; \
	    gpus = range(torch.cuda.device_count()) or exit("no CUDA device"); \
	    print(*sorted({"%d.%d" % torch.cuda.get_device_capability(i) for i in gpus}), sep=";")')} && \
	TORCH_CUDA_ARCH_LIST="$$archs" $(GPU_PYTHON) setup.py build_ext --inplace --force
	$(GPU_PYTHON) -m mfops

gpu-test:
	$(GPU_TEST) -k "not triton"

# Most of their time Triton compiles: side by side, where pytest-xdist is installed.
gpu-test-triton:
	$(GPU_TEST) -k triton $$($(GPU_PYTHON) -c 'import xdist; print("-n 4 --dist worksteal")' 2> /dev/null)

# torch.compile takes up to a minute for a case of the op and minutes for one of the factorizers:
# those have parts of their own. Networks take longer than that: docs/gpu.md.
gpu-bench:
	$(call measure,ceilings host factorizers op contexts,--no-compile --budget 420)
gpu-bench-op:
	$(call measure,op,--budget 420 -k "bfloat16 and contiguous and not shared")
gpu-bench-factorizers:
	$(call measure,factorizers,--budget 360 -k "bfloat16 and contiguous")

# To begin with on a new machine: does it build, agree, and about how fast is it?
gpu-first: gpu-build
	$(GPU_TEST) tests/mfops -k "probe or sanitized"
	$(call measure,ceilings host factorizers op,--no-compile --budget 120 \
	    -k "ceiling or host or (bfloat16 and contiguous and (4225 or 32768))")

# Without torch's own allocator every tensor is an allocation that memcheck knows the end of.
gpu-sanitize:
	@if ! command -v compute-sanitizer > /dev/null; then \
	    echo "compute-sanitizer is not installed: nothing done"; exit; fi; \
	status=0; for tool in memcheck racecheck; do \
	    echo "compute-sanitizer --tool $$tool"; \
	    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 180 compute-sanitizer --tool $$tool \
	        --kernel-name kns=mfops --report-api-errors no --error-exitcode 1 \
	        $(GPU_PYTHON) -m pytest -q -m gpu tests/mfops/test_gpu.py tests/mfops/test_gpu_factors.py -k sanitized \
	        || status=1; \
	done; exit $$status

# The pages and the API reference, as a web site in site/.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(SOURCES) $(EMULATOR)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(EMULATOR)

clean:
	rm -rf $(VENV) .venv-lowest build dist site *.egg-info mfops/_C*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
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
$(BUILD_REQUIREMENTS): pyproject.toml | $(BIN)/python
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['build-system']['requires'], sep='\n')" \
	    | $(BIN)/python -m pip install -r /dev/stdin
	touch $@

$(INSTALLED): $(BUILD_REQUIREMENTS) setup.py $(SOURCES)
	$(BIN)/python -m pip install --no-build-isolation --editable '.[dev]'
	$(BIN)/python -m mfops
	touch $@
