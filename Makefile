# Two commands do everything: `make demo` runs the main job, `make test` runs the tests. Both set up what they need.

PYTHON ?= python3
VENV   ?= .venv
# Where pip finds torch for this kind of machine; empty: pip's own default. See "Set-up" in the README.
TORCH_INDEX ?=
# Set QUIET= to see pip at work.
QUIET  ?= --quiet

BIN := $(VENV)/bin
PIP := $(BIN)/pip install $(QUIET) --disable-pip-version-check -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
STAMP := pyproject.toml setup.py constraints.txt

.PHONY: demo demo-clean test test-fast test-all lint format docs bench gpu clean help

help:
	@echo "make demo        set up, then the complete job on a small corpus: clips -> shards -> LoRA (demo/)"
	@echo "make demo-clean  remove the demo's output"
	@echo "make test        set up, then the tests"
	@echo "make test-fast   the tests that take seconds: formats, keys, plans, order, draws, documents"
	@echo "make test-all    the slow tests too"
	@echo "make lint        ruff and mypy"
	@echo "make format      ruff format, and the fixes that ruff can make"
	@echo "make docs        write the generated pages again: docs/reference and the tables of docs/scaling.md"
	@echo "make bench       the benchmarks: ratios and counts, in tests/benchmarks/"
	@echo "make gpu         what is right and how fast it is on this machine's GPU, in eight minutes; ARGS=--tiny: on a CPU"
	@echo "make clean       remove the environment and the demo's output"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; name a newer one: make PYTHON=/path/to/python3.11"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "error: the venv module is missing (Debian: apt install python3-venv)"; exit 2; }

$(VENV)/.run: $(STAMP) | $(BIN)/python
	@echo "installing what the demo needs into $(VENV) (two to three minutes) ..."
	@$(PIP) -e '.[prep,train]'
	@touch $@

$(VENV)/.dev: $(STAMP) | $(BIN)/python
	@echo "installing what the tests need into $(VENV) (two to three minutes) ..."
	@$(PIP) -e '.[prep,train,dev]'
	@touch $@ $(VENV)/.run

demo: $(VENV)/.run
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh configs/demo/run.sh

demo-clean:
	rm -rf demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal

# Files that hold neither browser tests nor builds.
FAST := tests/test_boundaries.py tests/test_docs.py \
  $(patsubst %,tests/shards/test_%.py,keys codec tar config identity format dataset) \
  $(patsubst %,tests/preprocess/test_%.py,timecode records sieve) \
  $(patsubst %,tests/train/test_%.py,order draws objective solver lora plan)

test-fast: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal $(FAST)

test-all: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev
	$(BIN)/python docs/reference/generate.py
	$(BIN)/python docs/reference/scaling_tables.py

bench: $(VENV)/.dev
	@broken=; for bench in tests/benchmarks/bench_*.py; do echo "== $$bench"; $(BIN)/python $$bench || broken="$$broken $$bench"; done; \
	  if [ "$$broken" ]; then echo "a promise was not kept, or the benchmark failed:$$broken"; exit 1; fi

# No set-up: a machine with a GPU may have no network. The script names what is missing.
gpu:
	@$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) tests/benchmarks/gpu_checks.py $(ARGS)

clean: demo-clean
	rm -rf $(VENV) build *.egg-info
