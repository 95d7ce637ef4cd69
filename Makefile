# One environment, .venv, made by whichever target is called first. PYTHON=python3.12 make ... chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test lint benchmark clean

setup: .venv/ready

.venv/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The whole cycle on simulated sites, into ./demo; called again, it goes on where it stopped.
demo: setup
	$(BIN)/dwc demo --out demo

# A test per core, one thread each: several multi-threaded tests on one core only wait for each other.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

benchmark: setup
	$(BIN)/python -m pytest benchmarks/test_cpu_layer.py --benchmark-enable -q

clean:
	rm -rf .venv build *.egg-info
