# Needs make, python3 (3.11 or newer, with venv and pip) and a package index; nothing else. `make` lists the targets.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help up test test-long test-engine fuzz soak bench lint check lock prices dashboards clean environment

help:
	@echo 'make up          start the proxy; with no backend configured also two engines with a small model, and Phoenix'
	@echo 'make test        the tests that run in minutes       make test-long   the full-length ones (over an hour)'
	@echo 'make test-engine the tests with a real vLLM on CPUs, which is installed outside the tree on first use (2.4 GB)'
	@echo 'make fuzz        search for inputs that break something, 3 minutes long (ARGS="--minutes 600": a night)'
	@echo 'make soak        20 minutes of load and disturbances: does anything grow, is every row right? (ARGS="--minutes 2")'
	@echo 'make lint        ruff, mypy, import-linter           make check       lint + test'
	@echo 'make bench       side-by-side measurements           make lock        renew the lock files (ARGS=--upgrade)'
	@echo 'make prices      renew the price list from litellm (ARGS=1.109.1: from this version)'
	@echo 'make dashboards  write the Grafana dashboards anew from their sources'
	@echo 'make clean       remove what was built; data in .glasshouse stays'
	@echo 'ARGS="..." is handed to the command behind up, test, test-long, test-engine, fuzz, soak, bench, lock and prices.'

up: $(STAMPS)/runtime
	$(BIN)/glasshouse up $(ARGS)

# in the order of their files: the short ones come last, and both processes end together
test: $(STAMPS)/dev $(STAMPS)/node $(STAMPS)/redisearch
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-long: $(STAMPS)/dev
	$(BIN)/pytest -m long $(ARGS)

test-engine: $(STAMPS)/dev
	$(BIN)/python -m tests.engine
	$(BIN)/pytest tests/engine -m engine $(ARGS)

fuzz: $(STAMPS)/dev
	$(BIN)/pytest tests/fuzz --minutes 3 $(ARGS)

soak: $(STAMPS)/dev
	$(BIN)/python -m tests.soak $(ARGS)

bench: $(STAMPS)/dev
	$(BIN)/pytest -m bench $(ARGS)

dashboards: $(STAMPS)/dev
	$(BIN)/python -m dashboards.grafana.overview

lint: $(STAMPS)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# One environment in three layers: what builds, what runs, what develops. A stamp says that its layer is complete, so an
# interrupted build is taken up again. The locks are complete and hashed: nothing is resolved. uv installs; it does not read pip's
# configuration, so pip stands in where only that knows the index.

pip := $(BIN)/python -m pip --disable-pip-version-check install
locked := --no-deps --require-hashes
old_enough := 'import sys; sys.exit(sys.version_info < (3, 11))'

install = @echo 'Installing $(1)'; $(BIN)/uv pip install --python $(BIN)/python $(locked) -r $(1) || { \
  echo 'uv could not; trying pip, which has a configuration of its own.'; $(pip) $(locked) -r $(1); }

$(STAMPS)/build: requirements-build.txt
	@$(BIN)/python -c $(old_enough) 2>/dev/null || $(MAKE) --no-print-directory environment
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	@echo 'Installing requirements-build.txt'; $(pip) --progress-bar off $(locked) -r requirements-build.txt
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/runtime: requirements.txt pyproject.toml $(STAMPS)/build
	$(call install,requirements.txt)
	@$(pip) --quiet --no-index --no-deps --no-build-isolation --editable .
	@touch $@

$(STAMPS)/dev: requirements-dev.txt $(STAMPS)/runtime
	$(call install,requirements-dev.txt)
	@touch $@

# The clients for Node that tests/compat tries; where there is no npm, those tests skip.

node_clients := tests/compat/node

$(STAMPS)/node: $(node_clients)/package-lock.json | $(STAMPS)/build
	@if command -v npm >/dev/null; then \
	  echo 'Installing $<' && npm ci --prefix $(node_clients) --ignore-scripts --no-audit --no-fund --loglevel=error && touch $@; \
	else \
	  echo 'npm is not there: the tests with clients for Node are skipped.'; \
	fi

# A Redis that searches vectors, for tests of the semantic cache; there is none that every platform has.

redisearch := tests/support/redisearch.txt
for_redisearch := --only-binary :all: --python-version 3.11 --implementation cp --platform manylinux_2_31_x86_64 \
  --platform manylinux2014_x86_64

$(STAMPS)/redisearch: $(redisearch) | $(STAMPS)/build
	@if [ "$$(uname -sm)" != 'Linux x86_64' ]; then \
	  echo 'The tests with a Redis that searches vectors are skipped: there is none for this platform.'; \
	else \
	  echo 'Installing $<' && rm -rf $(VENV)/redisearch && \
	  $(pip) --quiet --progress-bar off $(locked) $(for_redisearch) --target $(VENV)/redisearch -r $< && touch $@ || \
	  echo 'It could not be installed: the tests with a Redis that searches vectors are skipped.'; \
	fi

environment:
	@$(PYTHON) -c $(old_enough) || { \
	  echo "Python 3.11 or newer is needed; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name another: make PYTHON=python3.12 ..."; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' comes without venv or pip. On Debian and Ubuntu: apt-get install python3-venv"; \
	  exit 1; }
	@echo 'Building the environment in $(VENV), once: a minute or less.'
	$(PYTHON) -m venv --clear $(VENV)

# The locks hold for CPython 3.11 and later on Linux (x86_64 and aarch64) and macOS: one resolution, with markers where they differ.
# All files of a release are hashed, so that any of its wheels may be taken. No package index is named in them. The engine's list is
# not a closure: see its source.

compile = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-strip-extras \
  --custom-compile-command 'make lock' $(ARGS)
embedded := proxy/embedded/requirements

# The vLLM of the engine tests is for one platform only, and needs a build of torch that not every index has: it is looked for where
# pip would look.
vllm := tests/engine/requirements
compile_vllm = $(BIN)/python -m tests.engine.sources $(subst --universal --python-version 3.11,--python-version 3.11 \
  --python-platform x86_64-manylinux_2_28,$(compile)) $(vllm).in --override tests/engine/overrides.txt --output-file $(vllm).txt

lock: $(STAMPS)/build
	$(compile) --group pyproject.toml:build --output-file requirements-build.txt
	$(compile) pyproject.toml --output-file requirements.txt
	$(compile) pyproject.toml --extra dev --group pyproject.toml:build --constraint requirements.txt --constraint requirements-build.txt \
	  --output-file requirements-dev.txt
	$(compile) $(embedded)-phoenix.in --output-file $(embedded)-phoenix.txt
	$(compile) $(embedded)-engine.in --no-deps --output-file $(embedded)-engine.txt
	$(compile_vllm)

# What providers charge, as data in the tree; read the diff before committing it.

prices: $(STAMPS)/runtime
	$(BIN)/python -m proxy.pricelist.refresh $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis .schemathesis .glasshouse/env $(node_clients)/node_modules
	find proxy collectors dashboards tests -name __pycache__ -type d -prune -exec rm -rf {} +
