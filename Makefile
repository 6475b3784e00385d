# `make`: environment, check, pipeline, summary. `make test`: the tests, a quarter of an hour on two cores. See README.md.

.DEFAULT_GOAL := all
SHELL := /bin/bash

# DVC runs `python` for its stages: it must be the environment's own.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# uv where it is installed; where it is not, the environment brings its own.
UV := $(shell command -v uv 2>/dev/null || echo .venv/bin/uv)

.PHONY: all env keras ray check repro why plan compare report test test-all lint format requirements clean

all: check
	dvc repro
	@python -m tools.summary

env: .venv/ready

.venv/ready: requirements.txt
	@# A new environment the first time alone: the uv that updates it may be its own.
	@[ -e $@ ] || { rm -rf .venv; if command -v uv >/dev/null; then uv venv --quiet --python '>=3.11' .venv; \
	else python3 -m venv .venv && .venv/bin/python -m pip install --quiet uv; fi; }
	@# Bytecode now rather than at the first import of each stage: torch and transformers start in half the time.
	$(UV) pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes -r requirements.txt
	@touch $@

# What framework: keras needs beside (docs/keras.md): three gigabytes.
keras: .venv/keras

.venv/keras: requirements-keras.txt .venv/ready
	$(UV) pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes -r requirements-keras.txt
	@touch $@

# What hardware: ray needs beside (docs/cluster.md): 260 megabytes.
ray: .venv/ray

.venv/ray: requirements-ray.txt .venv/ready
	$(UV) pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes -r requirements-ray.txt
	@touch $@

check: env
	@python -m tools.check

# TASK=causal: the stages of this task, up to its evaluation.
repro: check
	dvc repro $(if $(TASK),'evaluate@$(TASK)')

# STAGE=train@causal: of this stage and those that it depends on.
why: env
	@python -m tools.why $(if $(STAGE),'$(STAGE)')

plan: env
	@python -m tools.plan $(if $(STAGE),'$(STAGE)')

# BY=GROUP: with a column for each value of a group, `make compare BY=source`.
compare: env
	@python -m tools.compare $(if $(BY),--by '$(BY)')

report: env
	@python -m tools.report

# Two at once, a file each; threads that wait do so without spinning, which would take the other's core.
test: env
	OMP_WAIT_POLICY=passive python -m pytest -q -n 2 --dist loadfile

test-all: env
	python -m pytest -q -m 'slow or not slow' --timeout 3600

lint: env
	ruff check . && ruff format --check . && mypy

format: env
	ruff check --fix . && ruff format .

# Every version pinned with hashes, for every platform, naming no registry.
requirements: pyproject.toml
	$(UV) pip compile --quiet --universal --extra dev --generate-hashes --no-emit-index-url --no-header \
	  --python-version 3.11 pyproject.toml -o requirements.txt
	for extra in keras ray; do $(UV) pip compile --quiet --universal --extra $$extra --generate-hashes \
	  --no-emit-index-url --no-header --python-version 3.11 -c requirements.txt pyproject.toml \
	  -o requirements-$$extra.txt; done

clean:
	rm -rf .venv .dvc/cache .dvc/tmp data/raw data/blocks reports metrics/baseline
	find data/tokens models -mindepth 1 -maxdepth 1 ! -name none -exec rm -rf {} +
