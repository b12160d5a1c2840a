# Set-up needs Python 3.11 or later; everything goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint format docs pictures clean

demo: .venv/installed  ## each method on the work that it is for, on the bundled digits, then report.html
	$(BIN)/retrograde demo

test: .venv/installed-dev  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations 15  # a thread for each of the two

lint: .venv/installed-dev  ## format, lint, types, one-way imports, and the site
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(SITE) --quiet

format: .venv/installed-dev  ## fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/installed-dev  ## the documentation as a site, in site/; warnings are errors
	$(SITE)

pictures: .venv/installed-dev  ## the pictures, and the pages and tables that come from results/ and from the tests
	$(BIN)/python docs/make_pictures.py
	$(BIN)/python docs/make_gain.py
	$(BIN)/python docs/make_tables.py
	$(BIN)/python docs/make_results.py
	$(BIN)/python docs/make_performance.py
	$(BIN)/python docs/make_works_with.py

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(INSTALL) -e '.[lab,tensorboard]'
	touch $@

.venv/installed-dev: .venv/installed
	$(INSTALL) -e '.[dev]'
	touch $@

clean:
	rm -rf .venv runs report.html site
