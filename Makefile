# make demo | test | bench | lint: each works on a fresh machine, and again within seconds.
# All use one virtual environment, .venv; `make clean` removes it.
#   make demo ARGS="--epochs 3"      make test ARGS="-k text"      make bench ARGS="--threads 1"
#   make test PYTHON=python3.13 TORCH=torch==2.11.0               (after make clean)

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin

.PHONY: demo test bench lint clean
.DELETE_ON_ERROR:
.NOTPARALLEL:  # one environment, one pip
export PIP_DISABLE_PIP_VERSION_CHECK := 1

demo: .venv/with-csv,sklearn
	$(BIN)/python -m pyattn train $(ARGS)

test: .venv/with-test
	$(BIN)/python -m pytest $(ARGS)

bench: .venv/with-bench
	$(BIN)/python benchmarks/run.py --quick $(ARGS)

lint: .venv/with-lint,test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv build

# By the name of what is already installed, pip adds the extras alone and builds nothing.
.venv/with-%: .venv/package
	$(BIN)/python -m pip install --quiet "pyattn[$*]"
	touch $@

# Editable: run from the repository's root, Python finds the package here and not in site-packages, so the extension must
# lie here too.
.venv/package: .venv/torch pyproject.toml setup.py $(wildcard csrc/*)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

# First and by itself: pyattn accepts any torch from 2.10 on, and takes the one it finds.
.venv/torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pyattn needs Python 3.11 or newer; name one: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install "$(TORCH)"
	touch $@
