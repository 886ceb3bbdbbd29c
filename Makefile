# Each target does all its own set-up: from a fresh clone with Python and make, `make run` works.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-system test-oldest lint clean

run: .venv/run.stamp  ## The main job: text in, trained model and report out.
	$(BIN)/python examples/standard_library.py corpora/standard-library
	$(BIN)/ridgeline data prepare examples/laptop.toml
	$(BIN)/ridgeline train examples/laptop.toml
	$(BIN)/ridgeline sample runs/laptop --prompt "def "
	$(BIN)/ridgeline report runs/laptop

test: lint  ## Everything that needs no accelerator, no root and no server.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not system" -n 2 --dist loadfile --durations=8

test-system: .venv/test.stamp test-oldest  ## The long and the heavy: the main job, a browser, many kills.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m system tests/system --durations=8

test-oldest: .venv-oldest/test.stamp  ## Parity of every layout on the oldest PyTorch that is supported.
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest tests/train/test_parity_table.py

lint: .venv/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/run.stamp: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/test.stamp: .venv/run.stamp
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[test]"
	touch $@

# PyTorch 2.11 for x86 comes with CUDA's libraries: 5 GB.
.venv-oldest/test.stamp: pyproject.toml constraints.txt
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	sed 's/^torch==.*/torch==2.11.0/' constraints.txt > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --no-cache-dir --constraint .venv-oldest/constraints.txt --editable . pytest pytest-xdist hypothesis
	touch $@

clean:
	rm -rf .venv .venv-oldest runs prepared corpora .mypy_cache .ruff_cache .pytest_cache
