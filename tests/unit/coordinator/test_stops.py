"""Stop texts in a text that comes in pieces, compared with a search of the whole text, and what they cost."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from mesh.coordinator.stops import StopTexts

letters = st.text("ab", max_size=12)


@given(st.lists(st.text("ab", min_size=1, max_size=5), max_size=3), st.lists(letters, max_size=8))
def test_the_text_ends_where_the_first_stop_text_begins(stops: list[str], pieces: list[str]) -> None:
    search = StopTexts(stops)
    given_out = ""
    for count in range(1, len(pieces) + 1):
        given_out += search.push(pieces[count - 1])
        so_far = "".join(pieces[:count])
        begins = [at for stop in stops if (at := so_far.find(stop)) >= 0]
        first = min(begins, default=None)
        assert search.found == (None if first is None else min(stop for stop in stops if so_far.find(stop) == first))
        if begins:
            assert given_out == so_far[: min(begins)]
            return
        overlap = max((n for stop in stops for n in range(len(stop)) if n and so_far.endswith(stop[:n])), default=0)
        assert given_out == so_far[: len(so_far) - overlap], "as much as is certain"
    assert given_out + search.push("", end=True) == "".join(pieces)


def test_stop_texts_that_almost_match_cost_little() -> None:
    search = StopTexts(["a" * 999 + chr(ord("b") + number) for number in range(16)])
    began = time.process_time()
    for _ in range(2000):
        search.push("aaaa")
    assert time.process_time() - began < 2.0  # 0.1 s; comparing every beginning with the text took 15 s
