# `make help` lists the targets. `make pipeline` and `make test` install what is missing first.

PYTHON ?= $(or $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3),python3)
TORCH := torch==2.13.0
PORT ?= 5000
PYTEST ?=

INSTALLED := .venv/.installed
SMOKE := .cache/smoke

# The project's own Prefect home and no telemetry; the first start of Prefect's server on a slow machine takes a minute.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export PREFECT_HOME ?= $(CURDIR)/.prefect
export PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS ?= 180
export PREFECT_SERVER_ANALYTICS_ENABLED ?= false
export DO_NOT_TRACK ?= 1
export MLFLOW_DISABLE_TELEMETRY ?= true
# One thread per process: two OpenMP threads on a busy two-core machine were four times slower.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE

.DEFAULT_GOAL := help
.PHONY: help pipeline test lint format smoke ui bench-cpu bench-gpu bench-trl evidence readme clean
.DELETE_ON_ERROR:

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

pipeline: $(INSTALLED)  ## Run every stage that is out of date, then print where the report is
	@python -m flows.pipeline

test: $(INSTALLED)  ## Run all tests (one file or option: make test PYTEST=tests/selection)
	@python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST)

lint: $(INSTALLED)  ## Check style and formatting
	@ruff check . && ruff format --check .

format: $(INSTALLED)  ## Mend style and formatting
	@ruff check --fix . && ruff format .

smoke: $(INSTALLED)  ## Run every stage at the smallest scale, in a scratch copy of the workspace
	@python -m flows.scratch $(SMOKE) --preset smoke
	@cd $(SMOKE) && env -u MLFLOW_TRACKING_URI python -m flows.pipeline

ui: $(INSTALLED)  ## Open the runs of this workspace in the MLflow UI (another port: make ui PORT=5001)
	@python -m flows.ui --port $(PORT)

bench-cpu: $(INSTALLED)  ## Measure the operations and the decode loop on the CPU, into metrics/bench_cpu.json
	@python -m sparsity_forcing.bench cpu

bench-gpu: $(INSTALLED)  ## The same on a GPU, with random-weight 7B and 3B models, into metrics/bench_gpu.json
	@python -m sparsity_forcing.bench gpu

bench-trl: $(INSTALLED)  ## The trainer beside TRL's on the CPU, into metrics/bench_trl.json
	@python -m sparsity_forcing.bench trl

evidence: $(INSTALLED)  ## After `make pipeline`: train controls and ablations from its base, into docs/evidence.md and README.md (hours)
	@python -m sparsity_forcing.evidence

readme: $(INSTALLED)  ## Write the results of the last run into README.md
	@python -m sparsity_forcing.reporting.readme

clean:  ## Remove caches and scratch workspaces (data, models, runs and .venv stay)
	rm -rf .cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# torch by its exact version first, so that a machine that offers a CPU build of it gets that one. Python compiles what is
# imported when it is imported: pip would take minutes to compile all of it.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11"; exit 1; }
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@echo "Installing the pinned environment into .venv (minutes, once)"
	@.venv/bin/python -m pip install --quiet --no-compile $(TORCH)
	@.venv/bin/python -m pip install --quiet --no-compile -c constraints.txt -e '.[pipeline,dev]'
	@touch $@
