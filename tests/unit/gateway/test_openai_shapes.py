"""Log-probabilities and usage in OpenAI's documents: parts of characters, control tokens, tokens that are not among the likeliest."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from mesh.client import Chunk, Completion
from mesh.client.openai_shapes import ChatShape, TextShape
from mesh.coordinator.core.session import GenerationRequest
from mesh.coordinator.replies import Job
from mesh.model.manifest import TokenizerInfo
from mesh.model.tokenizer import Tokenizer
from mesh.protocol.generation import Generate
from mesh.protocol.stream import Answer, Timing, Token, TokenDocument, Usage, parse

TEXT = "a é🤯b语\n"
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A token for each byte, and one end token."""
    backend = tokenizers.Tokenizer(models.BPE({character: id for id, character in enumerate(ALPHABET)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    return Tokenizer(backend, TokenizerInfo(eos_ids=(256,)))


def documents(tokenizer: Tokenizer, drawn: list[Token]) -> list[Token]:
    """The tokens as a client has them: made by a coordinator, sent, and read again."""
    message = Generate(prompt="a", stream=True, logprobs=2, ignore_eos=True)
    job = Job.of(message, GenerationRequest("r", (1,), 128, None), "_INBOX.r", tokenizer)
    found = []
    for token in drawn:
        data, _ = job.push(token)
        assert data is not None
        document = parse(data)
        assert isinstance(document, TokenDocument)
        found.append(document.token)
    return found


def completion(tokens: list[Token], text: str, prompt: int = 1) -> Completion:
    timing = Timing(0, 0, None, 0, 0, None, 0)
    usage = Usage(prompt, len(tokens))
    return Completion.of(Answer("r", tuple(token.id for token in tokens), text, "length", usage, timing, logprobs=tuple(tokens)))


def whole(kind: Any, tokens: list[Token], text: str) -> Any:
    return kind("m", 0, choices=1, usage_is_null=False).whole([completion(tokens, text)])["choices"][0]["logprobs"]


@pytest.fixture
def tokens(tokenizer: Tokenizer) -> list[Token]:
    ids = tokenizer.encode(TEXT)
    assert len(ids) == len(TEXT.encode())
    return documents(tokenizer, [Token(id, -1.0, ((id, -1.0), (256, -2.0))) for id in [*ids[:3], 256, *ids[3:]]])


def test_bytes_of_tokens_joined_are_the_text(tokens: list[Token]) -> None:
    content = whole(ChatShape, tokens, TEXT)["content"]
    assert b"".join(bytes(entry["bytes"] or ()) for entry in content).decode() == TEXT
    assert content[3]["token"] == "<end>" and content[3]["bytes"] is None
    for entry in content:
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"] and entry["top_logprobs"][1]["bytes"] is None


def test_offsets_are_places_in_the_text(tokens: list[Token]) -> None:
    logprobs = whole(TextShape, tokens, TEXT)
    expected = [0, 1, 2, 2, 2, *[3] * 4, 4, *[5] * 3, 6]  # the end token, the fourth, adds nothing
    assert logprobs["text_offset"] == expected
    shape = TextShape("m", 0, choices=1, usage_is_null=False)
    parts = [shape.part(0, Chunk("", token, index, 0.0), None)[0]["choices"][0]["logprobs"] for index, token in enumerate(tokens)]
    assert [offset for part in parts for offset in part["text_offset"]] == expected
    assert [name for part in parts for name in part["tokens"]] == logprobs["tokens"]


def test_part_of_a_character_has_a_name_of_its_own(tokens: list[Token]) -> None:
    names = whole(TextShape, tokens, TEXT)["tokens"]
    assert names[2] == "bytes:\\xc3" and names[4] == "bytes:\\xa9" and names[:2] == ["a", " "]


def test_the_drawn_token_is_among_the_likeliest_of_a_completion(tokenizer: Tokenizer) -> None:
    a, b, c = tokenizer.encode("abc")
    likely = ((a, -0.1), (b, -3.0))
    tokens = documents(tokenizer, [Token(c, -9.0, likely), Token(a, -0.1, likely), Token(c, -9.0, ())])
    assert whole(TextShape, tokens, "cac")["top_logprobs"] == [{"a": -0.1, "b": -3.0, "c": -9.0}, {"a": -0.1, "b": -3.0}, {"c": -9.0}]
    assert [len(entry["top_logprobs"]) for entry in whole(ChatShape, tokens, "cac")["content"]] == [2, 2, 0]


def test_without_a_tokenizer_a_token_is_its_number() -> None:
    logprobs = whole(TextShape, [Token(5, -1.0, ((5, -1.0), (7, -2.0)))], "")
    assert logprobs == {"tokens": ["<5>"], "token_logprobs": [-1.0], "top_logprobs": [{"<5>": -1.0, "<7>": -2.0}], "text_offset": [0]}


@pytest.mark.parametrize("kind", [ChatShape, TextShape])
def test_a_prompt_counts_once_for_all_its_choices(kind: Any) -> None:
    shape = kind("m", 0, choices=3, usage_is_null=True)
    two_prompts = [completion([Token(1, 0.0)] * 4, "", prompt) for prompt in (20, 20, 20, 7, 7, 7)]
    expected = {"prompt_tokens": 27, "completion_tokens": 24, "total_tokens": 51, "prompt_tokens_details": {"cached_tokens": 0}}
    (last,) = shape.end(two_prompts)
    assert shape.whole(two_prompts)["usage"] == last["usage"] == expected
    assert kind("m", 0, choices=3, usage_is_null=False).end(two_prompts) == []


def test_the_pieces_of_a_sentencepiece_vocabulary() -> None:
    """Bytes as <0xE2>; the first token of a text loses its space, the others do not."""
    vocab: Any = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -20.0) for byte in range(256)), ("▁a", -1.0), ("b", -1.0), ("\ufffd", -1.0)]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, 0, True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer = Tokenizer(backend, TokenizerInfo())
    piece = tokenizer.piece
    assert piece(1 + 0xC3) == ("\ufffd", b"\xc3") and piece(257) == (" a", None)
    assert piece(259).text == "\ufffd" and piece(259).raw is None
