"""Control messages and the names they travel under."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh import errors
from mesh.errors import BadRequest, MeshError, MessageRejected
from mesh.protocol import subjects, topics
from mesh.protocol.control import Close, Open
from mesh.protocol.failures import ErrorReply
from mesh.protocol.frame import Frame
from mesh.protocol.generation import Generate
from mesh.protocol.message import Message
from mesh.protocol.sampling import SamplingParams
from mesh.protocol.status import ShardLease
from mesh.protocol.topics import TOPICS
from mesh.types import LayerRange


def test_a_message_is_read_back() -> None:
    message = Open(session=7, epoch=1, coordinator="c-1", model_hash="0" * 16, prompt_length=12, sampling=SamplingParams(temperature=0.5))
    assert Open.parse(message.to_bytes()) == message


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (b"", ""),
        (b"[]", ""),
        (b'{"prompt": 1}', "prompt"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens"),
        (b'{"prompt": "a", "max_tokens": "8"}', "max_tokens"),
        (b'{"prompt": "a", "temprature": 1}', "temprature"),
        (b'{"messages": [{"role": "robot", "content": ""}]}', "messages.0.role"),
        (b'{"tokens": [1, -1]}', "tokens.1"),
        (b'{"prompt": "a", "temperature": NaN}', "temperature"),
    ],
)
def test_a_malformed_request_names_the_field(data: bytes, field: str) -> None:
    with pytest.raises(MessageRejected) as caught:
        Generate.parse(data)
    assert caught.value.field == field


@pytest.mark.parametrize("data", [b"{}", b'{"prompt": "a", "tokens": [1]}'])
def test_a_request_has_exactly_one_input(data: bytes) -> None:
    with pytest.raises(MessageRejected, match="exactly one of prompt, messages and tokens"):
        Generate.parse(data)


@given(st.binary(max_size=200))
def test_random_bytes_are_rejected(data: bytes) -> None:
    for message in (Open, Close, ShardLease):
        with pytest.raises(MessageRejected):
            message.parse(data)


def test_a_message_beyond_its_limit_is_not_read() -> None:
    with pytest.raises(MessageRejected, match="at most"):
        Open.parse(b" " * (Open.limit_bytes + 1))


def test_every_service_error_is_made_again_from_its_reply() -> None:
    made: list[MeshError] = [
        errors.Busy("b", retry_after_s=1.5),
        errors.Unavailable("u"),
        errors.DeadlineExceeded("d"),
        errors.Cancelled("c"),
        errors.Denied("n"),
        BadRequest("r", field="top_p"),
        errors.PromptTooLong("p", tokens=9, limit=8),
        MessageRejected("m", field="x"),
    ]
    for error in made:
        again = ErrorReply.parse(ErrorReply.of(error).to_bytes()).error()
        assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
        assert 400 <= ErrorReply.of(error).status < 600


def test_a_subject_has_one_message_type() -> None:
    patterns = [topic.template for topic in TOPICS]
    assert len(set(patterns)) == len(patterns)
    assert all(pattern.startswith(f"mesh.{subjects.VERSION}.") for pattern in patterns)
    assert all(issubclass(t.request, Message | Frame) for t in TOPICS)


def test_subjects_match_their_patterns() -> None:
    held = LayerRange(4, 8)
    assert topics.OPEN_ANY.at("m", held).subject == "mesh.v1.m.layers.4-8"
    assert subjects.frames("SmolLM2-1.7B", held, "s-1") == "mesh.v1.SmolLM2-1_7B.layers.4-8.s-1"
    assert topics.DRAIN.at("s").subject == "mesh.v1.control.s.drain"
    assert topics.EVENTS.any().subject == "mesh.v1.events.>" and topics.BATCH_ITEM.any("a.b").subject == "mesh.v1.batches.a_b.>"
    assert topics.FRAMES.at("a.b", held, "s").subject == subjects.frames("a.b", held, "s")
    assert topics.TOKENS.at("a.b", "c").subject == subjects.tokens("a.b", "c")


def test_a_subject_from_the_wire_is_one_of_its_topic() -> None:
    assert topics.CANCEL.read("mesh.v1.m.cancel.c").topic is topics.CANCEL
    for subject in ("mesh.v1.m.cancel", "mesh.v1.m.cancel.*", "mesh.v1.m.trace.c", "mesh.v1.m.cancel.c.d", ""):
        with pytest.raises(MessageRejected):
            topics.CANCEL.read(subject)


@pytest.mark.parametrize("name", ["", "a.b", "a>", "*", "a b", "x" * 65, "a\r\nPUB"])
def test_a_name_cannot_reach_into_another_subject(name: str) -> None:
    with pytest.raises(BadRequest):
        subjects.frames("m", LayerRange(0, 1), name)
    with pytest.raises(BadRequest):
        topics.DRAIN.at(name)


def test_leases_of_the_wire_are_plain_json() -> None:
    lease = ShardLease(
        shard="s",
        instance="i",
        model="m",
        model_hash="0" * 16,
        layers_start=0,
        layers_end=4,
        total_layers=8,
        state="ready",
        rows=4,
        free_rows=4,
        context=64,
        chunk=16,
        hidden_size=8,
        hidden_itemsize=4,
        max_frame_bytes=10**6,
        queue_limit=8,
        frame_version=1,
    )
    assert orjson.loads(lease.to_bytes())["layers_end"] == 4
    assert ShardLease.parse(lease.to_bytes()) == lease
    assert lease.first and not lease.last
    for start, stop in ((4, 4), (5, 4), (0, 9)):
        with pytest.raises(MessageRejected, match="no range"):
            ShardLease.parse(lease.model_copy(update={"layers_start": start, "layers_end": stop}).to_bytes())
