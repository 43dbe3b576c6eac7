# make run: set up and start; make test: set up and check.
PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
# the exact torch keeps the accelerator builds of several GB away where a CPU wheel can be found
TORCH := torch==2.13.0 torchvision==0.28.0

.DEFAULT_GOAL := help
.PHONY: help run test lint types lock clean

help:  ## list these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(BIN)/cliphar: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[app]'
	@touch $@

$(VENV)/.dev: $(BIN)/cliphar
	$(BIN)/pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

run: $(BIN)/cliphar  ## start the API and the web page on this machine
	$(BIN)/cliphar up

test: $(VENV)/.dev lint types  ## lint, types and tests
	$(BIN)/pytest

lint: $(VENV)/.dev  ## check the style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev  ## check types with mypy --strict
	$(BIN)/mypy

lock: $(VENV)/.dev  ## update constraints.txt from what is installed
	$(BIN)/pip freeze --exclude-editable | sed -E 's/\+cpu$$//' | grep -v ' @ ' > constraints.txt

clean:  ## remove what make created
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache
