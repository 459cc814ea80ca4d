"""Gathers, scatters, and the ops that find or sort."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.lowering.op_helpers import Array, array_namespace, int64, is_float, positive_axis
from mesh.lowering.registry import register
from mesh.lowering.static import is_traced


def _wrapped(xp: Any, indices: Array, size: int) -> Array:
    """Indices counted from the front. ONNX forbids others than -size..size-1; compiled code clamps them."""
    return xp.where(indices < 0, indices + size, indices)


@register(numpy=True, static_if_known=(1,))
def Gather(data: Array, indices: Array, *, axis: int = 0) -> Array:
    axis = positive_axis(axis, data.ndim)
    if not is_traced(indices):
        if indices.ndim == 0:  # one slice, no gather
            return data[(slice(None),) * axis + (int(indices),)]
        if not is_traced(data):
            return np.take(data, indices, axis=axis)
        indices = jnp.asarray(np.where(indices < 0, indices + data.shape[axis], indices).astype(np.int32))
        return jnp.take(data, indices, axis=axis, mode="clip")
    return jnp.take(jnp.asarray(data), _wrapped(jnp, indices, data.shape[axis]), axis=axis, mode="clip")


@register(numpy=True)
def GatherElements(data: Array, indices: Array, *, axis: int = 0) -> Array:
    xp = array_namespace(data, indices)
    axis = positive_axis(axis, data.ndim)
    data = data[tuple(slice(None) if i == axis else slice(0, size) for i, size in enumerate(indices.shape))]
    indices = _wrapped(xp, indices, data.shape[axis])
    if xp is np:
        return np.take_along_axis(data, indices, axis)
    return jnp.take_along_axis(data, indices, axis, mode="clip")


@register(numpy=True)
def GatherND(data: Array, indices: Array, *, batch_dims: int = 0) -> Array:
    xp = array_namespace(data, indices)
    lead = tuple(
        np.arange(size).reshape([-1 if i == j else 1 for j in range(indices.ndim - 1)]) for i, size in enumerate(data.shape[:batch_dims])
    )
    index = tuple(_wrapped(xp, indices[..., i], data.shape[batch_dims + i]) for i in range(indices.shape[-1]))
    if xp is np:
        return data[lead + index]
    return data.at[lead + index].get(mode="clip")


def _scatter(data: Array, index: tuple[Array, ...], updates: Array, reduction: str) -> Array:
    target = data.at[index]
    operation = {"none": target.set, "add": target.add, "mul": target.multiply, "max": target.max, "min": target.min}[reduction]
    return operation(updates)


_REDUCTIONS = ("none", "add", "mul", "max", "min")


@register(allowed={"reduction": _REDUCTIONS})
def ScatterElements(data: Array, indices: Array, updates: Array, *, axis: int = 0, reduction: str = "none") -> Array:
    axis = positive_axis(axis, data.ndim)
    index: list[Array] = [np.arange(size).reshape([-1 if i == j else 1 for j in range(data.ndim)]) for i, size in enumerate(indices.shape)]
    index[axis] = _wrapped(jnp, indices, data.shape[axis])
    return _scatter(data, tuple(index), updates, reduction)


@register()
def Scatter(data: Array, indices: Array, updates: Array, *, axis: int = 0) -> Array:
    return ScatterElements(data, indices, updates, axis=axis)


@register(allowed={"reduction": _REDUCTIONS})
def ScatterND(data: Array, indices: Array, updates: Array, *, reduction: str = "none") -> Array:
    index = tuple(_wrapped(jnp, indices[..., i], data.shape[i]) for i in range(indices.shape[-1]))
    return _scatter(data, index, updates, reduction)


@register(allowed={"mode": ("linear", "circular")})
def TensorScatter(past_cache: Array, update: Array, write_indices: Array | None = None, *, mode: str = "linear", axis: int = -2) -> Array:
    """Each row's update is written along `axis` from that row's index on.

    past_cache [B, ..., S, ...], update [B, ..., T, ...], write_indices [B]. Linear: a start beyond S - T is ONNX's error; compiled
    code clamps it. Written so that XLA updates a donated cache in place.
    """
    axis = positive_axis(axis, past_cache.ndim)
    size, count = past_cache.shape[axis], update.shape[axis]
    update = update.astype(past_cache.dtype)
    if write_indices is None:
        write_indices = jnp.zeros(past_cache.shape[0], int64(jnp))
    if mode == "circular":
        slots = (write_indices[:, None] + np.arange(count)) % size  # [B, T]
        rows = np.arange(past_cache.shape[0])[:, None]
        moved = jnp.moveaxis(past_cache, axis, 1).at[rows, slots].set(jnp.moveaxis(update, axis, 1))
        return jnp.moveaxis(moved, 1, axis)
    if past_cache.shape[0] == 1:
        return jax.lax.dynamic_update_slice_in_dim(past_cache, update, write_indices[0], axis)

    def write(row: Array, new: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(row, new, start, axis - 1)

    return jax.vmap(write)(past_cache, update, write_indices)


@register(numpy=True, static=(1,))
def OneHot(indices: Array, depth: Array, values: Array, *, axis: int = -1) -> Array:
    """`values` = [off, on]. Indices outside -depth..depth-1 have no on value."""
    xp = array_namespace(indices, values)
    count = int(np.asarray(depth).reshape(()))
    axis = axis + indices.ndim + 1 if axis < 0 else axis
    indices = xp.expand_dims(xp.where(indices < 0, indices + count, indices), axis)
    classes = np.arange(count).reshape([-1 if i == axis else 1 for i in range(indices.ndim)])
    return xp.where(indices == classes.astype(indices.dtype), values[1], values[0])


@register(numpy=True, static=(0,))
def NonZero(X: Array) -> Array:
    return np.stack(np.nonzero(X)).astype(np.int64) if X.ndim else np.zeros((0, int(bool(X))), np.int64)


@register(numpy=True, static=(1,))
def Compress(input: Array, condition: Array, *, axis: int | None = None) -> Array:
    kept = np.nonzero(condition)[0]
    if axis is None:
        return array_namespace(input).take(input.reshape(-1), kept, axis=0)
    return array_namespace(input).take(input, kept, axis=axis)


@register(numpy=True, static=(0,))
def Unique(X: Array, *, axis: int | None = None, sorted: int = 1) -> tuple[Array, ...]:
    values, first, inverse, counts = np.unique(X, return_index=True, return_inverse=True, return_counts=True, axis=axis)
    if not sorted:  # in order of first appearance
        order = np.argsort(first)
        rank = np.argsort(order)
        values = np.take(values, order, axis=axis or 0)
        first, inverse, counts = first[order], rank[inverse], counts[order]
    return values, first.astype(np.int64), inverse.reshape(-1).astype(np.int64), counts.astype(np.int64)


def _top_k(X: Array, k: int, axis: int, largest: bool) -> tuple[Array, Array]:
    axis = positive_axis(axis, X.ndim)
    if largest and is_float(X.dtype):
        values, indices = jax.lax.top_k(jnp.moveaxis(X, axis, -1), k)
        return jnp.moveaxis(values, -1, axis), jnp.moveaxis(indices, -1, axis).astype(int64(jnp))
    order = jnp.argsort(X, axis=axis, stable=True, descending=largest)
    indices = jax.lax.slice_in_dim(order, 0, k, axis=axis)
    return jnp.take_along_axis(X, indices, axis), indices.astype(int64(jnp))


@register(since=10, static=(1,))
def TopK(X: Array, K: Array, *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Array, Array]:
    """Equal values: the lower index first. Always sorted."""
    return _top_k(X, int(np.asarray(K).reshape(())), axis, bool(largest))


@register("TopK")
def TopK_1(X: Array, *, axis: int = -1, k: int) -> tuple[Array, Array]:
    return _top_k(X, k, axis, True)
