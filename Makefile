# make demo   the whole method on the digits, from training to pictures: a few minutes on a laptop
# make test   the tests
# Both make .venv with the pinned packages first; Python 3.10 to 3.13 and make are all they need.

PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/installed

.PHONY: demo test lint clean

demo: $(INSTALLED)
	$(VENV)/bin/python benchmarks/demo.py

test: $(INSTALLED)
	$(VENV)/bin/python -m pytest

lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

$(INSTALLED): requirements.txt requirements-test.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-test.txt
	touch $(INSTALLED)

clean:
	rm -rf $(VENV) logs/demo
