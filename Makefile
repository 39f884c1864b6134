# `make help` lists the targets. Everything is installed into .venv by the first python3 >= 3.11 on PATH.
SHELL := /bin/bash
PYTHON ?= $(shell for p in $$(which -a python3 python3.14 python3.13 python3.12 python3.11 2>/dev/null); do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$p" && break; done)
BIN := .venv/bin
CHECKED := flip jobs tools lab tests benchmarks kernel

# The quick and the steady ones first; each says in the end what it took.
BENCHMARKS := order prefetch memory launcher report evaluation checkpoint loss resume storage parquet stream step recovery
PEERS := .venv-bench/bin

# Tests of `make check` have none of these markers.
LONG := kill or slurm or s3 or browser or long
# Without bytecode each pytest process rewrites all tests (11 s), and each command that a test starts compiles FLIP (0.2 s).
PYTEST := env -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest --durations 30
# mypy uses one core for most of a minute, so tests run at the same time.
TYPES_AND_TESTS := $(MAKE) --no-print-directory --jobs 2 types run-tests

.PHONY: help install dev docs figures lock slurm browser bsdtar check test test-all run-tests test-cuda-stub lint types quickstart study scaling-study icons records audit storm bench bench-gpu bench-install clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 22

# Locked packages are checked by their hashes. torch and what it brings are not locked: which build fits depends on the machine.
# Its build is the user's choice: TORCH_INDEX is the address of an index with torch; without it torch comes as pip finds it.
INSTALL := $(BIN)/python -m pip install -q --disable-pip-version-check
UNLOCKED := torch|torchvision|triton|nvidia-.*|cuda-.*
COMPILE := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock"

# With UNLOCK the packages are looked up again, however new those of .venv are.
.PHONY: newest
PACKAGES = -r requirements.txt
ifdef UNLOCK
$(BIN)/.ready: newest
PACKAGES = --upgrade -r requirements.txt
endif

$(BIN)/.ready: requirements.txt requirements.lock
	@test -n "$(PYTHON)" || { echo "no python3 >= 3.11 on PATH"; exit 78; }
	@echo "installing into .venv with $(PYTHON)"
	@echo "torch from $(or $(TORCH_INDEX),pip's index): PyPI's brings CUDA on Linux (5.9 GB), https://download.pytorch.org/whl/cpu does not (0.7 GB): make install TORCH_INDEX=ADDRESS"
	@begin=$$(date +%s); "$(PYTHON)" -m venv .venv && $(if $(UNLOCK),,$(INSTALL) --no-deps --require-hashes -r requirements.lock &&) \
		$(if $(TORCH_INDEX),$(INSTALL) --index-url $(TORCH_INDEX) -c requirements.txt torch torchvision &&) \
		$(INSTALL) $(PACKAGES) && $(BIN)/python -m pip freeze > .venv/installed.txt && \
		touch $@ && echo "installed in $$(( $$(date +%s) - begin )) s" || \
		{ echo "not installed: does this machine reach the package index? Another one: PIP_INDEX_URL, a folder of wheels: PIP_FIND_LINKS"; exit 69; }

$(BIN)/.dev: $(BIN)/.ready requirements-dev.txt requirements-dev.lock
	@echo "installing what the tests need"
	@$(if $(UNLOCK),,$(INSTALL) --no-deps --require-hashes -r requirements-dev.lock &&) \
		$(INSTALL) $(PACKAGES) -r requirements-dev.txt && $(BIN)/python -m pip freeze > .venv/installed.txt && touch $@

# The command flip, for this checkout. The packages are installed already, so nothing is fetched. The mode puts the checkout
# on the path: with setuptools' default, a folder that contains a checkout named flip would hide the package.
$(BIN)/flip: $(BIN)/.ready pyproject.toml
	@$(INSTALL) 'setuptools>=77' && $(INSTALL) --no-deps --no-build-isolation \
		--config-settings editable_mode=compat -e . && touch $@

# The kernel in C. Without a compiler the package is installed without its library, and images are decoded as a whole.
KERNEL := $(wildcard kernel/*.py kernel/*.toml kernel/src/* kernel/visible_jpeg/*.py)

$(BIN)/.kernel: $(BIN)/.ready $(KERNEL)
	@$(INSTALL) 'setuptools>=77' && rm -rf kernel/build && \
		$(INSTALL) --no-deps --no-build-isolation --force-reinstall ./kernel && rm -rf kernel/build kernel/*.egg-info && touch $@

install: $(BIN)/flip $(BIN)/.kernel  ## build .venv with all packages for runs (UNLOCK=1: the newest releases instead of the locked ones)
	@$(BIN)/python -P -m visible_jpeg $(if $(filter 1,$(FLIP_REQUIRE_KERNEL)),--require)

dev: $(BIN)/.dev install  ## add the packages for tests and checks

lock: dev  ## update the requirements*.lock: the newest releases and their hashes
	@folder=$$(mktemp -d) && trap 'rm -r "$$folder"' EXIT && \
	$(COMPILE) requirements.txt requirements-dev.txt -o "$$folder/requirements-dev" && \
	$(COMPILE) -c "$$folder/requirements-dev" requirements.txt -o "$$folder/requirements" && \
	$(COMPILE) requirements-node.txt -o "$$folder/requirements-node" && \
	for name in requirements requirements-dev requirements-node; do \
		awk '/^[a-z]/ { skip = $$0 ~ /^($(UNLOCKED))==/ } !skip' "$$folder/$$name" > "$$folder/$$name.lock" && \
		mv "$$folder/$$name.lock" . || exit 1; done

docs: dev  ## build the documentation with search, and the references from the code, into build/docs; a broken link is an error
	@$(BIN)/python -m lab.documentation.build --out build/docs

figures: dev browser  ## draw the figures of the README from real output (REPORT=runs/quickstart: also of its report page)
	@$(BIN)/python -m lab.documentation.figures $(if $(REPORT),--report $(REPORT)) $(if $(RECORD),--record $(RECORD))

slurm: dev  ## install Slurm's packages for the tests if possible (root on Debian); else report it
	@missing=$$($(BIN)/python -m jobs slurm_sandbox packages --accounting) && \
		{ [ -z "$$missing" ] || tests/slurm/install.sh $$missing; }
	@command -v shellcheck >/dev/null || tests/slurm/install.sh shellcheck || \
		{ echo "no shellcheck: the batch scripts are not checked"; [ "$$FLIP_REQUIRE_SLURM" != 1 ]; }

browser: dev  ## install a headless Chromium for the tests of pages if possible (root on Debian)
	@command -v chromium-headless-shell chromium google-chrome >/dev/null || \
		FLIP_REQUIRE_SLURM= tests/slurm/install.sh chromium-headless-shell || \
		echo "no browser: the tests of the report page in a browser are skipped"

bsdtar: install  ## install bsdtar and zsh for the tests of foreign tars and completion if possible (root on Debian)
	@command -v bsdtar >/dev/null && command -v zsh >/dev/null || \
		FLIP_REQUIRE_SLURM= tests/slurm/install.sh libarchive-tools zsh || \
		echo "no bsdtar or no zsh: tests that need them are skipped"

check: lint  ## lint, types and unit tests (3 minutes on two cores): no Slurm, no S3 server, no long training
	$(TYPES_AND_TESTS) TESTS="not slow and not gpu and not ($(LONG))"

test: lint slurm browser bsdtar  ## what CI runs: check, and one or two tests of each long kind (20 minutes on two cores)
	$(TYPES_AND_TESTS) TESTS="not slow and not gpu"

test-all: lint slurm browser bsdtar  ## all tests that need no GPU: each scenario, storm and numeric comparison (hours)
	$(TYPES_AND_TESTS) TESTS="not gpu and not cuda_stub" PYTEST_OPTIONS="--hypothesis-profile all"
	$(MAKE) test-cuda-stub

# tests/conftest.py chooses the number of processes, and lets tests that use a real Slurm run one after another.
run-tests: dev
	$(PYTEST) -n auto --dist worksteal $(PYTEST_OPTIONS) -m "$(TESTS)"

# The packages, 4.6 GB, are installed once into the cache (FLIP_CACHE), where all clones use them.
test-cuda-stub: dev  ## steps on PyTorch's CUDA build above a stub of CUDA that pretends eight H100s (half an hour on two cores)
	$(PYTEST) -m cuda_stub tests/cuda_stub

lint: dev  ## ruff: lint and format
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)

types: dev  ## mypy on flip/, jobs/, tools/ and lab/
	$(BIN)/mypy

# The commands are shown, as in docs/start.md. --retry continues runs that Ctrl-C has stopped.
QUICKSTART := quickstart$(if $(FULL),_full)
SUBMIT := $(BIN)/flip submit $(QUICKSTART) --cluster local --foreground --retry$(if $(FULL), --seeds 0 1 2)

quickstart: install  ## a model and its predictions in 3 minutes, the comparison in 5 (two idle cores; FULL=1: longer runs, three seeds, about an hour)
	$(BIN)/flip demo_data
ifndef FULL
	$(SUBMIT) --only masked
	$(BIN)/flip predict quickstart/masked --set twemoji --count 12
	@$(BIN)/flip report quickstart | tail -n 1
endif
	$(SUBMIT)
	@$(BIN)/flip report $(QUICKSTART) | tail -n 1
	@echo "curves: $(BIN)/flip tensorboard $(QUICKSTART)"

study: install  ## write docs/study.md from its results; STUDY=cheapest: docs/cheapest.md; AGAIN=mine: train it again into mine/ (less than 100 minutes)
	@$(BIN)/flip demo_data
	@$(BIN)/python -m lab.study $(if $(STUDY),--study $(STUDY)) $(if $(AGAIN),--again $(AGAIN))

scaling-study: icons  ## train what is missing of the scaling study; write docs/scaling_study.md (at most 12 hours; MINUTES=80: a part)
	@$(BIN)/python -m lab.study --study scaling $(if $(MINUTES),--minutes $(MINUTES))

icons: install  ## fetch and build the data of the scaling study into the cache (15 minutes of a core)
	@$(BIN)/python -m lab.icons

records: install  ## write docs/records.md; ROW=NAME: measure this run of sweeps/records.yaml again first (two idle cores, 10 to 30 minutes)
	@$(BIN)/flip demo_data
	@$(BIN)/python -m lab.records $(if $(ROW),--measure $(ROW))

audit: install  ## list known vulnerabilities of the installed packages with pip-audit (69: the index could not be reached)
	@$(BIN)/python -m pip install -q --disable-pip-version-check 'pip-audit>=2.7,<3'
	@$(BIN)/python -m lab.audit

storm: slurm  ## inject faults into a sweep on a real Slurm and S3 server (SEED=3 FAULTS=12 SITE=foreign or agents OUT=page.md; three to six minutes)
	@$(BIN)/python -m tests.storm $(if $(SEED),--seed $(SEED)) $(if $(FAULTS),--faults $(FAULTS)) $(if $(SITE),--site $(SITE)) $(if $(OUT),--out $(OUT))

$(PEERS)/.ready: requirements.txt requirements-dev.txt requirements-bench.txt $(KERNEL)
	@test -n "$(PYTHON)" || { echo "no python3 >= 3.11 on PATH"; exit 78; }
	"$(PYTHON)" -m venv .venv-bench && $(PEERS)/python -m pip install -q --disable-pip-version-check \
		'setuptools>=77' -r requirements.txt -r requirements-dev.txt -r requirements-bench.txt && rm -rf kernel/build && \
		$(PEERS)/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation --force-reinstall ./kernel && \
		rm -rf kernel/build kernel/*.egg-info && touch $@

bench-install: $(PEERS)/.ready  ## build .venv-bench: FLIP and the peers that benchmarks/ compares it with

bench: $(PEERS)/.ready  ## measure FLIP and the peers; write benchmarks/RESULTS.md (about an hour on two quiet cores; ONLY="stream loss", QUICK=1)
	@folder=$(if $(QUICK),$$(mktemp -d),benchmarks/results); failed=; \
	for name in $(or $(ONLY),$(BENCHMARKS)); do echo "== $$name"; \
		$(PEERS)/python benchmarks/$$name.py $(if $(QUICK),--quick) --out $$folder/$$name.json || failed="$$failed $$name"; \
	done; \
	$(PEERS)/python benchmarks/table.py $(if $(QUICK),--results $$folder) || failed="$$failed table"; \
	$(if $(QUICK),rm -r $$folder;) test -z "$$failed" || { echo "failed:$$failed"; exit 1; }

# Installs nothing: a node with GPUs may have no network. Its own Python will do if it has torch, timm and
# numpy, and for the row of tests the packages of `make dev`.
GPU_PYTHON ?= $(firstword $(wildcard $(PEERS)/python $(BIN)/python) $(PYTHON))

bench-gpu:  ## measure steps, memory, loss and saves on one GPU (25 minutes at most; the next call continues; ONLY="step_b16 save")
	$(GPU_PYTHON) benchmarks/gpu.py $(if $(ONLY),--only $(ONLY))
	$(GPU_PYTHON) benchmarks/table.py

clean:  ## remove .venv and caches (never runs/)
	rm -rf .venv .venv-bench .pytest_cache .mypy_cache .ruff_cache
