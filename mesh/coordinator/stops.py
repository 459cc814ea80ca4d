"""Stop texts, found in a text that comes in pieces. The work is constant for each character, whatever the stop texts are."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopTexts"]


class StopTexts:
    """`found` is the first of `stops` that was complete; of several, the one that begins first. What `push` returns, joined, is the text
    before it.

    Text that may be the beginning of a stop text is held back until it is known not to be. The search is that of Knuth, Morris and
    Pratt, for each stop text.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.found: str | None = None
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._matched = [0] * len(stops)  # how many characters of each stop text the end of the text is
        self._held = ""

    def push(self, piece: str, *, end: bool = False) -> str:
        """The text that is no part of a stop text for certain, now that `piece` has come; with `end`, all that is left."""
        if self.found is not None:
            return ""
        text, before = self._held + piece, len(self._held)
        begins = [(begin, stop) for number, (stop, _) in enumerate(self._stops) if (begin := self._search(number, piece)) is not None]
        if begins:
            begin, self.found = min(begins)
            self._held = ""
            return text[: before + begin]
        keep = 0 if end else max(self._matched, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _search(self, number: int, piece: str) -> int | None:
        """Where in `piece` this stop text begins, the first time that it is complete; negative where it began earlier."""
        stop, borders = self._stops[number]
        matched = self._matched[number]
        for at, character in enumerate(piece):
            while matched and stop[matched] != character:
                matched = borders[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                return at + 1 - len(stop)
        self._matched[number] = matched
        return None


def _borders(stop: str) -> list[int]:
    """For each beginning of `stop`: the longest text that it begins and ends with, shorter than itself."""
    borders = [0] * len(stop)
    length = 0
    for at in range(1, len(stop)):
        while length and stop[at] != stop[length]:
            length = borders[length - 1]
        if stop[at] == stop[length]:
            length += 1
        borders[at] = length
    return borders
