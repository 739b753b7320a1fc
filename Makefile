# Every target sets itself up from nothing: it needs Python 3.11 (or 3.12) and make.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# The lab takes 3.12 where there is one, which MaxText's kernels need.
LAB_PYTHON ?= $(shell python3.12 -c "" 2>/dev/null && echo python3.12 || echo $(PYTHON))
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-lowest docs accelerators accelerators-test clean

help:
	@echo "make demo   train on real digits in both frameworks, prove that they agree, write runs/demo/report.html"
	@echo "make test   ruff, mypy, import-linter, pytest"
	@echo "make test-lowest   the core's tests on the lowest versions that pyproject.toml allows"
	@echo "make docs   build the documentation into site/, a dead link is an error"
	@echo "make accelerators       compile for TPUs and GPUs, none of which need be here; print and record what it costs there"
	@echo "make accelerators-test  a small part of that, as tests"
	@echo "make clean  remove the environments, caches and runs"

# An environment in the folder of the target, of what the lock names.
# torch first and alone: whatever asks for it afterwards is content, and no CUDA libraries are fetched.
define environment
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --constraint $< torch==2.13.0
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@
endef

.venv/ready: requirements.lock pyproject.toml
	@echo "Setting up .venv, once: about five minutes and 3 GB ..."
	$(environment)

.venv-lowest/ready: requirements-lowest.lock pyproject.toml
	@echo "Setting up .venv-lowest, once: about three minutes and 2 GB ..."
	$(environment)

# What makes stacks faster on a CPU; all works without it. Where it cannot be built, each `make` says so, and why;
# that is an error of the tests where there is a compiler.
.venv/native: .venv/ready $(wildcard mhc_torch/native/*.*)
	@if $(BIN)/python -m mhc_torch.native; then touch $@; fi

demo: .venv/native
	@$(BIN)/python -m demo

test: .venv/native
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest --numprocesses=2 --dist=worksteal

# What needs neither a tracker nor a peer: mhc_jax, mhc_torch with Lightning, bridge, and that the two packages agree.
CORE := tests/mhc_jax tests/mhc_torch tests/bridge tests/parity
TRACKERS := tests/mhc_torch/tracking tests/mhc_torch/lightning/test_dashboard_backends.py

# Other versions warn of other things: here a warning is none of ours.
test-lowest: .venv-lowest/ready
	.venv-lowest/bin/python -m pytest -W default --numprocesses=2 --dist=worksteal $(CORE) $(TRACKERS:%=--ignore=%) -k "not Wandb"

docs: .venv/ready
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

# Compilers of machines that are not here, apart from all else: they pin jax, and fill three gigabytes.
.accelerators/ready: benchmarks/accelerators/requirements.lock
	@echo "Setting up .accelerators, once: about a minute and 3 GB ..."
	$(LAB_PYTHON) -m venv --clear .accelerators
	.accelerators/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement $<
	@touch $@

accelerators: .accelerators/ready
	@.accelerators/bin/python -m benchmarks.accelerators

accelerators-test: .venv/ready .accelerators/ready
	$(BIN)/python -m pytest --numprocesses=0 tests/benchmarks/accelerators

clean:
	rm -rf .venv .venv-lowest .accelerators .cache runs site
