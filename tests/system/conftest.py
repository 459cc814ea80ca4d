"""Real processes: an embedded nats-server, a coordinator, shards; a tiny model with a tokenizer of one token a character."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.runtime.device import prepare
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

T = TypeVar("T")
FIXTURES = Path(__file__).parent.parent / "fixtures" / "onnx"
DEADLINE_S = 300.0
ROWS, CONTEXT, QUEUE = 4, 64, 16
VOCABULARY = 96
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that one process compiled serve the others."""
    if "MESH_CACHE_DIR" not in os.environ:
        os.environ["MESH_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    prepare()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 3 layers with random weights; its 96 tokens are the printable characters, and one that is none."""
    folder = tmp_path_factory.mktemp("models")
    source, out = folder / "source", folder / "tiny"
    source.mkdir()
    shutil.copy(FIXTURES / "llama-dynamo.onnx", source / "model.onnx")
    characters = {chr(32 + index): index for index in range(VOCABULARY - 1)} | {"<unk>": VOCABULARY - 1}
    tokenizer = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    import_model(source, out, ImportOptions(), name="tiny")
    return out


class Oracle:
    """What one process answers."""

    def __init__(self, model: Path) -> None:
        self._pipeline = Pipeline.load(model, context=CONTEXT, chunk=256)

    def greedy(self, tokens: list[int], max_tokens: int) -> list[int]:
        return self._pipeline.complete(tokens, SamplingParams(temperature=0.0), max_tokens=max_tokens).ids

    def sampled(self, tokens: list[int], max_tokens: int, **params: Any) -> list[int]:
        return self._pipeline.complete(tokens, SamplingParams(**params), max_tokens=max_tokens).ids


@pytest.fixture(scope="session")
def oracle(model: Path) -> Oracle:
    return Oracle(model)


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda count: f"{count}-shards")
def any_mesh(request: pytest.FixtureRequest, model: Path) -> Iterator[LocalMesh]:
    """The same tests through 1, 2 and 3 shards."""
    with LocalMesh(_options(model, shards=request.param)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[LocalMesh]:
    """Two ranges."""
    with LocalMesh(_options(model, shards=2)) as running:
        yield running


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Run a coroutine to its end, within a deadline."""

    def call(work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(work, DEADLINE_S)

        return asyncio.run(bounded())

    return call


def _options(model: Path, **values: Any) -> LocalOptions:
    return LocalOptions(model=model, rows=ROWS, context=CONTEXT, coordinator_arguments=("--queue", str(QUEUE)), **values)
