# make demo    set up, build, train a small GPT on Shakespeare, write text with it
# make test    the same set-up, then the whole test suite
# make bench   one table per operation: fastformer, PyTorch eager, torch.compile, the limit
# make gpu     on a machine with a GPU: build, GPU tests, every benchmark (SECTION=attention for one part)
# make lint    format, lint, import contract, types
# make build   set up and (re)build the kernels in place
# make clean   remove what these made, .venv included
#
# PYTHON=python3.12 chooses the Python to start from. VENV=0 uses it as it is, without .venv and without installing.

.PHONY: help demo test bench gpu lint build clean
.DEFAULT_GOAL := help

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

PYTHON_FILE := build/python$(if $(filter 0,$(VENV)),-present)
PY = "$$(cat $(PYTHON_FILE))"
# A removed environment is made again.
$(shell test -x "$$(cat $(PYTHON_FILE) 2>/dev/null)" || rm -f $(PYTHON_FILE))

# Test processes at a time, where pytest-xdist is installed. Each has two threads, so that the kernels' threaded paths are
# tested; passive ones, which leave the cores to the others while they wait.
WORKERS ?= 2

SOURCES := $(wildcard csrc/include/*.h csrc/cpu/* csrc/cuda/* csrc/python/*)

help:
	@sed -n '/^# make/,/^# PYTHON/s/^# \{0,1\}//p' Makefile

$(PYTHON_FILE): tools/setup.sh constraints.txt pyproject.toml
	@sh tools/setup.sh $@

# `pip install -e` compiles nothing here: the modules are already in place, where their progress could be seen.
build/built: $(PYTHON_FILE) setup.py fastformer/version.py $(SOURCES)
	@echo "==> Building the kernels (minutes from clean, seconds afterwards)"
	@$(PY) setup.py -q build_ext --inplace
	@case $(PY) in "$(CURDIR)"/.venv/*) \
	  $(PY) -m pip --disable-pip-version-check install -qq --no-build-isolation --no-deps -e . ;; esac
	@touch $@

# The tests' own module: the AVX-512 kernels in AVX2 instructions.
build/built-wide: build/built
	@FASTFORMER_WIDE_EMULATION=1 $(PY) setup.py -q build_ext --inplace
	@touch $@

build: build/built
	@echo "==> The kernels are built and up to date"

demo: build/built
	@$(PY) -m fastformer demo $(ARGS)

build/test-packages: $(PYTHON_FILE) tools/test-setup.sh constraints.txt pyproject.toml
	@sh tools/test-setup.sh $@ $(PY)

test: build/built-wide build/test-packages
	@echo "==> Running the tests (ARGS='-k layer_norm' runs some of them)"
	@OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive \
	  $(PY) -m pytest $$($(PY) -c 'import xdist' 2>/dev/null && printf -- '-n%s --dist=worksteal' $(WORKERS)) $(ARGS)

bench: build/built build/test-packages
	@$(PY) -m benchmarks $(ARGS)

# It builds by itself, for the card that is there.
gpu: $(PYTHON_FILE) build/test-packages
	@SECTION="$(SECTION)" $(PY) benchmarks/gpu.py $(ARGS)

build/lint-tools: $(PYTHON_FILE)
	@case $(PY) in "$(CURDIR)"/.venv/*) echo "==> Installing ruff, import-linter and mypy"; \
	  $(PY) -m pip --disable-pip-version-check install -qq -c constraints.txt ruff import-linter mypy ;; esac
	@touch $@

lint: build/lint-tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c 'from importlinter.cli import lint_imports_command as run; run()'
	$(PY) -m mypy

clean:
	rm -rf .venv build dist runs fastformer.egg-info fastformer/_*.so .pytest_cache .ruff_cache .mypy_cache .benchmarks
