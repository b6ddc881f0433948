# Two commands do everything on a fresh machine with Python 3.11: make try, make test.
PYTHON ?= $(shell command -v python3.11 || echo python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: try test lint format clean

# what is installed follows pyproject.toml; the stamp is renewed when that changes
$(VENV)/.headless: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[headless]"
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.headless
	$(BIN)/pip install --quiet --editable ".[headless,test]"
	touch $@

try: $(VENV)/.headless
	$(BIN)/python -m ziplora_lib.trial try

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) try
