# Every target does its own set-up: a virtual environment in .venv with the tested versions of constraints.txt.
#
#   make demo               train, distil and judge a small model, within 15 minutes (MINUTES=5 for less)
#   make test               the tests
#   make lint               style and types
#   make clean              remove the environment and everything made by tools (never runs/)
#
# PYTHON chooses the interpreter, PIP_ARGS passes options to pip, PYTEST_ARGS to pytest.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=
MINUTES ?= 13

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test lint clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

demo: $(STAMP)
	$(BIN)/flowlm demo --minutes $(MINUTES)

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "flowlm needs Python 3.11 or later: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e ".[dev]"
	@touch $@
