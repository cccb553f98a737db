# Two commands are all a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3.11
VENV ?= .venv
BIN = $(VENV)/bin
# Two cores serve two test workers; a third one makes no run shorter.
WORKERS ?= 2
# What hangs in spite of each test's own limit is broken off, and what failed is told.
LIMIT ?= 60m

.PHONY: demo test check bench lint clean

demo: $(VENV)/.ready
	$(BIN)/campus-sync demo --report-dir report

test: $(VENV)/.ready lint
	timeout --foreground --signal=INT --kill-after=60 $(LIMIT) \
		$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

check: test

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.ready
	$(BIN)/python -m pytest tests/benchmarks --benchmark-only --benchmark-columns=min,median,max,rounds
	$(BIN)/python -m tests.benchmarks.beside_native

$(VENV)/.ready: setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=compat --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
