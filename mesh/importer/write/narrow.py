"""Weights of 4 and 6 bits of this package's own: codes, and numbers for each group of inputs, chosen for the least error.

    4 bits   (code - 0) * scale - minimum, codes from 0 to 15
    6 bits   (code - 32) * scale, codes from 0 to 63

A group is so many inputs of one output, 32 where nothing else is asked for. Its scale and its minimum are whole numbers of 8 bits, times a
step that up to 32 groups of the output share: 4.5 bits a weight and 6.25, and the steps.

The error of a group is the sum of its squared differences, each times the importance of its input: the mean square of that input over a
text, or 1. A scale and a minimum are the least squares of the codes that one of several ranges gives, the best of these is rounded to its 8
bits, and the codes are chosen again for the rounded numbers. Where that is no better than plain rounding, plain rounding is taken.

`compensated` rounds one input after another instead, and lets the inputs that are still to come make up for what each rounding has changed
(GPTQ, Frantar et al. 2022): for that it is given how the inputs go together.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mesh.importer.precision import NarrowBits, groups_of_a_step

__all__ = ["SIX_ZERO", "Narrow", "compensated", "fit", "packed"]

Array = npt.NDArray[Any]

LEVELS = 255  # of a scale or a minimum
SIX_ZERO = 32
SLICE_GROUPS = 1 << 13
THREADS = 2
RANGE_4, RANGE_6 = (0, 15), (-SIX_ZERO, SIX_ZERO - 1)
# Ranges that are tried: how many steps more than there are the elements of a group are stretched to, so that the outermost are clipped.
STRETCHES_4 = np.array([0.0, -0.8, -0.4, 0.4, 0.8, 1.2, 1.7, 2.3], np.float32)
STRETCHES_6 = np.array([0.0, -0.4, 0.5, 1.2, 2.0, 3.0], np.float32)
DAMPING = 0.01
"""Added to the diagonal of a matrix of moments, as a share of its mean: inputs that were always alike would have no inverse."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """A weight [out, in]: codes uint8 [out, in]; scale and minimum uint8 [out, groups]; their steps [out, groups / n], of the compute type.
    Of 6 bits there is no minimum."""

    bits: NarrowBits
    group: int
    codes: Array
    scale: Array
    scale_step: Array
    minimum: Array | None = None
    minimum_step: Array | None = None

    def numbers(self) -> Array:
        """What it stands for, float32 [out, in], by the steps that the nodes of a block take."""
        scale, minimum = self.factors()
        values = self.codes.astype(np.float32)
        if self.bits == 6:
            values -= SIX_ZERO
        values *= np.repeat(scale, self.group, axis=1)
        return values if minimum is None else values - np.repeat(minimum, self.group, axis=1)

    def factors(self) -> tuple[Array, Array | None]:
        """The scale and the minimum of each group, float32 [out, groups]."""

        def product(data: Array, step: Array) -> Array:
            return data.astype(np.float32) * np.repeat(step.astype(np.float32), data.shape[1] // step.shape[1], axis=1)

        minimum = None if self.minimum is None or self.minimum_step is None else product(self.minimum, self.minimum_step)
        return product(self.scale, self.scale_step), minimum


def fit(weight: Array, bits: NarrowBits, group: int, step: np.dtype[Any], importance: Array | None = None) -> Narrow:
    """`weight` [out, in] of any float type, rounded. `importance` [in]: what an error of each input counts, at least 0. `step`: the type of
    the steps."""
    out, depth = weight.shape
    groups = depth // group
    height = max(1, SLICE_GROUPS // groups)
    wide = max(SLICE_GROUPS, groups)  # groups of a slice, filled up, so that one program serves weights of all sizes
    counts = np.ones((group, wide), np.float32)
    counts[:, : height * groups] = np.tile(_importance(importance, depth).reshape(groups, group).T, height)
    codes = np.empty((out, depth), np.uint8)
    factors: dict[int, tuple[Array, ...]] = {}
    run = _fit_4 if bits == 4 else _fit_6

    def part(start: int) -> None:
        rows = np.asarray(weight[start : start + height], np.float32)
        flat = np.zeros((group, wide), np.float32)
        flat[:, : len(rows) * groups] = rows.reshape(-1, group).T
        found, factors[start] = run(flat, counts, partial(_in_steps, shape=(len(rows), groups), step=step))
        codes[start : start + height] = found[:, : len(rows) * groups].T.reshape(rows.shape)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(part, range(0, out, height)))
    in_order = [factors[start] for start in sorted(factors)]
    return Narrow(bits, group, codes, *(np.concatenate(parts) for parts in zip(*in_order, strict=True)))


def compensated(weight: Array, narrow: Narrow, moments: Array) -> Narrow:
    """The same scales and minima with codes that make up for each other. `moments` [in, in]: the mean products of any two inputs."""
    out, depth = weight.shape
    damped = moments.astype(np.float64)
    damped[np.diag_indices(depth)] += DAMPING * max(float(np.mean(np.diag(damped))), 1e-30)
    try:
        upper = np.linalg.cholesky(np.linalg.inv(damped)).T.astype(np.float32)  # [in, in], upper triangular
    except np.linalg.LinAlgError:
        return narrow
    if not np.isfinite(upper).all():
        return narrow
    scale, minimum = narrow.factors()
    lowest = np.float32(-SIX_ZERO) * scale if minimum is None else -minimum
    top = np.float32((1 << narrow.bits) - 1)
    left = np.ascontiguousarray(weight.T, dtype=np.float32)  # [in, out]
    codes = np.empty((depth, out), np.uint8)
    for start in range(0, depth, narrow.group):
        stop = min(start + narrow.group, depth)
        place = start // narrow.group
        found, error = _round_group(left[start:stop], upper[start:stop, start:stop], scale[:, place], lowest[:, place], top)
        codes[start:stop] = np.asarray(found)
        if stop < depth:
            left[stop:] -= upper[start:stop, stop:].T @ np.asarray(error)
    return replace(narrow, codes=np.ascontiguousarray(codes.T))


def packed(codes: Array, bits: NarrowBits) -> tuple[Array, Array | None]:
    """Codes [out, in] as bytes, in the order of mesh/kernels/native/weight.h: the low four bits [out, in / 2] in blocks of 32 codes, code j
    with code j + 16 above it; of 6 bits also the upper two [out, in / 4] in blocks of 64: j, j + 16, j + 32 and j + 48."""
    out, depth = codes.shape
    blocks = (codes & 15).reshape(out, depth // 32, 2, 16)
    low = (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(out, depth // 2)
    if bits == 4:
        return low, None
    upper = (codes >> 4).reshape(out, depth // 64, 4, 16)
    return low, (upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6).reshape(out, depth // 4)


def _importance(importance: Array | None, depth: int) -> Array:
    """What each input counts, float32 [in], with a mean of 1; an input that is always zero counts a little."""
    if importance is None:
        return np.ones(depth, np.float32)
    mean = max(float(np.mean(importance)), 1e-30)
    return np.asarray(importance / mean + 1e-3, np.float32)


InSteps = Callable[[Array], tuple[Array, Array, Array]]


def _fit_4(w: Array, h: Array, in_steps: InSteps) -> tuple[Array, tuple[Array, ...]]:
    """w, h [group, n]: the weights of n groups, and what their errors count -> codes [group, n], (scale, its step, minimum, its step)."""

    def stored(scale: Array, minimum: Array, again: bool) -> tuple[Any, ...]:
        scale_code, scale_step, scale = in_steps(np.asarray(scale))
        minimum = np.asarray(_minimum_for(w, h, scale, minimum) if again else minimum)
        minimum_code, minimum_step, minimum = in_steps(minimum)
        return (np.asarray(_error(w, h, scale, minimum, *RANGE_4)), (scale_code, scale_step, minimum_code, minimum_step), scale, minimum)

    (plain_scale, plain_minimum), (scale, minimum) = _search_4(w, h)
    factors, scale, minimum = _better(stored(scale, minimum, True), stored(plain_scale, plain_minimum, False))
    return np.asarray(_coded(w, scale, minimum, *RANGE_4)), factors


def _fit_6(w: Array, h: Array, in_steps: InSteps) -> tuple[Array, tuple[Array, ...]]:
    """The same without minima: codes [group, n], (scale, its step)."""
    none = np.zeros(w.shape[1], np.float32)

    def stored(scale: Any) -> tuple[Any, ...]:
        scale_code, scale_step, scale = in_steps(np.asarray(scale))
        return np.asarray(_error(w, h, scale, none, *RANGE_6)), (scale_code, scale_step), scale

    plain, searched = _search_6(w, h)
    factors, scale = _better(stored(searched), stored(plain))
    return np.asarray(_coded(w, scale, none, *RANGE_6)) + np.uint8(SIX_ZERO), factors


@jax.jit
def _search_4(w: Any, h: Any) -> Any:
    """Scales and minima [n]: those of plain rounding, and the best."""
    low = jnp.minimum(w.min(0), 0)
    span = jnp.maximum(w.max(0) - low, 0)
    counts, first, squares = _sums(w, h, lambda x, weight: (weight, weight * x, weight * x * x))

    def attempt(index: Any, best: Any) -> Any:
        """Codes for one range, and the scale and the minimum with the least error for these codes; no minimum is below 0."""
        inverse = _inverse(span) * (15 + jnp.asarray(STRETCHES_4)[index])

        def terms(x: Any, weight: Any) -> Any:
            code = jnp.clip(jnp.round((x - low) * inverse), *RANGE_4)
            return weight * code, weight * code * code, weight * code * x

        c, cc, cw = _sums(w, h, terms)
        scale = (counts * cw - first * c) * _inverse(counts * cc - c * c)
        minimum = (scale * c - first) / counts
        scale, minimum = jnp.where(minimum < 0, cw * _inverse(cc), scale), jnp.maximum(minimum, 0)
        error = squares + scale * (scale * cc - 2 * cw - 2 * minimum * c) + minimum * (minimum * counts + 2 * first)
        better = (error < best[0]) & (scale > 0)
        return tuple(jnp.where(better, new, old) for new, old in zip((error, scale, minimum), best, strict=True))

    plain = (span / 15, -low)
    found = jax.lax.fori_loop(0, len(STRETCHES_4), attempt, (jnp.full(span.shape, jnp.inf, np.float32), *plain))
    return plain, found[1:]


@jax.jit
def _search_6(w: Any, h: Any) -> Any:
    """Scales [n]: that of plain rounding, and the best."""
    largest = jnp.abs(w).max(0)
    (squares,) = _sums(w, h, lambda x, weight: (weight * x * x,))

    def attempt(index: Any, best: Any) -> Any:
        inverse = _inverse(largest) * (31 + jnp.asarray(STRETCHES_6)[index])

        def terms(x: Any, weight: Any) -> Any:
            code = jnp.clip(jnp.round(x * inverse), *RANGE_6)
            return weight * code * code, weight * code * x

        cc, cw = _sums(w, h, terms)
        scale = cw * _inverse(cc)
        error = squares - scale * cw
        better = error < best[0]
        return tuple(jnp.where(better, new, old) for new, old in zip((error, scale), best, strict=True))

    plain = largest / 31
    return plain, jax.lax.fori_loop(0, len(STRETCHES_6), attempt, (jnp.full(plain.shape, jnp.inf, np.float32), plain))[1]


@jax.jit
def _minimum_for(w: Any, h: Any, scale: Any, minimum: Any) -> Any:
    """The best minimum for the codes that these two give."""
    inverse = _inverse(scale)

    def terms(x: Any, weight: Any) -> Any:
        return weight, weight * x, weight * jnp.clip(jnp.round((x + minimum) * inverse), *RANGE_4)

    counts, first, c = _sums(w, h, terms)
    return jnp.maximum((scale * c - first) / counts, 0)


@partial(jax.jit, static_argnames=("least", "most"))
def _error(w: Any, h: Any, scale: Any, minimum: Any, least: int, most: int) -> Any:
    """The error of each group [n]."""
    inverse = _inverse(scale)

    def terms(x: Any, weight: Any) -> Any:
        code = jnp.clip(jnp.round((x + minimum) * inverse), least, most)
        return (weight * jnp.square(code * scale - minimum - x),)

    return _sums(w, h, terms)[0]


@partial(jax.jit, static_argnames=("least", "most"))
def _coded(w: Any, scale: Any, minimum: Any, least: int, most: int) -> Any:
    """Codes [group, n]; those below 0 wrap around."""
    return jnp.clip(jnp.round((w + minimum) * _inverse(scale)), least, most).astype(np.int8).astype(np.uint8)


def _sums(w: Any, h: Any, terms: Callable[[Any, Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Sums over the elements of each group [n], one element of all groups at a time: XLA would add up along the first axis number by
    number, several times as slowly."""

    def add(index: Any, sums: Any) -> Any:
        return tuple(total + more for total, more in zip(sums, terms(w[index], h[index]), strict=True))

    count = len(jax.eval_shape(terms, w[0], h[0]))
    return jax.lax.fori_loop(0, w.shape[0], add, (jnp.zeros(w.shape[1:], np.float32),) * count)


def _in_steps(numbers: Array, *, shape: tuple[int, int], step: np.dtype[Any]) -> tuple[Array, Array, Array]:
    """Numbers of groups [n], of which the first are those of [out, groups] = `shape`, in whole steps: codes uint8 [out, groups], the steps
    [out, groups / each], and what they stand for [n]."""
    out, groups = shape
    grouped = numbers[: out * groups].reshape(out, -1, groups_of_a_step(groups))
    steps = (grouped.max(-1) / LEVELS).astype(step)
    wide = steps.astype(np.float32)[..., None]
    codes = np.rint(grouped / np.where(wide > 0, wide, np.inf)).clip(0, LEVELS)
    stands_for = np.zeros_like(numbers)
    stands_for[: out * groups] = (codes * wide).reshape(-1)
    return codes.reshape(out, groups).astype(np.uint8), steps, stands_for


def _better(ours: tuple[Any, ...], plain: tuple[Any, ...]) -> list[Any]:
    """How groups are stored, and the numbers of groups, of whichever has the smaller error, for each step."""
    codes, steps = ours[1][:2]
    out, groups = codes.shape
    sums = [each[0][: out * groups].reshape(*steps.shape, -1).sum(-1) for each in (ours, plain)]
    better = sums[0] <= sums[1]  # [out, groups / each]
    of_groups = np.repeat(better, groups // better.shape[1], axis=1)
    stored = tuple(
        np.where(better if place % 2 else of_groups, mine, other) for place, (mine, other) in enumerate(zip(ours[1], plain[1], strict=True))
    )
    numbers = []
    for mine, other in zip(ours[2:], plain[2:], strict=True):
        numbers.append(np.zeros_like(mine))
        numbers[-1][: out * groups] = np.where(of_groups.reshape(-1), mine[: out * groups], other[: out * groups])
    return [stored, *numbers]


def _inverse(x: Any) -> Any:
    return jnp.where(x != 0, 1 / jnp.where(x != 0, x, 1), 0)


@jax.jit
def _round_group(left: Any, upper: Any, scale: Any, lowest: Any, top: Any) -> Any:
    """left [n, out]: the weights of a group; upper [n, n]: its part of the triangle; scale, lowest [out] -> codes [n, out] uint8, and the
    errors [n, out] that later groups make up for."""
    inverse = _inverse(scale)
    count = left.shape[0]

    def one(index: Any, state: Any) -> Any:
        left, codes, errors = state
        row = left[index]
        code = jnp.clip(jnp.round((row - lowest) * inverse), 0, top)
        error = (row - (code * scale + lowest)) / upper[index, index]
        later = jnp.where(jnp.arange(count) > index, upper[index], 0)
        return left - later[:, None] * error, codes.at[index].set(code), errors.at[index].set(error)

    _, codes, errors = jax.lax.fori_loop(0, count, one, (left, jnp.zeros_like(left), jnp.zeros_like(left)))
    return codes.astype(np.uint8), errors
