PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test test-exhaustive feature-matrix lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

install: $(STAMP) ## create .venv and install the package with everything the other targets need

# torch goes first and alone: resolved together with the rest, pip may pick another build of it
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[models,train,viz,eval,demo,dev]'
	@touch $(STAMP)

demo: $(STAMP) ## train with PPO on the embedded tiny LLaVA, evaluate, write runs/demo/report.html
	$(BIN)/python training/demo.py --output_dir runs/demo

# one process per core and one thread per process: most of the time is spent in Triton's sequential interpreter
test: lint ## lint, format check, types and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

test-exhaustive: $(STAMP) ## hours: every combination of sizes and dtypes, and the kernels broken on purpose
	$(BIN)/python -m pytest -m exhaustive -rP

feature-matrix: $(STAMP) ## run the tests of the model families and store what works for which
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile tests/models --ignore tests/models/test_check.py --write-features
	$(BIN)/python -m toprl_models.check --markdown > docs/families.md

lint: $(STAMP) ## ruff (lint and format check) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## rewrite the sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## the quick benchmark suites (about two minutes on two cores)
	$(BIN)/python bench/run.py --quick

clean: ## remove the virtual environment and the runs
	rm -rf $(VENV) runs
