## make quickstart   train, evaluate and sample a small Griffin, in a virtual environment made here
## make test         the tests; make slow, lint, docs: the rest of what .ci/run does

PYTHON ?= python3
WORKERS ?= 2
RUN ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
.DEFAULT_GOAL := help

.PHONY: help
help:
	@sed -n 's/^## //p' Makefile

.PHONY: quickstart
quickstart: $(VENV)/.installed
	$(BIN)/hybridlm train griffin_tiny --out $(RUN)
	$(BIN)/hybridlm eval $(RUN)
	$(BIN)/hybridlm generate $(RUN) --prompt "def "
	@echo
	@echo "Done. Everything is in $(RUN)/:"
	@echo "  config.json    the whole configuration     metrics.jsonl  one line per logged step"
	@echo "  checkpoints/   what a later run resumes     eval.jsonl     losses on held-out text"
	@echo "Next:"
	@echo "  $(BIN)/hybridlm generate $(RUN) --prompt 'import ' --temperature 0.7"
	@echo "  $(BIN)/hybridlm train griffin_tiny --out runs/wider --model.width=192"
	@echo "  $(BIN)/hybridlm list configs"

.PHONY: test slow
test: $(VENV)/.dev
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup

slow: $(VENV)/.dev
	$(BIN)/pytest -n $(WORKERS) --dist loadgroup -m slow

.PHONY: lint style types imports format
lint: style types imports

style: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(VENV)/.dev
	$(BIN)/basedpyright --pythonpath $(BIN)/python

imports: $(VENV)/.dev
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: docs
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

.PHONY: clean
clean:
	rm -rf $(VENV) build dist site

# Stamps: pip runs again only when pyproject.toml has changed.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	    sys.version_info >= (3, 11) or sys.exit(f"Python {v} is too old: 3.11 or newer, as in make PYTHON=python3.12")'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python3 -m venv failed; on Debian: apt install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing hybridlm into $(VENV)"
	@$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "Installing hybridlm[dev] into $(VENV)"
	@$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.installed

$(VENV)/.docs: pyproject.toml | $(BIN)/python
	@echo "Installing hybridlm[docs] into $(VENV)"
	@$(PIP) -e '.[docs]'
	@touch $@ $(VENV)/.installed
