.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.up-to-date

.PHONY: help setup demo test test-slow test-slurm bench bench-check docs lint format clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install bdistil into it (editable); skipped when up to date

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev,data,onnx,docs]'
	@touch $@

demo: setup  ## distil the recipe `digits` (CPU, minutes) and print accuracy against cost
	$(BIN)/bdistil fit --config digits --run_dir runs/digits

test: setup  ## fast tests
	$(BIN)/pytest -n 2

test-slow: setup  ## slow tests
	$(BIN)/pytest -m "slow and not slurm" --ignore=tests/bench

test-slurm: setup  ## the shipped jobs on a SLURM that is started on this machine (root; Debian)
	$(BIN)/pytest -m slurm tests/cluster

bench: setup  ## measurements, hours; ratios go to bench.json (BENCH=tests/bench/test_speed.py runs one file)
	$(BIN)/python -m pytest -q -s $(or $(BENCH),tests/bench) -m slow -p no:xdist

bench-check:  ## report which ratios of bench.json are 20 % worse than tests/bench/baseline.json
	$(BIN)/python tests/bench/compare.py bench.json tests/bench/baseline.json

docs: setup  ## the documentation, into site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: setup  ## check rules, format and types; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## mend rules and format where ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove builds and caches; .venv and runs stay
	rm -rf build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache .coverage htmlcov
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
