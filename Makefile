# Each target does all its set-up in .venv; `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo compare test bench lint demo-model

# torch comes first and alone: named with its exact version, pip keeps the build that is already at hand.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch==2.13.0 --editable ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/densegrpo demo

# The plan says how long. Stopped and repeated, it goes on with the missing runs; see runs/compare/comparison.html.
compare: .venv/installed
	$(BIN)/densegrpo compare engine/demo/compare.json

test: .venv/installed lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -q

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: .venv/installed
	$(BIN)/python -m densegrpo.engine.bench

# About an hour on one core; writes the files of the shipped demo model.
demo-model: .venv/installed
	$(BIN)/python -m densegrpo.engine.demo.pretrain engine/demo --minutes 62
