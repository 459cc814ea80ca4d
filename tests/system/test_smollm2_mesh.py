"""The demo model, if its wheel is installed: greedy tokens through 1 and through 6 shards are those of one process."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest
from demo_model import smollm2_gguf
from running import Run

from mesh.client import AsyncMeshClient, Completion
from mesh.importer.run import import_model
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.tokenizer import Tokenizer
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

CONTEXT, ROWS, SESSIONS = 128, 4, 16
TEXT = """A mesh of layer shards answers a question in steps. Each shard keeps the keys and values of the positions it has seen, so that
a token costs it one pass over its own layers, and hands the hidden state to the next one. In 1969 the first message between two computers
was cut short after two letters; today "login" arrives whole. 3 + 4 = 7, and 12 x 12 = 144. Wer langsam geht, kommt auch ans Ziel."""


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "smollm2"
    import_model(smollm2_gguf(), out, name="smollm2")
    return out


@pytest.fixture(scope="module")
def answered(smollm2: Path) -> list[tuple[dict[str, Any], list[int]]]:
    """Requests of different lengths, and what one process answers to each alone."""
    random, pipeline = Random(1), Pipeline.load(smollm2, context=CONTEXT)
    text = Tokenizer.load(smollm2).encode(TEXT, add_special=False)
    found = []
    for _ in range(SESSIONS):
        length, most = random.randint(1, 90), random.randint(2, 12)
        at = random.randrange(len(text) - length)
        ids = pipeline.complete(text[at : at + length], SamplingParams(temperature=0.0), max_tokens=most).ids
        found.append(({"tokens": text[at : at + length], "max_tokens": most, "temperature": 0.0, "ignore_eos": True}, ids))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 6])
def test_greedy_tokens_of_the_demo_model_equal_one_process(
    smollm2: Path, answered: list[tuple[dict[str, Any], list[int]]], run: Run, shards: int
) -> None:
    """Each alone at first, then all at once: 16 sessions of different lengths take turns on 4 rows."""

    async def generate() -> tuple[list[Any], list[Any]]:
        async with AsyncMeshClient(mesh.url, model="smollm2") as client:
            requests = [request for request, _ in answered]
            return await client.batch(requests[:3], concurrency=1), await client.batch(requests, concurrency=SESSIONS)

    with LocalMesh(LocalOptions(model=smollm2, shards=shards, rows=ROWS, context=CONTEXT, http=False)) as mesh:
        alone, together = run(generate())
    for answer, (_, ids) in [*zip(alone, answered, strict=False), *zip(together, answered, strict=True)]:
        assert isinstance(answer, Completion), answer
        assert list(answer.tokens) == ids
