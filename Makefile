# Everything here works in a virtual environment of its own (.venv); nothing outside the checkout is changed.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
# The first python of the path that is new enough; PYTHON=... overrides.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$python && break; done)
PIP_INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
PIP_HASHED := $(BIN)/python -m pip install -qq --disable-pip-version-check --require-hashes --no-deps
LOCK := uv pip compile -q --no-deps --universal --python-version 3.10 --generate-hashes --no-annotate --no-header
# Where pip's own choice brings CUDA libraries that are not wanted, point pip elsewhere, or give TORCH='torch==2.13.0+cpu'.
TORCH ?= torch==2.13.0
# What gpu-check checks.
DEVICE ?= cuda
GPUS ?= 1
# One thread for each rank and each test worker: more ranks than cores would fight otherwise.
export OMP_NUM_THREADS := 1
export DS_ACCELERATOR ?= cpu
export TOKENIZERS_PARALLELISM := false

.NOTPARALLEL:
.PHONY: help setup demo tasks test check docs settings lint format unit distributed gpu-check cluster reshape-matrix coordinates faults hangs chaos hostile hf-fresh setup-hashed lock audit clean

help: ## Say what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 24

setup: $(STAMP) ## Make .venv with everything pinned (a second call does nothing)

$(STAMP): pyproject.toml setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "Python 3.10 or newer is needed; give it with: make PYTHON=/path/to/python3" >&2; exit 2; }
	@echo "setting up $(VENV) with $$($(PYTHON) --version); this takes some minutes once"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "no virtual environment could be made; Debian and Ubuntu need: apt-get install python3-venv" >&2; exit 2; }
	@# DeepSpeed's build asks the installed torch what to build for, so torch comes first; its C++ operators are not needed.
	$(PIP_INSTALL) '$(TORCH)' setuptools wheel numpy packaging
	DS_BUILD_OPS=0 $(PIP_INSTALL) --no-build-isolation --editable '.[wandb,hf,dev]'
	@# The judge of the corpus format, without its dependencies; where it cannot be had, its tests are skipped.
	-$(PIP_INSTALL) --no-deps megatron-core==0.16.1
	@touch $@

setup-hashed: ## Make .venv as setup does, every package but torch checked against its hash first
	@test ! -e $(VENV) || { echo "$(VENV) exists; move it away first: a hash says nothing of what is installed already" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP_HASHED) -r requirements/hashed.txt
	@# torch differs by accelerator, and brings its own CUDA libraries; give TORCH as a file with its hash to pin it too.
	$(PIP_INSTALL) '$(TORCH)'
	DS_BUILD_OPS=0 $(PIP_HASHED) --no-build-isolation -r requirements/hashed-deepspeed.txt
	$(PIP_INSTALL) --no-deps --no-build-isolation --editable .
	@touch $(STAMP)

lock: ## Write the hashes of constraints.txt anew (needs uv and the package index)
	@command -v uv > /dev/null || { echo "uv is needed: pip install uv" >&2; exit 2; }
	grep -v '^torch==\|^deepspeed==' constraints.txt | $(LOCK) - > requirements/hashed.txt.new
	grep '^deepspeed==' constraints.txt | $(LOCK) - > requirements/hashed-deepspeed.txt.new
	@for file in hashed hashed-deepspeed; do \
		{ grep '^# ' requirements/$$file.txt; cat requirements/$$file.txt.new; } > requirements/$$file.txt.whole \
		&& mv requirements/$$file.txt.whole requirements/$$file.txt && rm requirements/$$file.txt.new; done

audit: ## Look for known weaknesses of every pinned package (needs pip-audit and the network; by hand, before a release)
	@command -v pip-audit > /dev/null || { echo "pip-audit is needed: pip install pip-audit" >&2; exit 2; }
	pip-audit --strict --disable-pip --no-deps --requirement requirements/hashed.txt --requirement requirements/hashed-deepspeed.txt

demo: setup ## Train a tiny GPT-Omega on 8 CPU ranks (TP 2 x PP 2 x DP 2) and let it write
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/omega-tiny/run.sh

tasks: setup ## Fine-tune the demo's model on tasks gathered here, whole and with adapters, and compare on one page
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/omega-tasks/run.sh

test: lint unit distributed ## Check everything: lint, types, unit tests, then tests of several ranks

check: setup ## The fast half of test: lint, types, and the unit tests of what was changed (SINCE=main)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/python -m pytest -q -n 2 -m "not distributed" $$($(BIN)/python tests/affected.py $(SINCE))

docs: setup ## Make the documentation site in build/site
	@# An environment of its own: mkdocs brings a package called watchdog, which hides tests/watchdog.
	@test -x build/docs/bin/mkdocs || { $(PYTHON) -m venv build/docs && build/docs/bin/python -m pip install -qq \
		--disable-pip-version-check --constraint constraints.txt 'mkdocs>=1.6'; }
	build/docs/bin/mkdocs build --quiet --strict

settings: setup ## Write docs/settings.md anew from the schema
	$(BIN)/python -m megatron_omega settings > docs/settings.md.new && mv docs/settings.md.new docs/settings.md

lint: setup ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

unit: setup ## Run the tests that need one process each
	$(BIN)/python -m pytest -q -n 2 -m "not distributed"

distributed: setup ## Run the tests that start several ranks
	$(BIN)/python -m pytest -q -n 2 -m "distributed and not cluster"

gpu-check: setup ## Check kernels, losses, messages and rates of this machine's device (DEVICE=cpu or cuda, GPUS=8, JSON=file)
	DS_ACCELERATOR=$(DEVICE) $(BIN)/python tools/check_device.py --device $(DEVICE) --gpus $(GPUS) $(if $(JSON),--json $(JSON))

cluster: setup ## Run the tests on a Slurm cluster in namespaces (root; apt-get install what .ci/run names)
	$(BIN)/python -m pytest -q -m cluster

reshape-matrix: setup ## Save under every layout, resume under every other, and print the matrix
	$(BIN)/python tests/checkpoint/reshape_matrix.py

coordinates: setup ## Print how far activations move in the first steps, over widths and depths
	$(BIN)/python benchmarks/coordinates.py

faults: setup ## Do every fault to real training and print what became of each
	cd tests && PYTHONPATH=..:. ../$(BIN)/python -m faults

hangs: setup ## Stop a random rank at a random moment, 10 times, and see whether the verdict names it
	cd tests && PYTHONPATH=..:. ../$(BIN)/python -m faults.hangs

chaos: setup ## Do 25 random faults to one run, which has to end as if nothing had happened
	cd tests && PYTHONPATH=..:. ../$(BIN)/python -m faults.chaos

hostile: setup ## Damage every byte of small files, 500 configurations and 200 files of each kind, and print how each ended
	cd tests && PYTHONPATH=..:. ../$(BIN)/python -m hostile

hf-fresh: setup ## Compare presets at full size with Transformers in an environment of its own, without this package (minutes)
	cd tests/export && PYTHONPATH=../..:..:. ../../$(BIN)/python fresh.py --torch '$(TORCH)' $(if $(PRESET),--preset $(PRESET))

format: setup ## Format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what tests and tools leave behind (not .venv, not runs)
	rm -rf .pytest_cache .hypothesis .ruff_cache build dist *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
