# `make`: environment, check, pipeline, summary. `make test`: the tests, a quarter of an hour on two cores. See README.md.

.DEFAULT_GOAL := all
SHELL := /bin/bash

# DVC runs `python` for its stages: it must be the environment's own.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

# The installed uv, or otherwise the one in the environment.
UV := $(shell command -v uv 2>/dev/null || echo .venv/bin/uv)

.PHONY: all env keras ray optuna check repro why plan compare report test test-all lint format requirements clean

all: check
	dvc repro
	@python -m tools.summary

env: .venv/ready

.venv/ready: requirements.txt
	@# Create the environment only once: later updates may run the uv in it.
	@[ -e $@ ] || { rm -rf .venv; if command -v uv >/dev/null; then uv venv --quiet --python '>=3.11' .venv; \
	else python3 -m venv .venv && .venv/bin/python -m pip install --quiet uv; fi; }
	@# Compile bytecode now instead of at the first import: torch and transformers then start in half the time.
	$(UV) pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes -r requirements.txt
	@touch $@

# Additional packages for framework: keras (docs/keras.md), three gigabytes.
keras: .venv/keras

.venv/keras: requirements-keras.txt .venv/ready
	$(UV) pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes -r requirements-keras.txt
	@touch $@

# Additional packages for hardware: ray (docs/cluster.md), 260 megabytes.
ray: .venv/ray

.venv/ray: requirements-ray.txt .venv/ready
	$(UV) pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes -r requirements-ray.txt
	@touch $@

# Additional packages for `python -m tools.search` (docs/search.md), 10 megabytes.
optuna: .venv/optuna

.venv/optuna: requirements-optuna.txt .venv/ready
	$(UV) pip install --quiet --python .venv/bin/python --compile-bytecode --require-hashes -r requirements-optuna.txt
	@touch $@

check: env
	@python -m tools.check

# TASK=causal: only the stages of this task, up to its evaluation.
repro: check
	dvc repro $(if $(TASK),'evaluate@$(TASK)')

# STAGE=train@causal: only this stage and its upstream stages.
why: env
	@python -m tools.why $(if $(STAGE),'$(STAGE)')

plan: env
	@python -m tools.plan $(if $(STAGE),'$(STAGE)')

# BY=GROUP: adds one column per value of a group, `make compare BY=source`.
compare: env
	@python -m tools.compare $(if $(BY),--by '$(BY)')

report: env
	@python -m tools.report

# Two workers, one test file at a time each; waiting threads must not spin, which would occupy the other worker's core.
test: env
	OMP_WAIT_POLICY=passive python -m pytest -q -n 2 --dist loadfile

test-all: env
	python -m pytest -q -m 'slow or not slow' --timeout 3600

lint: env
	ruff check . && ruff format --check . && mypy

format: env
	ruff check --fix . && ruff format .

# All versions pinned with hashes for every platform, without the name of a registry. Renovate (renovate.json) repeats the
# command, which uv writes to the first lines of the file: use --option=value and no short options.
COMPILE = $(UV) pip compile --quiet --universal --generate-hashes --python-version=3.11
requirements: pyproject.toml
	$(COMPILE) --extra=dev --output-file=requirements.txt pyproject.toml
	for extra in keras ray optuna; do \
	  $(COMPILE) --extra=$$extra --constraint=requirements.txt --output-file=requirements-$$extra.txt pyproject.toml || exit; done

clean:
	rm -rf .venv .dvc/cache .dvc/tmp data/raw data/blocks reports metrics/baseline
	find data/tokens models -mindepth 1 -maxdepth 1 ! -name none -exec rm -rf {} +
