# Everything a developer types. VENV and PYTHON may be given: make test VENV=/elsewhere PYTHON=python3.12
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.installed

# Two processes of one thread each: small tensors gain nothing from more threads, and the tests are then reproducible.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest

MODEL ?= builtin
CALIB ?= builtin
TEXT ?= builtin

.PHONY: help install demo test lint types rules sizes format bench versus interop clean

help:
	@echo "make demo    quantize the bundled model, reload it, compare it with the original"
	@echo "make test    the tests                     make rules   only the house rules"
	@echo "make lint    ruff                          make types   pyright"
	@echo "make sizes   files and functions that have grown long"
	@echo "make bench   the figures of docs/benchmarks.md; MODEL=, CALIB=, TEXT= and ONLY= (tables, by commas) choose what"
	@echo "make versus  the same model quantized by other programs and by us; makes an environment for each"
	@echo "make interop read every format with the programs it is for (docs/interop.md); makes an environment for each"
	@echo "make format  let ruff rewrite              make clean   remove what the others made"

$(INSTALLED): pyproject.toml constraints.txt src/bitlathe/numerics/columns.c
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	rm -f src/bitlathe/numerics/_columns*.so
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/bitlathe demo

test: $(INSTALLED)
	$(PYTEST) -n $(WORKERS)

rules: $(INSTALLED)
	$(PYTEST) tests/test_rules.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(INSTALLED)
	$(BIN)/pyright --pythonpath $(BIN)/python

sizes: $(INSTALLED)
	$(BIN)/python tests/sizes.py

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks --model $(MODEL) --calib $(CALIB) --text $(TEXT) $(if $(ONLY),--only $(ONLY))

versus: $(INSTALLED)
	$(BIN)/python -m benchmarks.versus --model $(MODEL) --calib $(CALIB) --text $(TEXT)

interop: $(INSTALLED)
	$(BIN)/python -m interop

clean:
	rm -rf $(VENV) .ci-venv .interop .versus build dist demo-out bench-out .pytest_cache .ruff_cache .hypothesis src/*.egg-info
	rm -f src/bitlathe/numerics/*.so
	find src tests interop -name __pycache__ -type d -prune -exec rm -rf {} +
