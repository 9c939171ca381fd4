# make install   a virtual environment in .venv with everything the project needs
# make compiled  the inner loops of allocator and simulator in C, found by every command from then on
# make demo      replay a synthetic workload; tables on the terminal, figures in results/demo
# make test      lint, types, tests; TRACES=DIR adds the tests that replay public traces
# make bench     time the simulator and the allocator on this machine

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TRACES ?=

.PHONY: help install compiled demo test bench

help:
	@sed -n 's/^# //p' Makefile

install: $(VENV)/.installed

$(VENV)/.installed: setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": try make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cuda12,compiled,test]'
	@touch $@

compiled: install
	$(BIN)/python -m experiments.tools.compiled

demo: install
	$(BIN)/python -m experiments.demo

test: install
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto tests $(if $(TRACES),--traces=$(TRACES))

bench: install
	$(BIN)/python -m experiments.bench.simulator
