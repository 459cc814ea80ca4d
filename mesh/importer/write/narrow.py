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
SLICE_ELEMENTS = 1 << 19
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
    each = groups_of_a_step(groups)
    height = max(1, SLICE_ELEMENTS // depth)
    counts = _importance(importance, depth).reshape(groups, group).T[:, None, :]  # [group, 1, groups]
    codes = np.empty((out, depth), np.uint8)
    names = ("scale", "scale_step") if bits == 6 else ("scale", "scale_step", "minimum", "minimum_step")
    factors = {
        name: np.empty((out, groups // each), step) if name.endswith("step") else np.empty((out, groups), np.uint8) for name in names
    }
    run = partial(_fit_4 if bits == 4 else _fit_6, each=each, step=np.dtype(step))

    def part(start: int) -> None:
        rows = np.zeros((height, depth), np.float32)  # the last slice is filled up, so that one program serves all
        given = np.asarray(weight[start : start + height], np.float32)
        rows[: len(given)] = given
        found, numbers = run(np.ascontiguousarray(rows.reshape(-1, groups, group).transpose(2, 0, 1)), counts)
        stop = start + len(given)
        codes[start:stop] = np.asarray(found).transpose(1, 2, 0).reshape(height, depth)[: len(given)]
        for name, array in zip(names, numbers, strict=True):
            factors[name][start:stop] = np.asarray(array)[: len(given)]

    _each(part, range(0, out, height))
    return Narrow(bits, group, codes, **factors)


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


def _each(part: Callable[[int], None], starts: range) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(part, starts))


@partial(jax.jit, static_argnames=("each", "step"))
def _fit_4(w: Any, h: Any, *, each: int, step: Any) -> Any:
    """w [group, out, groups], h [group, 1, groups] -> codes [group, out, groups], (scale, its step, minimum, its step)."""
    low = jnp.minimum(w.min(0), 0)
    span = jnp.maximum(w.max(0) - low, 0)
    counts, first, squares = _sums(w, h, lambda x, weight: (weight, weight * x, weight * x * x))

    def coded(x: Any, minimum: Any, inverse: Any) -> Any:
        return jnp.clip(jnp.round((x + minimum) * inverse), 0, 15)

    def attempt(index: Any, best: Any) -> Any:
        """Codes for one range, and the scale and the minimum with the least error for these codes; no minimum is below 0."""
        inverse = _inverse(span) * (15 + jnp.asarray(STRETCHES_4)[index])

        def terms(x: Any, weight: Any) -> Any:
            code = coded(x, -low, inverse)
            return weight * code, weight * code * code, weight * code * x

        c, cc, cw = _sums(w, h, terms)
        scale = (counts * cw - first * c) * _inverse(counts * cc - c * c)
        minimum = (scale * c - first) / counts
        scale, minimum = jnp.where(minimum < 0, cw * _inverse(cc), scale), jnp.maximum(minimum, 0)
        error = squares + scale * (scale * cc - 2 * cw - 2 * minimum * c) + minimum * (minimum * counts + 2 * first)
        better = (error < best[0]) & (scale > 0)
        return tuple(jnp.where(better, new, old) for new, old in zip((error, scale, minimum), best, strict=True))

    start = (jnp.full(span.shape, jnp.inf, np.float32), span / 15, -low)
    _, scale, minimum = jax.lax.fori_loop(0, len(STRETCHES_4), attempt, start)

    def stored(scale: Any, minimum: Any, again: bool) -> Any:
        scale_code, scale_step, scale = _in_steps(scale, each, step)
        inverse = _inverse(scale)
        if again:
            (c,) = _sums(w, h, lambda x, weight: (weight * coded(x, minimum, inverse),))
            minimum = jnp.maximum((scale * c - first) / counts, 0)
        minimum_code, minimum_step, minimum = _in_steps(minimum, each, step)
        (error,) = _sums(w, h, lambda x, weight: (weight * jnp.square(coded(x, minimum, inverse) * scale - minimum - x),))
        return error, (scale, minimum), (scale_code, scale_step, minimum_code, minimum_step)

    (scale, minimum), factors = _better(stored(scale, minimum, True), stored(span / 15, -low, False), each)
    return coded(w, minimum, _inverse(scale)).astype(np.uint8), factors


@partial(jax.jit, static_argnames=("each", "step"))
def _fit_6(w: Any, h: Any, *, each: int, step: Any) -> Any:
    """w [group, out, groups], h [group, 1, groups] -> codes [group, out, groups], (scale, its step)."""
    largest = jnp.abs(w).max(0)
    (squares,) = _sums(w, h, lambda x, weight: (weight * x * x,))

    def coded(x: Any, inverse: Any) -> Any:
        return jnp.clip(jnp.round(x * inverse), -32, 31)

    def attempt(index: Any, best: Any) -> Any:
        inverse = _inverse(largest) * (31 + jnp.asarray(STRETCHES_6)[index])

        def terms(x: Any, weight: Any) -> Any:
            code = coded(x, inverse)
            return weight * code * code, weight * code * x

        cc, cw = _sums(w, h, terms)
        scale = cw * _inverse(cc)
        error = squares - scale * cw
        better = error < best[0]
        return tuple(jnp.where(better, new, old) for new, old in zip((error, scale), best, strict=True))

    start = (jnp.full(largest.shape, jnp.inf, np.float32), largest / 31)
    _, scale = jax.lax.fori_loop(0, len(STRETCHES_6), attempt, start)

    def stored(scale: Any) -> Any:
        scale_code, scale_step, scale = _in_steps(scale, each, step)
        inverse = _inverse(scale)
        (error,) = _sums(w, h, lambda x, weight: (weight * jnp.square(coded(x, inverse) * scale - x),))
        return error, (scale,), (scale_code, scale_step)

    (scale,), factors = _better(stored(scale), stored(largest / 31), each)
    return (coded(w, _inverse(scale)) + SIX_ZERO).astype(np.uint8), factors


def _sums(w: Any, h: Any, terms: Callable[[Any, Any], tuple[Any, ...]]) -> tuple[Any, ...]:
    """Sums over the elements of each group [out, groups], one element of all groups at a time: XLA would add up along the first axis number
    by number, ten times as slowly."""

    def add(index: Any, sums: Any) -> Any:
        return tuple(total + more for total, more in zip(sums, terms(w[index], jnp.broadcast_to(h[index], w.shape[1:])), strict=True))

    count = len(jax.eval_shape(terms, w[0], w[0]))
    return jax.lax.fori_loop(0, w.shape[0], add, (jnp.zeros(w.shape[1:], np.float32),) * count)  # type: ignore[no-any-return]


def _in_steps(numbers: Any, each: int, step: Any) -> tuple[Any, Any, Any]:
    """Numbers [out, groups] in whole steps: codes uint8 [out, groups], the steps [out, groups / each], and what they stand for."""
    out, groups = numbers.shape
    grouped = numbers.reshape(out, groups // each, each)
    steps = (grouped.max(-1) / LEVELS).astype(step)
    wide = steps.astype(np.float32)[..., None]
    codes = jnp.clip(jnp.round(grouped * _inverse(wide)), 0, LEVELS)
    return codes.reshape(out, groups).astype(np.uint8), steps, (codes * wide).reshape(out, groups)


def _better(ours: Any, plain: Any, each: int) -> Any:
    """The numbers of groups and how they are stored, of whichever has the smaller error, for each step."""

    def of_steps(array: Any) -> Any:
        return array.reshape(array.shape[0], -1, each).sum(-1)

    better = of_steps(ours[0]) <= of_steps(plain[0])  # [out, groups / each]
    groups = jnp.repeat(better, each, axis=1)

    def choice(mine: Any, other: Any) -> Any:
        return jnp.where(better if mine.shape == better.shape else groups, mine, other)

    return tuple(tuple(map(choice, mine, other)) for mine, other in zip(ours[1:], plain[1:], strict=True))


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
