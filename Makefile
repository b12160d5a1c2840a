# Set-up needs Python 3.11 or later; everything goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format pictures clean

demo: .venv/installed  ## plain backpropagation and every method on the bundled digits, then report.html
	$(BIN)/retrograde demo

test: .venv/installed-dev  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 15  # a thread for each of the two

lint: .venv/installed-dev  ## format, lint, types, one-way imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: .venv/installed-dev  ## mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

pictures: .venv/installed-dev  ## the README's pictures and tables, from a real run
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python docs/make_tables.py
	$(BIN)/python docs/make_results.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[lab,tensorboard]'
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs report.html
