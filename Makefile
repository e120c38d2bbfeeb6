# Everything a fresh machine needs: python3.11, make, git and a package index.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
WORLD := examples/world/documents.jsonl examples/world/facts.jsonl examples/world/questions.jsonl

.PHONY: setup demo test lint bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	sh scripts/make-venv $(PYTHON) $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# The main job on the shipped example: every method on the same questions, and where the report is.
demo: setup
	$(BIN)/byheart ledger add runs/demo/world.db $(WORLD)
	$(BIN)/byheart compare runs/demo/world.db --base smollm2-135m --out runs/demo \
		--limit 150 --set memory.epochs=4 --set memory.packings=1 --set memory.lr=0.002 \
		--set edit.settle=0  # short, so that the whole is

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Ratios, each side by side in one run; what came out is in docs/results.md.
bench: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python benchmarks/encode.py
	$(BIN)/python benchmarks/answer.py
	$(BIN)/python benchmarks/attention.py
	$(BIN)/python benchmarks/edit.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/prefix.py
	$(BIN)/python benchmarks/ledger.py
	$(BIN)/python benchmarks/startup.py

clean:
	rm -rf $(VENV) runs build dist
