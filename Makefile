# Two commands on a fresh machine: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
# The CPU build by this exact version where an index offers several; set TORCH=torch for the newest CUDA build.
TORCH ?= torch==2.13.0
ENGINE_VENV ?= .venv-engine
BIN := $(VENV)/bin
# Some machines ask Python to keep no bytecode: every process that a test starts would compile the package again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test lint docs unit engine release clean

demo: $(VENV)/.ready
	$(BIN)/python tests/demo.py

test: lint docs unit engine

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site in site/; strict, so that a broken link or anchor fails. The variable silences an advertisement of mkdocs-material.
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --clean

unit: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not engine"

# The real vLLM on the CPU, in its own environment: it pins other versions than ours.
engine: $(VENV)/.ready $(ENGINE_VENV)/.ready
	M3QUANT_ENGINE_PYTHON=$(abspath $(ENGINE_VENV))/bin/python $(BIN)/python -m pytest -n 2 --dist loadgroup -m engine

# Wheel and sdist of the last commit in dist/, checked, and the wheel tried in a new environment. Publishes nothing.
release:
	PYTHON=$(PYTHON) scripts/release.sh

# pip builds nothing here and asks only for versions that pyproject.toml names.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

$(ENGINE_VENV)/.ready: tests/support/engine/make_env.sh
	tests/support/engine/make_env.sh $(ENGINE_VENV) $(PYTHON)
	touch $@

clean:
	rm -rf $(VENV) $(ENGINE_VENV) demo site dist build *.egg-info
