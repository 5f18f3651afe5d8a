# Every target makes .venv when it is missing or when pyproject.toml or constraints.txt changed.
# A machine without a GPU saves 2 GB with: make demo PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-versions safety-table lint bench bench-gpu clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

demo: $(STAMP)  ## ask the built-in vision-language model about a picture, compiled, and compare with eager
	@echo "Compiling the built-in model's decoder, asking it about a picture, and comparing with eager (about a minute)."
	@rm -rf graph_dumps
	$(BIN)/compile-policy generate --verify --dump-graphs graph_dumps

test: lint  ## lint, then every test that is neither slow nor for a GPU
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test-all: lint  ## lint, then every test that does not need a GPU
	$(BIN)/python -m pytest -q -m "not gpu"

test-versions: $(STAMP)  ## run the contract on each supported pair of versions and write docs/versions.md (hours, many GB)
	PYTHONPATH=tests $(BIN)/python -m versions --write

safety-table: $(STAMP)  ## run the hazard matrix and write its table into docs/safety.md (half an hour)
	PYTHONPATH=tests $(BIN)/python -m hazards --write

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)  ## the benchmarks, on the CPU
	@set -e; for f in benchmarks/bench_*.py benchmarks/call_overhead.py; do [ -e "$$f" ] || continue; echo "== $$f"; $(BIN)/python "$$f"; done

bench-gpu: $(STAMP)  ## the benchmarks, on the GPU
	$(BIN)/python benchmarks/bench_decode.py --device cuda
	$(BIN)/python benchmarks/bench_decode.py --device cuda --layers 16 --hidden 1024
	$(BIN)/python benchmarks/bench_fresh.py --device cuda

clean:  ## remove everything that these targets made
	rm -rf .venv .venvs graph_dumps build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find compile_policy backends tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
