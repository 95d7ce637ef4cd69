# One environment, .venv, made by whichever target is called first. PYTHON=python3.12 make ... chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup setup-locked demo test lint benchmark sbom clean

setup: .venv/ready

.venv/ready: setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

# The same, from files whose hashes are known, CUDA builds included: for CI and for sites that install from a mirror.
setup-locked:
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch .venv/ready

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

# What is installed, as a CycloneDX bill of materials. The tool has an environment of its own and does not change .venv.
sbom: setup
	$(PYTHON) -m venv .sbom
	.sbom/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	.sbom/bin/cyclonedx-py environment $(BIN)/python -o sbom.json

clean:
	rm -rf .venv .sbom sbom.json build *.egg-info
