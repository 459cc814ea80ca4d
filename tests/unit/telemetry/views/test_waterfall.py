"""A waterfall as text. waterfall.txt beside this file is what the example looks like; after a change that is meant, write it anew:
`python tests/unit/telemetry/views/test_waterfall.py`."""

from __future__ import annotations

from pathlib import Path

import example_trace
import pytest

from mesh.protocol.spans import Span
from mesh.telemetry.views.skew import aligned
from mesh.telemetry.views.waterfall import clocks, draw, headline, rows

GOLDEN = Path(__file__).with_name("waterfall.txt")
WIDTH = 100
SPANS = example_trace.spans()


def text(spans: list[Span], *, width: int = WIDTH, fold: bool = True) -> str:
    return "".join(f"{line.plain}\n" for line in draw(rows(spans, fold=fold), width=width))


def test_the_example_looks_as_it_should() -> None:
    assert text(SPANS) == GOLDEN.read_text()


def test_of_a_series_the_first_is_whole_and_the_rest_is_a_row() -> None:
    folded, whole = rows(SPANS), rows(SPANS, fold=False)
    assert len(whole) == len(SPANS)
    assert [row.words for row in folded if row.words.startswith("decode step")] == [
        "decode step 0, 2 rows",
        "decode step × 2, median 22 ms",
        "decode step 3, 2 rows",
        "decode step × 2, median 22 ms",
    ], "a failover begins a new series, and what the coordinator does between two steps does not"
    assert [row.words for row in folded if row.words.startswith("turn")] == ["turn × 6, median 1.5 ms"]
    assert [row.words for row in folded if row.words.startswith("open row ")] == [
        f"open row {shard} {layers}" for shard, layers in (*example_trace.BEFORE, example_trace.AFTER[1])
    ], "shards are not folded into each other"


def test_a_step_that_took_longer_than_the_others_is_mentioned_and_one_that_failed_is_shown() -> None:
    steps = [
        Span(trace="1" * 32, span=f"{at + 1:016x}", name="decode step", service="coordinator", start_ns=at * 100, end_ns=at * 100 + length)
        for at, length in enumerate([10, 10, 10, 90, 10])
    ]
    assert [row.words for row in rows(steps)] == ["decode step × 5, median 0.01 µs, slowest 0.09 µs"]
    steps[2] = steps[2].model_copy(update={"error": "the shard is gone"})
    found = rows(steps)
    assert [(row.words, row.error) for row in found[:2]] == [
        ("decode step × 4, median 0.01 µs, slowest 0.09 µs", ""),
        ("decode step", steps[2].error),
    ]
    assert "the shard is gone" in "".join(line.plain for line in draw(found, width=80))


def test_spans_of_several_steps_count_as_so_many() -> None:
    spans = [
        Span(
            trace="1" * 32,
            span=f"{at:016x}",
            name="decode steps",
            service="coordinator",
            start_ns=at * 10**9,
            end_ns=(at + 1) * 10**9,
            attributes={"mesh.steps": 100},
        )
        for at in range(1, 4)
    ]
    assert [row.words for row in rows(spans)] == ["decode steps × 300, median 10 ms"]


@pytest.mark.parametrize("width", [40, 60, 72, 100, 200])
def test_no_line_is_wider_than_the_terminal_and_bars_stay_on_their_scale(width: int) -> None:
    for line in text(SPANS, width=width, fold=False).splitlines():
        assert len(line) <= width, line
    assert ("█" in text(SPANS, width=width)) == (width >= 72)


def test_bars_have_the_colour_of_their_phase() -> None:
    found = rows(SPANS)
    lines = draw(found, width=WIDTH)
    for row, line in zip(found, lines, strict=True):
        if row.phase:
            assert str(line.spans[-1 if not row.own else -2].style) != "", row.words
    assert {str(span.style) for line in lines for span in line.spans} >= {"blue", "magenta", "yellow", "cyan", "red"}


def test_what_still_runs_and_what_is_estimated_is_marked() -> None:
    span = Span(trace="1" * 32, span="1" * 16, name="decode step", service="coordinator", start_ns=0, end_ns=10**9)
    marked = span.model_copy(update={"attributes": {"mesh.unfinished": True, "mesh.estimated": True}})
    assert "1 s…" in text([marked]) and "~0 s" in text([marked])
    assert text([]) == ""


def test_clocks_that_were_corrected_are_named() -> None:
    spans = example_trace.spans(skew_ns={"shard-2": 2 * 10**9})
    found = aligned(spans)
    assert clocks(found.spans, found) == ["The clock of shard-2 is about 2 s ahead: spans are moved into their parents."]
    right = [
        span.model_copy(update={"attributes": {**span.attributes, "mesh.clock_offset_s": -0.25, "mesh.clock_error_s": 0.0004}})
        if span.instance == "shard-1"
        else span
        for span in SPANS
    ]
    assert clocks(right, aligned(right)) == ["The clock of shard-1 is 250 ms behind ± 400 µs: its times are corrected."]


def test_the_headline_says_what_the_request_was() -> None:
    document = example_trace.document()
    assert headline(document) == (
        "request 9f2c6b1d4e8a7c3f5b0d1e2a of tiny: done, as long as was asked for, 512 prompt tokens, 7 tokens in 516 ms, "
        "first token after 192 ms, moved once"
    )
    assert "no token yet" in headline({**document, "first_token_s": None, "state": "prefilling", "restarts": 0})


if __name__ == "__main__":
    GOLDEN.write_text(text(SPANS))
