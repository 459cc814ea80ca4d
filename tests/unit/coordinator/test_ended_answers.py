"""An answer that has ended is told again, from where its client is, as it was told the first time."""

from __future__ import annotations

import orjson
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mesh.coordinator.core.events import Ended
from mesh.coordinator.core.session import GenerationRequest
from mesh.coordinator.jobs import EndedAnswer
from mesh.coordinator.replies import Job
from mesh.model.manifest import TokenizerInfo
from mesh.model.tokenizer import Tokenizer
from mesh.protocol.generation import Generate
from mesh.protocol.stream import Accepted, Token, TokenDocument, parse

TEXT = "a é🤯b"


def byte_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE({character: id for id, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return Tokenizer(backend, TokenizerInfo())


@pytest.mark.parametrize("logprobs", [None, 1])
@pytest.mark.parametrize("start", [0, 4, 9])
def test_the_documents_are_those_of_the_stream(logprobs: int | None, start: int) -> None:
    tokenizer = byte_tokenizer()
    message = Generate(prompt="a", stream=True, logprobs=logprobs)
    job = Job.of(message, GenerationRequest("r", (1,), 128, None), "_INBOX.r", tokenizer)
    for id in tokenizer.encode(TEXT):
        job.push(Token(id) if logprobs is None else Token(id, -1.0, ((id, -1.0),)))
    told = [parse(document) for _, document in job.documents()]
    answer = EndedAnswer.of(job, orjson.dumps(job.finished(Ended("r", "length", 9, 0.0, 0.0, 0.0, 0))), whole=True)
    first, *again = [parse(document) for document in answer.documents(start, model="m", cancel="c")]
    assert isinstance(first, Accepted) and (first.next, first.model, first.cancel) == (start, "m", "c")
    assert again == told[start:]
    assert "".join(document.text for document in told if isinstance(document, TokenDocument)) == TEXT
