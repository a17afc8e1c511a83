# `make check` is what CI runs. Everything uses the environment that is active: see `make venv`.
PYTHON ?= python3
# One thread per process: on two cores two threads cost three times the CPU time. WORKERS=0 tests in this process.
WORKERS ?= 2
PYTEST = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help venv install format lint types test test-all check demo clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv:  ## a virtual environment in .venv with everything in it; then: . .venv/bin/activate
	python3 -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e '.[train,eval,dev]'

install:  ## the same into the active environment
	$(PYTHON) -m pip install -c constraints.txt -e '.[train,eval,dev]'

format:  ## rewrite imports and layout
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

lint:  ## ruff, and transformers' linter of model files, changing nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	mlinter --no-progress --no-cache transfusion

types:  ## mypy
	$(PYTHON) -m mypy

test:  ## the tests that take seconds
	$(PYTEST) -m "not slow"

test-all:  ## all tests
	$(PYTEST)

check: lint types test  ## lint, types and test: what CI runs

demo:  ## train the small model on the shipped pictures, ten minutes on two cores, into runs/demo
	$(PYTHON) scripts/train.py demo --output_dir runs/demo

clean:  ## what builds and tools leave behind
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find transfusion tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
