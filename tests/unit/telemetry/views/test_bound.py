"""The sentence says which part took the most, by how much and where."""

from __future__ import annotations

from typing import Any

import example_trace
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.protocol.spans import Span
from mesh.telemetry.views.bound import Bound, bound


def test_the_example_is_bound_by_compute_and_its_largest_shard_is_named() -> None:
    found = bound(example_trace.document(), example_trace.spans())
    assert found.phase == "compute"
    assert found.sentence() == (
        "Bound by compute: 61 % of 516 ms, of it 33 % in shard-2 (layers 10-20); failover 19 %, network 7 %, waiting 6 %, "
        "coordinator 3 %, frames 3 %, opening rows 1 %."
    )
    assert sum(found.parts.values()) == pytest.approx(found.total_s)


def test_without_sums_the_spans_say_the_same() -> None:
    document = example_trace.document()
    exact, counted = bound(document, example_trace.spans()), bound({**document, "legs": []}, example_trace.spans())
    for phase in ("compute", "network", "queue", "codec", "open", "failover"):
        assert counted.parts[phase] == pytest.approx(exact.parts[phase], abs=1e-9), phase
    assert "of it 33 % in shard-2 (layers 10-20)" in counted.sentence()
    assert "server" not in counted.parts, "it lies within the network's time"


def test_aggregated_steps_count_with_their_sums() -> None:
    sums = {"mesh.steps": 100, "mesh.compute_s": 0.6, "mesh.network_s": 0.2, "mesh.wait_s": 0.1, "mesh.codec_s": 0.05}
    span = Span(trace="1" * 32, span="1" * 16, name="decode steps", service="coordinator", start_ns=0, end_ns=10**9, attributes=dict(sums))
    assert bound({}, [span]).sentence() == "Bound by compute: 60 % of 1 s; network 20 %, waiting 10 %, frames 5 %."


@pytest.mark.parametrize(
    ("parts", "places", "sentence"),
    [
        ({"queue": 3.0, "compute": 1.0}, {("queue", "for a row"): 2.7, ("queue", "shard-1"): 0.3},
         "Bound by waiting: 75 % of 4 s, of it 90 % for a row; compute 25 %."),
        ({"queue": 3.0, "compute": 1.0}, {("queue", "for a row"): 0.3, ("queue", "shard-1"): 2.7},
         "Bound by waiting: 75 % of 4 s, of it 90 % in shard-1 (layers 0-4); compute 25 %."),
        ({"network": 3.0, "compute": 1.0}, {("network", "shard-1 to shard-2"): 2.0, ("network", "c1 to shard-1"): 1.0},
         "Bound by network: 75 % of 4 s, of it 67 % from shard-1 to shard-2; compute 25 %."),
        ({"coordinator": 4.0}, {}, "Bound by the coordinator: 100 % of 4 s."),
        ({"failover": 2.4, "codec": 1.6}, {}, "Bound by failover: 60 % of 4 s; frames 40 %."),
        ({}, {}, "Nothing has been measured yet."),
    ],
)  # fmt: skip
def test_each_kind_has_its_words(parts: dict[str, float], places: dict[tuple[str, str], float], sentence: str) -> None:
    assert Bound(4.0, parts, places, {"shard-1": "0-4"}).sentence() == sentence


def leg(prefill_s: float, decode_s: float, stages: int) -> dict[str, Any]:
    def sums(wall_s: float) -> dict[str, Any]:
        each = wall_s / (stages * 4)
        return {
            "steps": 3 if wall_s else 0,
            "wall_s": wall_s,
            "stages": [{"queue_s": each, "compute_s": each, "codec_s": each} for _ in range(stages)] if wall_s else [],
            "hops_s": wall_s / 4,
        }

    names = [{"shard": f"shard-{at}", "layers": f"{at}-{at + 1}"} for at in range(stages)]
    return {"at_s": 0.0, "stages": names, "prefill": sums(prefill_s), "decode": sums(decode_s)}


seconds = st.floats(0, 100)


@given(seconds, seconds, seconds, st.lists(st.tuples(seconds, seconds, st.integers(1, 4)), max_size=3), st.booleans())
def test_the_parts_never_exceed_the_request(
    queued: float, first: float, rest: float, legs: list[tuple[float, float, int]], no: bool
) -> None:
    """Also where chunks of a prompt pass through the stages at once, so that their steps together last longer than they take."""
    document = {
        "queue_s": queued,
        "first_token_s": None if no else queued + first,
        "total_s": queued + first + rest,
        "legs": [leg(*each) for each in legs],
    }
    found = bound(document)
    assert sum(found.parts.values()) <= found.total_s * (1 + 1e-9) + 1e-9
    assert all(part >= 0 for part in found.parts.values())
    found.sentence()
