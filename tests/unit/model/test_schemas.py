"""500 schemas of the kinds that clients send: whatever is drawn from the tokens that a grammar allows is valid by another library.

Each schema is answered twice: by draws from all allowed tokens, and greedily by made-up logits. An answer that goes on for long is led to
its end by the shortest tokens that close it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from tiny_chat_model import byte_level

from mesh.model.grammar import Vocabulary, grammar_of
from mesh.protocol.structured import StructuredOutputs

TOKENIZER = byte_level()
END = TOKENIZER.get_vocab_size() - 1
SCHEMAS, MOST = 500, 600
CLOSING = [TOKENIZER.encode(each, add_special_tokens=False).ids[0] for each in ('"', "}", "]")]


class _Named:
    name, vocab_size = "tiny", END + 1


def text(draw: random.Random) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": draw.randint(1, 12)},
        {"type": "string", "minLength": 2, "maxLength": 5},
        {"type": "string", "pattern": draw.choice([r"^[a-z]{2,5}$", r"^\d{3}-\d{4}$", r"^(ab|cd)+$"])},
        {"type": "string", "format": draw.choice(["date", "time", "date-time", "uuid", "ipv4", "email"])},
        {"enum": draw.sample(["red", "green", "a b", 'q"uote', "x"], draw.randint(1, 4))},
        {"const": draw.choice(["fixed", 7, None, True])},
    ]
    return draw.choice(kinds)


def number(draw: random.Random) -> dict[str, Any]:
    low = draw.randint(-50, 50)
    kinds: list[dict[str, Any]] = [
        {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)},
        {"type": "integer", "exclusiveMinimum": low, "exclusiveMaximum": low + 10},
        {"type": "number", "minimum": low, "maximum": low + 1},
        {"type": "integer", "multipleOf": draw.choice([2, 5, 10])},
    ]
    return draw.choice(kinds)


def plain(draw: random.Random) -> dict[str, Any]:
    return draw.choice([text, number, lambda _: {"type": draw.choice(["boolean", "null"])}])(draw)


def array(draw: random.Random, depth: int) -> dict[str, Any]:
    least = draw.randint(0, 2)
    return {"type": "array", "items": schema(draw, depth - 1), "minItems": least, "maxItems": least + draw.randint(0, 2)}


def tuples(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"type": "array", "prefixItems": [schema(draw, depth - 1), plain(draw)], "items": False, "minItems": 2}


def record(draw: random.Random, depth: int) -> dict[str, Any]:
    names = draw.sample(["name", "age", "a-b", "list", "x y", "id"], draw.randint(1, 4))
    required = [name for name in names if draw.random() < 0.7]
    made: dict[str, Any] = {"type": "object", "properties": {name: schema(draw, depth - 1) for name in names}, "required": required}
    made["additionalProperties"] = draw.choice([False, False, {"type": "integer", "minimum": 0, "maximum": 9}])
    return made


def either(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [schema(draw, depth - 1) for _ in range(draw.randint(2, 3))]}


def joined(draw: random.Random, depth: int) -> dict[str, Any]:
    return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 3 + draw.randint(0, 99)}]}


def schema(draw: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0 or draw.random() < 0.2:
        return plain(draw)
    kinds: list[Callable[[random.Random, int], dict[str, Any]]] = [record, record, array, tuples, either, joined]
    return draw.choice(kinds)(draw, depth)


def whole(draw: random.Random) -> dict[str, Any]:
    """A schema, of which one in six refers to parts of it, and one in twelve to itself."""
    made = schema(draw, 3)
    if draw.random() < 1 / 6:
        node = {"type": "object", "properties": {"v": plain(draw)}, "required": ["v"], "additionalProperties": False}
        if draw.random() < 1 / 2:
            node["properties"]["next"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}  # type: ignore[index]
        made = {"$defs": {"node": node}, "type": "object", "properties": {"first": {"$ref": "#/$defs/node"}, "rest": made},
                "required": ["first"], "additionalProperties": False}  # fmt: skip
    return made


@pytest.mark.slow
def test_every_answer_that_ends_is_valid() -> None:
    vocabulary = Vocabulary.of(TOKENIZER.to_str(), [END], _Named())  # type: ignore[arg-type]
    draw = random.Random(0)
    ended = 0
    for _ in range(SCHEMAS):
        made = whole(draw)
        matcher = vocabulary.matcher(grammar_of(StructuredOutputs(json=made)))
        for greedy in (True, False):
            answer: list[int] = []
            while len(answer) < MOST:
                matcher.go_to(answer)
                mask = matcher.allowed()
                assert mask is not None, made
                allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[: END + 1])
                assert len(allowed), made
                closing = [token for token in (END, *CLOSING) if token in allowed] if len(answer) > MOST // 3 else []
                if closing:
                    token = closing[0]
                elif greedy:
                    token = max(allowed.tolist(), key=lambda each: hash((each, len(answer) % 7)))
                else:
                    token = int(draw.choice(allowed.tolist()))
                if token == END:
                    ended += 1
                    written = TOKENIZER.decode(answer)
                    assert jsonschema_rs.is_valid(made, json.loads(written), validate_formats=True), (made, written)
                    break
                answer.append(token)
    assert ended > 1.9 * SCHEMAS, f"{ended} of {2 * SCHEMAS} answers ended"
