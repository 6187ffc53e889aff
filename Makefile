# `make demo`, `make check` and `make test` work on a fresh machine with Python 3.11+ and nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: demo check test test-slurm test-ray torture style lint bench bench-gpu notebooks clean

demo: $(VENV)/.installed
	$(BIN)/backfire run tour

# After every change: takes less than a minute.
check: style
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# Before a merge: all tests.
test: style
	$(BIN)/python -m pytest -n 2 --dist loadfile

# They start a Slurm, or a Ray cluster, and stop it; without the packages they skip.
test-slurm: $(VENV)/.installed-dev
	-$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[slurm]"
	BACKFIRE_TEST=slurm $(BIN)/python -m pytest -s -rs tests/slurm

test-ray: $(VENV)/.installed-dev
	-$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[ray]"
	BACKFIRE_TEST=ray $(BIN)/python -m pytest -s -rs tests/ray

style: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/mypy

# Two idle cores, about 15 minutes; with TRL (pip install trl) it is a third side.
bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.matrix

# Needs a GPU with 80 GB or more. No more than 8 minutes are meant; the two matrices have never run.
GPU_MATRIX = -m benchmarks.matrix --device cuda --compute bfloat16 --row-counts --repetitions 1
bench-gpu: $(VENV)/.installed
	$(BIN)/python $(GPU_MATRIX) --shape 0.5b --cells 32 --name gpu-matrix-0.5b
	$(BIN)/python $(GPU_MATRIX) --shape 7b --cells 16 --name gpu-matrix-7b
	$(BIN)/python -m benchmarks.gpu --shape 135m --methods lora qlora --compare
	$(BIN)/python -m benchmarks.gpu --shape 7b --methods lora qlora --compare

# Every row of docs/reliability.md at its full count.
torture: $(VENV)/.installed-dev
	$(BIN)/python -m tests.torture

notebooks: $(VENV)/.installed-workshop
	$(BIN)/jupytext --quiet --to ipynb examples/*.py

# torch comes first: otherwise pip may download several GB of GPU packages.
$(VENV)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)/.installed-workshop: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[workshop]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
