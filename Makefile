# Every target installs what it needs into .venv first; nothing else has to be set up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# A process per core, up to four, each of which takes the next test as soon as it has ended one. `JOBS=0`: no processes.
JOBS ?= auto
PARALLEL := --numprocesses $(JOBS) --maxprocesses 4

# What a shell has set up for another environment has no say in this one.
unexport PYTHONHOME PYTHONPATH PYTHONSTARTUP PYTHONUSERBASE VIRTUAL_ENV PIP_TARGET PIP_PREFIX PIP_USER
# Modules are compiled when they are first imported, and kept: most of torch's and transformers' never are, and to compile
# all of them would take half of the installation.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --disable-pip-version-check --no-compile --constraint constraints.txt

.PHONY: help install demo test test-long lint docs bench bench-sched bench-fidelity bench-sim bench-workers clean
.DEFAULT_GOAL := help

help:
	@echo "make demo            install, then serve shared-prefix prompts on several replicas and show what happened"
	@echo "make test            install, then run the test suite"
	@echo "make test-long       the slow rest of the test suite"
	@echo "make lint            ruff and mypy"
	@echo "make docs            these pages and the API reference as a site in docs/_build/html"
	@echo "make bench           the engine against transformers (and llama.cpp where it is installed)"
	@echo "make bench-sched     the scheduler by itself (beside Dynamo's and Ray's where PEER_PYTHON has them)"
	@echo "make bench-fidelity  the simulator against a real run of the CPU engine, on an idle machine"
	@echo "make bench-workers   worker processes against threads on the CPU, on an idle machine"
	@echo "make bench-sim       the policies against each other in simulation (GRID=quick, full or paper; TRACES=files)"

# `.installing` is there until it has succeeded once: what was interrupted before is thrown away by the next one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Preble needs Python 3.11 or newer; try: make PYTHON=python3.12"; exit 1; }
	@test ! -e $(VENV)/.installing || { echo "==> an installation was interrupted: starting it over"; rm -rf $(VENV); }
	@echo "==> creating $(VENV)"
	@mkdir -p $(VENV) && { test -e $@ || touch $(VENV)/.installing; }
	$(PYTHON) -m venv $(VENV)
	@echo "==> installing into $(VENV): one to two minutes and about 2 GB, once; to unpack it takes pip half a minute without a word"
	$(PIP) --editable '.[dev]'
	@touch $@ && rm -f $(VENV)/.installing
	@echo "==> installed"

install: $(INSTALLED)

demo: $(INSTALLED)
	@echo "==> demo"
	$(BIN)/python -m preble demo

test: $(INSTALLED)
	@echo "==> tests: under ten minutes on two cores; 'make test-long' runs the slow rest"
	$(BIN)/python -m pytest -m "not long" --hypothesis-profile=repeatable $(PARALLEL)

$(VENV)/.fuzz: $(INSTALLED)
	@echo "==> installing what fuzzing needs"
	$(PIP) --editable '.[fuzz]'
	@touch $@

test-long: $(VENV)/.fuzz
	@echo "==> the slow rest of the tests: hours"
	$(BIN)/python -m pytest -m long

lint: $(INSTALLED)
	@echo "==> ruff and mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python -m sphinx -W --keep-going -n -q docs docs/_build/html
	@echo "==> docs/_build/html/index.html"

bench: $(INSTALLED)
	$(BIN)/python -m preble bench engine --json bench-results/engine.json

bench-sched: $(INSTALLED)
	$(BIN)/python -m preble bench sched --json bench-results/sched.json $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))

bench-sim: $(INSTALLED)
	$(BIN)/python -m preble bench sim --grid $(or $(GRID),quick) $(if $(TRACES),--traces $(TRACES)) $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))

bench-fidelity: $(INSTALLED)
	$(BIN)/python -m preble bench fidelity --json bench-results/fidelity.json

bench-workers: $(INSTALLED)
	$(BIN)/python -m preble bench workers --json bench-results/workers.json

clean:
	rm -rf $(VENV) bench-results docs/_build .pytest_cache .mypy_cache .ruff_cache .hypothesis
