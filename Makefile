# One environment, .venv, made by whichever target is called first. PYTHON=python3.12 make ... chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup setup-locked demo test lint docs benchmark sbom clean

setup: .venv/ready

# By hash where the lock was tried, elsewhere by version. torch and CUDA are by version everywhere, because many machines
# take torch from PyTorch's own index or from disk, where the same version is another file; `setup-locked` pins them too.
LOCKED := CPython 3.11 Linux x86_64
HERE := $(shell $(PYTHON) -c "from platform import *; \
	print(python_implementation(), python_version()[:4], system(), machine())")
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.venv/ready: setup.py pyproject.toml constraints.txt requirements.lock
	$(PYTHON) -m venv .venv
ifeq ($(HERE),$(LOCKED))
	awk '/^[a-z]/ {keep = !/^(torch|nvidia-|cuda-)/} keep' requirements.lock > .venv/hashed.txt
	$(PIP) --require-hashes --no-deps -r .venv/hashed.txt
endif
	$(PIP) -c constraints.txt -e ".[dev]"
	touch $@

# The same, torch and CUDA by hash too, from PyPI: for CI and for sites that install from a mirror of it.
setup-locked:
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes -r requirements.lock
	$(PIP) --no-deps -e .
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

# The documentation site, in site/. A broken link or anchor, a page in no menu or a formula that cannot be read fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

benchmark: setup
	$(BIN)/python -m pytest benchmarks/test_cpu_layer.py --benchmark-enable -q

# What is installed, as a CycloneDX bill of materials. The tool has an environment of its own and does not change .venv.
sbom: setup
	$(PYTHON) -m venv .sbom
	.sbom/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	.sbom/bin/cyclonedx-py environment $(BIN)/python -o sbom.json

clean:
	rm -rf .venv .sbom sbom.json build site *.egg-info
