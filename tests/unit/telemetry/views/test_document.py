"""What the command line and the dashboard add to a trace document."""

from __future__ import annotations

import example_trace
import pytest

from mesh.errors import MessageRejected
from mesh.telemetry.views.document import looked_at, spans_of


def test_the_spans_of_a_document_are_read_and_wrong_ones_are_named() -> None:
    document = example_trace.document()
    assert list(spans_of(document)) == example_trace.spans()
    assert spans_of({}) == ()
    document["spans"][3]["start_ns"] = -1
    with pytest.raises(MessageRejected, match=r"spans\.3\.start_ns"):
        spans_of(document)


def test_a_document_is_shown_on_one_clock_with_what_bounds_it() -> None:
    document = example_trace.document(skew_ns={"shard-2": 2 * 10**9})
    shown = looked_at(document)
    assert shown["bound"]["phase"] == "compute" and shown["bound"]["sentence"].startswith("Bound by compute: 61 %")
    assert shown["clocks"] == ["The clock of shard-2 is about 2 s ahead: spans are moved into their parents."]
    last = max(span["end_ns"] for span in shown["spans"])
    assert last - example_trace.BEGAN_NS < 10**9 < max(span["end_ns"] for span in document["spans"]) - example_trace.BEGAN_NS
    right = example_trace.document()
    assert looked_at(right)["spans"] == right["spans"]
