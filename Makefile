# One environment, .venv, made by whichever target is called first. PYTHON=python3.12 make ... chooses the interpreter.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup setup-locked viewer demo test lint docs benchmark dist release-test sbom clean

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

# NiiVue for the pages of dwc report, from npm, into the package; its licence is beside it. Without it they have no viewer.
NIIVUE := 0.69.0
NIIVUE_SHA512 := YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA==
VENDOR := dwc/report/vendor

viewer: $(VENDOR)/niivue.umd.js

$(VENDOR)/niivue.umd.js:
	cd $(VENDOR) && npm pack --silent @niivue/niivue@$(NIIVUE) > /dev/null
	cd $(VENDOR) && test "$$(openssl dgst -sha512 -binary niivue-niivue-$(NIIVUE).tgz | openssl base64 -A)" = \
		"$(NIIVUE_SHA512)" || { rm -f niivue-niivue-$(NIIVUE).tgz; echo "NiiVue is not the file that was checked"; exit 1; }
	cd $(VENDOR) && tar xzf niivue-niivue-$(NIIVUE).tgz --strip-components 2 package/dist/niivue.umd.js
	rm $(VENDOR)/niivue-niivue-$(NIIVUE).tgz

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

# The documentation site, in site/. A broken link or anchor, or a page in no menu, fails.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

benchmark: setup
	$(BIN)/python -m pytest benchmarks/test_cpu_layer.py --benchmark-enable -q

# Wheel and sdist, in dist/, NiiVue included, and what PyPI would say of them.
dist: viewer
	$(PYTHON) -m venv .dist
	.dist/bin/python -m pip install --quiet --disable-pip-version-check build==1.6.1 twine==7.0.0
	rm -rf dist build
	.dist/bin/python -m build
	.dist/bin/twine check --strict dist/*

# Both installed into bare environments, with what they need from PyPI, and the demo run there: minutes.
release-test: setup dist
	$(BIN)/python -m pytest -m release

# What is installed, as a CycloneDX bill of materials. The tool has an environment of its own and does not change .venv.
sbom: setup
	$(PYTHON) -m venv .sbom
	.sbom/bin/python -m pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	.sbom/bin/cyclonedx-py environment $(BIN)/python -o sbom.json

clean:
	rm -rf .venv .dist .sbom sbom.json build dist site *.egg-info
