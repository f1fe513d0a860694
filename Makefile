# One-word tasks; each makes the environment that it needs. PYTHON selects the interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# castore itself is a path given to pip, so that its sources are used in place
INSTALL := -m pip install --disable-pip-version-check --quiet --constraint
PIP    := $(BIN)/python $(INSTALL) constraints.txt

.PHONY: help demo test test-lowest storm lint format bench clean

help:
	@echo "make demo         kill a fine-tuning run in the middle of a save, and resume it bit for bit (under four minutes)"
	@echo "make test         linters, types, layers, tests"
	@echo "make test-lowest  the tests with the oldest dependencies that are supported (downloads 3 GB)"
	@echo "make storm        the proofs at length: crashes, interleavings, processes killed for minutes (an hour or so)"
	@echo "make lint         all of that but the tests"
	@echo "make format       rewrite the sources in the one format"
	@echo "make bench        measure castore and its peers, and write bench/RESULTS.md"
	@echo "make clean        remove the environment and everything that was built or run"

demo: $(VENV)/.demo
	$(BIN)/python tools/demo.py

test: lint
	$(BIN)/python -m pytest

test-lowest: $(VENV)-lowest/.made
	$(VENV)-lowest/bin/python $(INSTALL) constraints-lowest.txt --editable '.[dev]'
	$(VENV)-lowest/bin/python -m pytest

storm: $(VENV)/.dev
	CASTORE_TEST_PROFILE=thorough $(BIN)/python -m pytest tests/proof tests/test_damage.py tests/checkpoint/test_kill.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

bench: $(VENV)/.bench
	$(BIN)/python -m bench --write-results

# ---- environments: one folder, filled as far as a task needs; stamps say what is in it

$(VENV)/.made $(VENV)-lowest/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "castore needs Python 3.11 or newer: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(@D)
	@touch $@

$(VENV)/.dev $(VENV)/.demo $(VENV)/.bench: $(VENV)/.%: $(VENV)/.made pyproject.toml constraints.txt setup.py $(wildcard castore/*/*.c)
	@echo "installing castore[$*] into $(VENV); PyTorch makes this take some minutes the first time"
	$(PIP) --editable '.[$*]'
	@touch $@

clean:
	rm -rf castore/*/*.so $(VENV) $(VENV)-lowest build dist *.egg-info runs .bench-cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
