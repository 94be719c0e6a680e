# Every target makes the environment that it needs; only python3 (3.11 or newer) has to be there.
#
#   make quickstart                     the sweeps on the pocket model: tables, figures and reports in minutes
#   make test                           samples of every grid (a quarter of an hour on two cores)
#   make test-all                       every bar in full
#   make lint                           ruff (make fix mends what it can)
#   make test TRANSFORMERS='5.17.*'     the same with that transformers, in an environment of its own
#   make quickstart PYTHON=python3.12   with another Python
#
# pip reads its own settings: with PIP_EXTRA_INDEX_URL set to an index of CPU builds of torch, those are installed.

PYTHON       ?= python3
TRANSFORMERS ?=
WORKERS      ?= 2
CONSTRAINTS  := .constraints.txt
RUFF         := ruff>=0.17,<0.18
RESULTS      ?= results/quickstart

VENV := .venv$(if $(TRANSFORMERS),-transformers-$(subst *,x,$(TRANSFORMERS)))
LINT := .venv-lint
PIP   = $(VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check

# Two workers of one thread each are faster on small models than one of two, and the same on every machine.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(VENV)/bin/pytest -n $(WORKERS) --dist worksteal

.PHONY: quickstart test test-all lint fix clean help
.DELETE_ON_ERROR:
help:
	@sed -n 's/^#   //p' Makefile

# Turns of a small model decode in small operations, which one thread does several times as fast as two.
quickstart: $(VENV)/.installed-plot
	$(VENV)/bin/still sweep --preset quickstart --workers $(WORKERS) --output $(RESULTS)
	OMP_NUM_THREADS=1 $(VENV)/bin/still sweep --agent --preset quickstart --workers $(WORKERS) --output $(RESULTS)-agent

test: $(VENV)/.installed-dev
	$(PYTEST) -m "not full" $(ARGS)

test-all: $(VENV)/.installed-dev
	$(PYTEST) $(ARGS)

lint: $(LINT)/.installed
	$(LINT)/bin/ruff check .

fix: $(LINT)/.installed
	$(LINT)/bin/ruff check --fix .

# A stamp is newer than what it was installed from, so nothing is installed twice.
$(VENV)/.installed-%: pyproject.toml $(CONSTRAINTS) | $(VENV)/bin/python
	@echo "Installing still-kv[$*]$(if $(TRANSFORMERS), with transformers $(TRANSFORMERS)) into $(VENV) (a few minutes the first time)"
	$(PIP) --constraint $(CONSTRAINTS) --editable '.[$*]' $(if $(TRANSFORMERS),'transformers==$(TRANSFORMERS)')
	@touch $@

$(LINT)/.installed: pyproject.toml | $(LINT)/bin/python
	$(LINT)/bin/python -m pip install --quiet --quiet --disable-pip-version-check '$(RUFF)'
	@touch $@

$(sort $(VENV)/bin/python $(LINT)/bin/python):
	@$(call make-venv,$(patsubst %/bin/python,%,$@))

define make-venv
	command -v $(PYTHON) >/dev/null || { \
	  echo "$(PYTHON) is not installed; install Python 3.11 or newer, or name one: make PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) -V); still needs 3.11 or newer: make PYTHON=python3.12" >&2; exit 1; }; \
	$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo "$(PYTHON) cannot make environments: its venv or ensurepip is missing; install the package python3-venv" \
	       "(Debian, Ubuntu: sudo apt install python3-venv)" >&2; exit 1; }; \
	rm -rf $(1) && $(PYTHON) -m venv $(1)
endef

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache
