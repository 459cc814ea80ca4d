"""What shards keep of sessions that have ended, or hold of those that run, so that others can begin with it. Pure.

The positions of a row depend on nothing but the tokens up to them. So a session whose prompt begins as an earlier history did may go on
with the row of that history, at the first position where they differ. Histories are compared by digests of their beginnings, one for every
BLOCK tokens (Chain): each digest stands for all tokens before it, and for the salt, which says whose tokens they are. Tenants have
different salts, so none of them finds what another one left.

The index only says where to ask. A shard names each row by one digest, that of all the blocks it holds, and begins with nothing where it
does not know the digest: then the whole prompt is computed. Nothing that is wrong or missing here costs more than that.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

__all__ = ["BLOCK", "Beginning", "Chain", "PrefixIndex", "Remembered"]

BLOCK: Final = 16
"""Tokens from one digest to the next. The rest of a common beginning is computed again."""
MOST_DIGESTS: Final = 512
"""Of one history, in a message: of a longer one every second block counts, or fewer."""
_DIGEST_BYTES: Final = 16


class Beginning(NamedTuple):
    """The first `positions` positions of what the row named `digest` holds."""

    digest: str
    positions: int


class Chain:
    """The digests of a history's beginnings, as far as it was added: `digests[i]` is of its first (i + 1) * BLOCK tokens."""

    __slots__ = ("_hash", "digests")

    def __init__(self, salt: str, history: Sequence[int] = ()) -> None:
        self.digests: list[str] = []
        self._hash = hashlib.blake2b(hashlib.sha256(salt.encode()).digest(), digest_size=_DIGEST_BYTES)
        self.add(history, len(history))

    def add(self, history: Sequence[int], stop: int) -> None:
        """The history is known up to `stop`, and goes on as it began."""
        for at in range(len(self.digests) * BLOCK, stop - BLOCK + 1, BLOCK):
            self._hash.update(array("i", history[at : at + BLOCK]).tobytes())
            self.digests.append(self._hash.hexdigest())

    def whole(self, positions: int) -> Beginning | None:
        """The whole blocks of the first `positions` positions, by their own name. None: there is none."""
        blocks = positions // BLOCK
        return Beginning(self.digests[blocks - 1], blocks * BLOCK) if blocks else None

    def remembered(self, positions: int) -> Remembered | None:
        """The same, with the digests by which others find what they have in common with it."""
        blocks = positions // BLOCK
        every = -(-blocks // MOST_DIGESTS)
        return (
            Remembered(self.digests[blocks - 1], blocks * BLOCK, every, tuple(self.digests[every - 1 : blocks : every])) if blocks else None
        )


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a row holds: `positions` positions, named `digest`. digests: of its first `every`, 2 * `every` ... blocks."""

    digest: str
    positions: int
    every: int
    digests: tuple[str, ...]

    def common(self, digests: Sequence[str], blocks: int) -> int:
        """How many positions it has in common with a history, of which at most `blocks` blocks are wanted."""
        low, high = 0, min(len(self.digests), blocks // self.every)
        while low < high:  # where one digest is equal, all before it are
            middle = (low + high + 1) // 2
            if self.digests[middle - 1] == digests[middle * self.every - 1]:
                low = middle
            else:
                high = middle - 1
        return low * self.every * BLOCK


class PrefixIndex:
    """By shard: what its rows hold, as far as it was heard."""

    def __init__(self) -> None:
        self._held: dict[str, OrderedDict[str, Remembered]] = {}

    def note(self, shard: str, held: Remembered, most: int) -> None:
        """A row of `shard` holds this. The oldest of more than `most` are forgotten."""
        rows = self._held.setdefault(shard, OrderedDict())
        rows.pop(held.digest, None)
        rows[held.digest] = held
        while len(rows) > most:
            rows.popitem(last=False)
        if not rows:
            del self._held[shard]

    def names(self) -> dict[str, int]:
        """How many beginnings each shard is known to hold."""
        return {shard: len(rows) for shard, rows in self._held.items()}

    def missed(self, shard: str, digest: str) -> None:
        """The shard does not hold it, or less of it than was thought."""
        self._held.get(shard, OrderedDict()).pop(digest, None)

    def forget(self, shard: str) -> None:
        """The rows of the shard are gone."""
        self._held.pop(shard, None)

    def best(self, shard: str, chain: Chain, positions: int) -> Beginning | None:
        """The longest beginning of a history that the shard holds, of at most `positions` positions; of equal ones the latest, because the
        row of an earlier one may have gone on to be the later one."""
        blocks, best = min(positions // BLOCK, len(chain.digests)), None
        for held in reversed(self._held.get(shard, OrderedDict()).values()):
            common = held.common(chain.digests, blocks)
            if common and (best is None or common > best.positions):
                best = Beginning(held.digest, common)
        return best
