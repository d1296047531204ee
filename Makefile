# Both commands start from nothing but Python 3.11+ and make.
.PHONY: demo test check clean

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin

demo: $(VENV)/.installed
	$(RUN)/python scripts/demo.py
	$(RUN)/python scripts/aligned.py

test: $(VENV)/.installed
	$(RUN)/python -m pytest

check: $(VENV)/.installed
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lightning_mimic needs Python 3.11 or newer; make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --upgrade pip
	$(RUN)/python -m pip install --editable '.[all,dev]'
	touch $@

clean:
	rm -rf $(VENV) outputs multirun build *.egg-info .mypy_cache .pytest_cache .ruff_cache
