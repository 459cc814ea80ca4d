"""The segments of a packed step: for each of several sessions, tokens at consecutive positions of its row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Segments"]


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a packed step, in order. Each has `counts` tokens of one row, from position `starts` on. `wants`: whether a token is
    to be sampled after the last one. No row appears twice."""

    rows: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]
    wants: Sequence[bool]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def decoding(self) -> list[bool]:
        """Which segments are a decode step of their session: one token, and another one wanted."""
        return [count == 1 and wants for count, wants in zip(self.counts, self.wants, strict=True)]

    def ends(self) -> list[int]:
        """The index after the last token of each segment."""
        ends, at = [], 0
        for count in self.counts:
            at += count
            ends.append(at)
        return ends

    def pieces(self, most: int) -> list[tuple[Segments, slice]]:
        """The same as steps of at most `most` tokens, with the tokens of each. Only the last part of a segment wants a token."""
        if sum(self.counts) <= most:
            return [(self, slice(0, sum(self.counts)))]
        parts: list[tuple[int, int, int, bool]] = []
        pieces, room, begin, at = [], most, 0, 0
        for row, start, count, wants in zip(self.rows, self.starts, self.counts, self.wants, strict=True):
            done = 0
            while done < count:
                some = min(count - done, room)
                done, room, at = done + some, room - some, at + some
                parts.append((row, start + done - some, some, wants and done == count))
                if not room:
                    pieces.append((_segments(parts), slice(begin, at)))
                    parts, room, begin = [], most, at
        if parts:
            pieces.append((_segments(parts), slice(begin, at)))
        return pieces


def _segments(parts: list[tuple[int, int, int, bool]]) -> Segments:
    rows, starts, counts, wants = zip(*parts, strict=True)
    return Segments(rows, starts, counts, wants)
