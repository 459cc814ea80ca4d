"""Answers of the last stage as events: tokens, log-probabilities and hidden states of the right rows, and nothing that does not add up."""

from __future__ import annotations

import numpy as np
import pytest

from mesh.coordinator.core.events import Result
from mesh.coordinator.translate import HiddenState, event_of
from mesh.errors import FrameRejected
from mesh.protocol.frame import EMBEDDED, NOT_WANTED, Frame, Hop, Kind
from mesh.protocol.stream import Token
from mesh.types import LayerRange

STATES = np.arange(6, dtype=np.float32).reshape(2, 3)


def answer(ids: list[int], *tensors: np.ndarray) -> Frame:
    count, route = len(ids), (Hop(LayerRange(0, 2), "s"),)
    keys = np.arange(1, count + 1)
    return Frame(
        Kind.TOKENS, "0" * 16, "c", route, keys.astype(np.uint64), keys.astype(np.uint32), keys.astype(np.uint32),
        np.zeros((1, count), np.uint32), np.array(ids, np.int32), tensors=tensors,
    )  # fmt: skip


def test_states_belong_to_the_rows_that_asked_for_them() -> None:
    event = event_of(answer([EMBEDDED, 7, NOT_WANTED, EMBEDDED], STATES))
    assert isinstance(event, Result)
    first, token, nothing, second = [row.token for row in event.rows]
    assert isinstance(first, HiddenState) and isinstance(second, HiddenState)
    assert (first.values.tolist(), second.values.tolist()) == ([0, 1, 2], [3, 4, 5])
    assert token == Token(7) and nothing is None


def test_states_come_beside_log_probabilities() -> None:
    chosen, ids = np.array([np.nan, -0.5], np.float32), np.array([[0], [7]], np.int32)
    event = event_of(answer([EMBEDDED, 7], chosen, ids, chosen[:, None], STATES[:1]))
    assert isinstance(event, Result)
    assert isinstance(event.rows[0].token, HiddenState) and event.rows[1].token == Token(7, -0.5, ((7, -0.5),))


@pytest.mark.parametrize(
    ("ids", "tensors"),
    [
        ([EMBEDDED], ()),
        ([7], (STATES,)),
        ([EMBEDDED], (STATES,)),
        ([EMBEDDED], (STATES[0],)),
        ([EMBEDDED], (np.array(1, np.float32),)),
        ([EMBEDDED], (STATES[:1].astype(np.int32),)),
    ],
)
def test_what_does_not_add_up_is_rejected(ids: list[int], tensors: tuple[np.ndarray, ...]) -> None:
    with pytest.raises(FrameRejected) as refused:
        event_of(answer(ids, *tensors))
    assert refused.value.reason == "tensor"
