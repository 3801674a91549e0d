# install: the virtual environment with everything, at the pinned versions. study, test: the same, then run.
VENV := .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed

.PHONY: install study test check notebooks clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

study: install
	$(VENV)/bin/alignblind study --out study

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: check
	$(VENV)/bin/python -m pytest -n auto --dist loadfile

clean:
	rm -rf $(VENV) study build *.egg-info
