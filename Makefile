# Every target sets itself up from nothing: it needs Python 3.11 (or 3.12) and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test docs clean

help:
	@echo "make demo   train on real digits in both frameworks, prove that they agree, write runs/demo/report.html"
	@echo "make test   ruff, mypy, import-linter, pytest"
	@echo "make docs   build the documentation into site/, a dead link is an error"
	@echo "make clean  remove the environment, caches and runs"

# torch first and alone: whatever asks for it afterwards is content, and no CUDA libraries are fetched.
.venv/ready: requirements.lock pyproject.toml
	@echo "Setting up .venv, once: about five minutes and 3 GB ..."
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# What makes stacks faster on a CPU; where there is no C++ compiler, all works without it.
.venv/native: .venv/ready $(wildcard mhc_torch/native/*.*)
	@$(BIN)/python -m mhc_torch.native || true
	@touch $@

demo: .venv/native
	@$(BIN)/python -m demo

test: .venv/native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

docs: .venv/ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

clean:
	rm -rf .venv .cache runs site
