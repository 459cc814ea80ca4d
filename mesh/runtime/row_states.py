"""At which positions of a row its states are held, for models whose layers carry states of a fixed size from token to token.

Keys and values are addressed by position, so that a step may be repeated. A state is not: once more tokens are in it, it is another one. So
a stage holds each row's states at a few positions, its places. A step begins with the states of a place that stands at its first position,
or with zeros at position 0, and writes those after it to another place:

    a place that stands where the step ends     written again: a repeated step is harmless
    an empty place, or one that stands later    taken
    else                                        the lowest position that is no checkpoint, or else the lowest checkpoint, is given up

Checkpoints are the multiples of EVERY, where steps are cut, so that all shards have them at the same positions. Two of the places are thus
the row as it stands and as it stood before the last step; the others are checkpoints. After a step nothing stands later than its end, as
what a step before it has left there may be of other tokens.

The bookkeeping is the same wherever the same steps are noted in the same order: the stage keeps it for what it computes, the shard for
what it has admitted (mesh/shard/state.py). Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from mesh.errors import BadRequest
from mesh.model.memory import STATE_PLACES

__all__ = ["EVERY", "Move", "RowStates", "StatesOfRows"]

EVERY: Final = 256
"""Positions between two checkpoints."""


@dataclass(frozen=True, slots=True)
class Move:
    """A part of a step: positions start .. stop - 1, from the states at place `source` (None: zeros) to those at place `target`."""

    source: int | None
    target: int
    start: int
    stop: int


@dataclass(slots=True)
class RowStates:
    """The places of one row. `stands[i]`: the position at which the states of place i stand, None where there are none."""

    stands: list[int | None] = field(default_factory=lambda: [None] * STATE_PLACES)

    def begins(self, most: int) -> tuple[int, ...]:
        """The positions up to `most` at which a step may begin, in ascending order; 0 always is one."""
        return tuple(sorted({0, *(at for at in self.stands if at is not None and at <= most)}))

    def can_begin(self, start: int) -> bool:
        return start == 0 or start in self.stands

    def advance(self, start: int, count: int) -> list[Move]:
        """Note a step of `count` positions from `start` on, at which it can begin, and return its parts."""
        assert self.can_begin(start) and count > 0, (start, self.stands)
        stop, moves = start + count, []
        while start < stop:
            end = min(stop, (start // EVERY + 1) * EVERY)
            moves.append(self._move(start, end))
            start = end
        return moves

    def _move(self, start: int, stop: int) -> Move:
        source = self.stands.index(start) if start else None
        self.stands = [at if at is not None and (at <= start or at == stop) else None for at in self.stands]
        target = self._target(source, stop)
        self.stands[target] = stop
        return Move(source, target, start, stop)

    def _target(self, source: int | None, stop: int) -> int:
        for wanted in (stop, None):
            if wanted in self.stands:
                return self.stands.index(wanted)
        given_up = [(at % EVERY == 0, at, place) for place, at in enumerate(self.stands) if at is not None and place != source]
        return min(given_up)[2]

    def check(self) -> None:
        """Assert the invariants: places stand at different positions after 0. For tests."""
        held = [at for at in self.stands if at is not None]
        assert len(set(held)) == len(held) and all(at > 0 for at in held), self.stands


class StatesOfRows:
    """The places of all rows of a stage, as indices of its arrays of states: those of each row, one after the other, then the zeros before
    position 0, then one that is written for rows that a step leaves out."""

    def __init__(self, rows: int) -> None:
        self.of = [RowStates() for _ in range(rows)]

    def check_begins(self, row: int, start: int) -> None:
        """BadRequest where a step of the row cannot begin at `start`."""
        if not self.of[row].can_begin(start):
            begins = self.of[row].begins(start)
            raise BadRequest(f"row {row} has no states at position {start}: begin at one of {begins}", field="position")

    def places(self, row: int, source: int | None, target: int) -> np.ndarray:
        """int32 [2, 1]: where a step of one row reads and writes."""
        return np.array([[self._index(row, source)], [self._index(row, target)]], np.int32)

    def decode_places(self, rows: Sequence[int], positions: Sequence[int], base: int, size: int) -> np.ndarray:
        """int32 [2, size]: the same for a decode step of `rows` among base .. base + size - 1, which is noted. BadRequest, and nothing is
        noted, where one of them cannot begin at its position."""
        for row, position in zip(rows, positions, strict=True):
            self.check_begins(row, position)
        zeros = self._index(len(self.of), 0)
        places = np.array([[zeros] * size, [zeros + 1] * size], np.int32)
        for row, position in zip(rows, positions, strict=True):
            (move,) = self.of[row].advance(position, 1)
            places[:, row - base] = self._index(row, move.source), self._index(row, move.target)
        return places

    def _index(self, row: int, place: int | None) -> int:
        return len(self.of) * STATE_PLACES if place is None else row * STATE_PLACES + place
