"""What a shard computes with: one layer range, its rows, and the kinds of step.

There are two engines. `Stage` (stage.py) keeps keys and values of every row. `RecomputingStage` (recompute.py) keeps only what came in
and computes a row again at each step. A shard calls both through `Engine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mesh.model.manifest import Manifest
from mesh.model.memory import MemoryNeed
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.segments import Segments
from mesh.types import LayerRange, Progress

__all__ = ["Engine", "SampledToken", "Segments", "StageCounters"]


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A sampled token. `logprob` and `top` ((token, logprob), likeliest first) are set only where the row asked for them. `state` [D]: the
    hidden state after the final norm, for a row that asked for that; `id` is EMBEDDED then."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    state: np.ndarray | None = None


@dataclass
class StageCounters:
    """Steps run, tokens in them and seconds spent, since load."""

    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0


class Engine(Protocol):
    """One layer range on one device. Synchronous, one caller at a time. A step that is repeated changes nothing up to its last
    position, so replaying steps is always safe."""

    counters: StageCounters
    bucket: int
    """The rows or tokens that the last step computed, padding included."""
    sampled_s: float
    """What drawing tokens took in the last step; 0 where the likeliest ones sufficed, and on a stage that does not sample."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def need(self) -> MemoryNeed:
        """The memory that was predicted at load."""

    @property
    def held(self) -> LayerRange:
        """The layers whose weights are here; `serve` may choose any range of them."""

    @property
    def compiled(self) -> int:
        """Programs that are compiled."""

    @property
    def first(self) -> bool:
        """Whether it embeds tokens: steps then take no hidden state."""

    @property
    def packs(self) -> bool:
        """Whether a packed step runs as one, and not as several of the other kinds."""

    @property
    def last(self) -> bool:
        """Whether it samples: steps then return tokens."""

    @property
    def embeds(self) -> bool:
        """Whether it samples and can give the hidden state after the final norm in place of a token."""

    def serve(self, layers: LayerRange) -> None:
        """Run `layers` of those that are held from now on. What the rows held is lost. BadLayerRange: not all of them are held."""

    def warm_up(self, progress: Progress = ...) -> None:
        """Compile every program, so that no step has to. Idempotent."""

    def exercise(self) -> None:
        """Run each compiled program once where its first run takes much longer than later ones. Call it before any row is in use: it
        writes to them."""

    def open(self, row: int, params: SamplingParams, *, prompt_length: int) -> None:
        """Set a row's sampling parameters. Only the last stage uses them."""

    def copy(self, source: int, target: int, positions: int) -> None:
        """Give row `target` what row `source` holds at its first `positions` positions."""

    def prefill(self, row: int, start: int, tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray | SampledToken:
        """Run tokens [T] of `row` from position `start` on; `hidden` [T, D] is their hidden state, unless this is the first stage.

        Returns hidden [T, D], or on the last stage the token sampled after the last one.
        """

    def decode(
        self, rows: np.ndarray, positions: np.ndarray, tokens: np.ndarray, hidden: np.ndarray | None = None
    ) -> np.ndarray | list[SampledToken]:
        """Run one token for each of `rows` [n] at `positions` [n]; `hidden` [n, D] as for prefill.

        Returns hidden [n, D] in the same order, or on the last stage n tokens. Other rows stay as they are.
        """

    def packed(self, segments: Segments, tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray | list[SampledToken | None]:
        """Run tokens [m] (and hidden [m, D]) of several rows, segment after segment.

        Returns hidden [m, D], or on the last stage the token sampled after each segment, None for those that want none.
        """
