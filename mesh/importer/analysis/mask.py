"""Recognise what a source's attention does to its scores, by evaluating the source's own mask on concrete sizes.

    causal, optionally with a sliding window or in chunks; a linear bias of the distance (ALiBi); a scale; a soft cap

Anything else is an UnsupportedModel that says what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.attention import AttentionPattern
from mesh.importer.graph.decoder import DecoderGraph
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import GraphProbe

__all__ = ["MaskReader", "ScoreRule"]

Array = npt.NDArray[Any]

HIDDEN = -9e3  # scores this low are masked: exporters use -inf, the lowest float, -1e9 and -1e4
LONGEST_SQUARE = 4200  # a mask [T, T] for a source without a cache is evaluated up to this T


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """softmax(softcap(scale * q @ k.T) + slopes * (slot - position)) over the slots in the window, or in the position's own chunk."""

    scale: float
    softcap: float
    window: int | None  # tokens seen, the own one included
    slopes: tuple[float, ...] | None  # one a query head
    chunk: int | None = None  # positions are seen from the last multiple of this on

    @property
    def most(self) -> int | None:
        """The most positions that a token sees; None: all before it."""
        return self.window or self.chunk


@dataclass(frozen=True, slots=True)
class _Reach:
    """How far back positions see: a window of the last tokens, their own chunk, or all."""

    window: int | None = None
    chunk: int | None = None


class MaskReader:
    """Reads the rule of each pattern of one graph; probes are shared between patterns."""

    def __init__(self, graph: DecoderGraph, context_length: int) -> None:
        self.graph, self.context_length = graph, context_length
        self._probes: dict[tuple[int, int, int], GraphProbe] = {}
        self._reaches: dict[frozenset[Any], _Reach] = {}

    def read(self, pattern: AttentionPattern) -> ScoreRule:
        """UnsupportedModel if the pattern masks, biases or scales its scores in a way that blocks cannot express."""
        small = self._probe(2, 4, 5) if self.graph.has_past else self._probe(2, 9, 0)
        at_zero = self._scores(pattern, small)
        positions, slots = _positions(small)
        visible = at_zero > HIDDEN
        where = f"attention {pattern.number} ({pattern.node.name})"
        _check_causal(visible, positions, slots, where)
        slopes = _slopes(at_zero, visible, positions, slots, where)
        scale, softcap = self._scale(pattern, small, at_zero, visible, where)
        key = frozenset(pattern.mask_values)
        if key not in self._reaches or not pattern.mask_values:
            self._reaches[key] = self._reach(pattern, slopes, where)
        reach = self._reaches[key]
        return ScoreRule(scale, softcap, reach.window, slopes, reach.chunk)

    def _probe(self, batch: int, chunk: int, past: int) -> GraphProbe:
        key = batch, chunk, past
        if key not in self._probes:
            self._probes[key] = GraphProbe(self.graph, *key)
        return self._probes[key]

    def _scores(self, pattern: AttentionPattern, probe: GraphProbe, value: float | Array = 0.0) -> Array:
        shape = (probe.batch, pattern.heads, probe.chunk, probe.total)
        try:
            with np.errstate(all="ignore"):
                scores = pattern.scores(probe, np.broadcast_to(np.asarray(value, np.float32), shape))
                return np.broadcast_to(np.asarray(scores, np.float64), shape)
        except NotConcrete as error:
            raise UnsupportedModel(f"the mask of attention {pattern.number} ({pattern.node.name}) cannot be evaluated: {error}") from None

    def _scale(self, pattern: AttentionPattern, probe: GraphProbe, at_zero: Array, visible: Array, where: str) -> tuple[float, float]:
        def response(value: float) -> Array:
            return self._scores(pattern, probe, value)[visible] - at_zero[visible]

        near, far = response(1.0), response(1e4)
        if not (np.ptp(near) <= 1e-3 * abs(near.mean()) and near.mean() > 0):
            raise UnsupportedModel(f"{where}: scores are not scaled by one positive number (between {near.min():.4g} and {near.max():.4g})")
        if np.allclose(far, near.mean() * 1e4, rtol=2e-3):
            return float(far.mean() / 1e4), 0.0
        cap = float(response(1e9).mean())
        half = float(near.mean())
        scale = cap * float(np.arctanh(min(half / cap, 1 - 1e-7)))
        for value in (-3.0, 0.5, 7.0, 40.0):
            if not np.allclose(response(value), cap * np.tanh(value * scale / cap), rtol=5e-3, atol=1e-4 * cap):
                raise UnsupportedModel(f"{where}: scores are bounded by something else than softcap * tanh(scores / softcap)")
        return scale, cap

    def _reach(self, pattern: AttentionPattern, slopes: tuple[float, ...] | None, where: str) -> _Reach:
        """How far back a late position sees."""
        limit = self.context_length
        if self.graph.has_past:
            probes = [(1, limit - 1)]
        else:
            sizes = [64, 512, 2048, *(int(c) + 2 for c in self._candidates(pattern))]
            probes = [(size, 0) for size in sorted({min(size, limit) for size in sizes if size <= LONGEST_SQUARE or size >= limit})]
        for chunk, past in probes:
            total = chunk + past
            count = self._seen(pattern, slopes, where, chunk, past)
            if count == total:
                continue
            before = self._seen(pattern, slopes, where, *((1, past - 1) if past else (chunk - 1, 0)))
            if before == count:
                return _Reach(window=count)
            return _Reach(chunk=self._chunk(pattern, slopes, where, total - count))
        return _Reach()

    def _chunk(self, pattern: AttentionPattern, slopes: tuple[float, ...] | None, where: str, start: int) -> int:
        """The size of the chunks where one begins at position `start`. UnsupportedModel: the positions seen are no chunks."""

        def seen(position: int) -> int:
            return self._seen(pattern, slopes, where, *((1, position) if self.graph.has_past and position else (position + 1, 0)))

        size = seen(start - 1)
        if start % size or (seen(size - 1), seen(size), seen(start)) != (size, 1, 1):
            raise UnsupportedModel(
                f"{where}: position {start} sees {seen(start)} and position {start - 1} sees {size}: only causal masks, sliding windows "
                "and chunks of one size are supported"
            )
        return size

    def _seen(self, pattern: AttentionPattern, slopes: tuple[float, ...] | None, where: str, chunk: int, past: int) -> int:
        """How many positions the last of `chunk` after `past` sees; they are the last ones."""
        # squares are large: not kept for other patterns
        probe = self._probe(1, chunk, past) if past else GraphProbe(self.graph, 1, chunk, past)
        last = self._last_row(pattern, probe)
        if slopes is not None:
            last = last - np.asarray(slopes)[None, :, None] * (np.arange(probe.total) - probe.total + 1)
            last = last - last[..., -1:]
        visible = last > HIDDEN
        count = int(visible[0, 0].sum())
        if not visible[..., -count:].all() or visible[..., : probe.total - count].any():
            raise UnsupportedModel(
                f"{where}: position {probe.total - 1} sees {_runs(visible[0, 0])}: only causal, sliding-window and chunked masks are "
                "supported"
            )
        return count

    def _last_row(self, pattern: AttentionPattern, probe: GraphProbe) -> Array:
        """Scores [1, H or 1, S] of the last position for raw scores of zero."""
        one = np.zeros((1, 1, probe.chunk, probe.total), np.float32)
        try:
            with np.errstate(all="ignore"):
                scores = pattern.scores(probe, one)[:, :, -1]
        except NotConcrete:  # the heads are merged with another axis
            return self._scores(pattern, probe)[:, :, -1]
        if scores.shape[1] not in (1, pattern.heads):
            return self._scores(pattern, probe)[:, :, -1]
        return np.asarray(scores, np.float64)

    def _candidates(self, pattern: AttentionPattern) -> list[int]:
        """Integers in the arithmetic of the mask that could be a window longer than the lengths that are always probed."""
        found: set[int] = set()
        for value in pattern.mask_values:
            for node in self.graph.ancestors(value):
                for source in node.inputs:
                    if source is None or source.const_value is None or source.const_value.size != 1:
                        continue
                    number = abs(float(source.const_value.numpy().reshape(())))
                    if 2048 < number < min(self.context_length, LONGEST_SQUARE) - 2:
                        found.add(int(number))
        return sorted(found)


def _positions(probe: GraphProbe) -> tuple[Array, Array]:
    return np.arange(probe.past, probe.total)[:, None], np.arange(probe.total)[None, :]


def _check_causal(visible: Array, positions: Array, slots: Array, where: str) -> None:
    """Check that no later position is visible, that a position sees itself, and that all rows and heads see the same."""
    later = visible & (slots > positions)
    if later.any():
        row = int(np.argwhere(later)[0][2])
        seen = f"position {int(positions[row, 0])} sees {_runs(visible[0, 0, row])} of {visible.shape[-1]}"
        raise UnsupportedModel(f"{where}: attends to later positions ({seen}): an encoder or prefix model, not a decoder")
    if not (visible | (slots != positions)).all() or (visible != visible[:1, :1]).any():
        row = visible[0, 0, -1]
        raise UnsupportedModel(
            f"{where}: position {int(positions[-1, 0])} sees {_runs(row)}: only causal and sliding-window masks are supported"
        )


def _slopes(scores: Array, visible: Array, positions: Array, slots: Array, where: str) -> tuple[float, ...] | None:
    """ALiBi slopes from the scores at zero. A term that is equal along a whole row is ignored: a softmax does not change by it."""
    own = np.take_along_axis(scores, np.broadcast_to(positions, (*scores.shape[:3], 1)), axis=-1)
    bias = np.where(visible, scores, own) - own
    tolerance = 1e-3 * max(1.0, float(np.abs(own).max()))
    if np.abs(bias).max() <= 1e-6:
        return None
    distance = (slots - positions).astype(np.float64)
    slopes = (bias * distance).sum(axis=(0, 2, 3)) / (np.where(visible, distance, 0.0) ** 2).sum(axis=(0, 2, 3))
    if not np.allclose(bias, np.where(visible, slopes[None, :, None, None] * distance, 0.0), atol=tolerance):
        sample = ", ".join(f"{number:.4g}" for number in bias[0, 0, -1][:6])
        raise UnsupportedModel(
            f"{where}: a bias is added to the scores that is not linear in the distance (head 0: {sample}): only ALiBi is supported"
        )
    return tuple(float(slope) for slope in slopes)


def _runs(visible: Array) -> str:
    """Visible slots as ranges: "slots 0-3, 7"."""
    slots = np.flatnonzero(visible)
    if not slots.size:
        return "nothing"
    breaks = np.flatnonzero(np.diff(slots) > 1)
    starts, ends = [slots[0], *slots[breaks + 1]], [*slots[breaks], slots[-1]]
    parts = [str(a) if a == b else f"{a}-{b}" for a, b in zip(starts[:4], ends[:4], strict=True)]
    return "slots " + ", ".join(parts) + (", ..." if len(starts) > 4 else "")
