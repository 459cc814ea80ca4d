"""The traces a coordinator keeps: right sums, the last steps, and never more than the bounds."""

from __future__ import annotations

import orjson
import pytest

from mesh.coordinator import trace as module
from mesh.coordinator.core.events import Ended, FrameOut, FrameRow
from mesh.coordinator.core.routing import Hop, Route
from mesh.coordinator.core.session import GenerationRequest, Session, SessionView
from mesh.coordinator.trace import Traces
from mesh.protocol.frame_codec import StageTiming
from mesh.protocol.generation import public_id
from mesh.types import LayerRange

ROUTE: Route = (Hop(LayerRange(0, 2), "a"), Hop(LayerRange(2, 4), "b"))
OTHER: Route = (Hop(LayerRange(0, 2), "a"), Hop(LayerRange(2, 4), "c"))
TIMINGS = (StageTiming(1000, 2000, 500), StageTiming(0, 4000, 500))  # 8 ms in the stages


def session(id: str = "s", now: float = 2.0) -> SessionView:
    return Session(GenerationRequest(id, (1, 2, 3), 1000, None), 1, submitted_at=0.0).view(now)


def frame(kind: str, route: Route = ROUTE) -> FrameOut:
    tokens = (1, 2, 3) if kind == "prefill" else (4,)
    return FrameOut(1, kind, route, (FrameRow(1, 1, (0, 0), 0, tokens),))  # type: ignore[arg-type]


def ended(id: str) -> Ended:
    return Ended(id, "length", 7, 0.1, 0.2, 1.5, 0)


def test_sums_of_stages_and_hops_make_up_the_steps() -> None:
    traces, one = Traces(), session()
    traces.begin("s", 3, 1000, now=10.0, unix_s=100.0)
    traces.step(frame("prefill"), [one.id], at=10.5, wall_s=0.02, timings=TIMINGS)
    for index in range(3):
        traces.step(frame("decode"), [one.id], at=11.0 + index, wall_s=0.010, timings=TIMINGS)
    document = traces.document("s", one)
    assert document is not None
    (leg,) = document["legs"]
    assert [stage["shard"] for stage in leg["stages"]] == ["a", "b"]
    assert leg["prefill"]["steps"] == 1 and leg["decode"]["steps"] == 3
    assert leg["decode"]["wall_s"] == pytest.approx(0.030)
    assert leg["decode"]["stages"][0] == pytest.approx({"queue_s": 0.003, "compute_s": 0.006, "codec_s": 0.0015})
    assert leg["decode"]["hops_s"] == pytest.approx(0.030 - 3 * 0.008)
    assert [(step["phase"], step["at_s"]) for step in document["steps"]] == [
        ("prefill", 0.5), ("decode", 1.0), ("decode", 2.0), ("decode", 3.0),
    ]  # fmt: skip
    assert document["state"] == "queued" and document["total_s"] == 2.0
    orjson.dumps(document)


def test_another_route_is_another_leg() -> None:
    traces, one = Traces(), session()
    traces.begin("s", 3, 1000, now=0.0, unix_s=0.0)
    traces.step(frame("decode"), [one.id], at=1.0, wall_s=0.01, timings=TIMINGS)
    traces.step(frame("prefill", OTHER), [one.id], at=2.0, wall_s=0.01, timings=TIMINGS)
    traces.end(ended("s"))
    document = traces.document("s", None)
    assert document is not None and document["state"] == "length" and document["tokens"] == 7
    assert [[stage["shard"] for stage in leg["stages"]] for leg in document["legs"]] == [["a", "b"], ["a", "c"]]
    assert [step["leg"] for step in document["steps"]] == [0, 1]


def test_nothing_grows_without_end() -> None:
    traces = Traces()
    for number in range(module.KEPT_REQUESTS + 20):
        one = session(f"s{number}")
        traces.begin(one.id, 3, 1000, now=0.0, unix_s=0.0)
        for step in range(200):
            route = ROUTE if step % 3 else OTHER
            traces.step(frame("decode" if step % 2 else "prefill", route), [one.id], at=float(step), wall_s=0.01, timings=TIMINGS)
        document = traces.document(one.id, one)
        assert document is not None and len(document["legs"]) == module.KEPT_LEGS
        assert all(0 <= step["leg"] < module.KEPT_LEGS for step in document["steps"])
        traces.end(ended(one.id))
    traces.check()
    running, recent = traces.summary([])
    assert not running and len(recent) == module.SHOWN_SESSIONS
    assert recent[0].request == public_id(f"s{module.KEPT_REQUESTS + 19}")
    assert traces.document("s0", None) is None


def test_steps_of_a_session_that_is_not_traced_change_nothing() -> None:
    traces = Traces()
    traces.step(frame("decode"), ["s"], at=1.0, wall_s=0.01, timings=TIMINGS)
    traces.end(ended("s"))
    assert traces.summary([session()]) == ((), ())
