"""The programs a stage runs, as pure functions of weights, state and a step's input.

    embed      token ids -> hidden state                            first stage
    layers     a few consecutive layers, their caches updated       every stage, as often as its layers need
    head       hidden state -> logits, the likeliest tokens         last stage
    chosen     logits, masks of grammars -> likeliest allowed tokens last stage, if some row has a mask and none asks for more (shaping.py)
    shaped     logits -> logits with biases and masks of grammars   last stage, if some row has either and some row asks for more
    sampled    logits -> sampled tokens                             last stage, if some row asks for more than the likeliest token
    states     hidden state -> the same after the final norm        last stage, if some row asks for that and no token
    copied     caches -> the same, a row's beginning in another row every stage, if a session begins with another one's tokens

Each takes either a decode step (one token for each of B rows of a decode batch) or a prefill chunk (T tokens of one row), or in their
place a packed step: N tokens of any rows, flat, as if they were N rows of one token. See docs/adr/0015.
Layers run a few at a time, not all at once. Groups of equal layers share one compiled program, so compile time does not grow with
depth, and a few calls take little of a step's time. State is donated, so that caches are updated in place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mesh.lowering import Lowered
from mesh.lowering.fuse import COUNT
from mesh.runtime.cache import CacheView, PackedView
from mesh.runtime.sampling import Sampled, argmax, sample

__all__ = [
    "LayerCache",
    "copied",
    "embed",
    "group_sizes",
    "head",
    "last_of_chunk",
    "layer",
    "layers",
    "packed_head",
    "packed_layer",
    "sampled",
    "states",
]

GROUP_LAYERS = 6
"""The most layers in one program."""


class LayerCache(NamedTuple):
    """key [R, Hkv, S, Dk] and value [R, Hkv, S, Dv] of one layer, None where it does not attend, and its states, each [P, ...] float32 at
    P places."""

    key: Any
    value: Any
    states: tuple[Any, ...] = ()


def group_sizes(count: int) -> list[int]:
    """How many layers go into each program for a run of `count` equal layers: as even as possible, so that few programs differ."""
    groups = -(-count // GROUP_LAYERS)
    return [count // groups + (1 if index < count % groups else 0) for index in range(groups)]


def embed(block: Lowered, weights: Mapping[str, Any], tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """tokens, positions [B, T] -> hidden [B, T, D]."""
    with jax.named_scope("embed"):
        return _run(block, weights, {"input_ids": tokens, "position_ids": positions})["hidden_out"]


def layer(
    block: Lowered,
    weights: Mapping[str, Any],
    cache: LayerCache,
    hidden: jax.Array,
    positions: jax.Array,
    writes: jax.Array,
    row: jax.Array,
    places: jax.Array | None = None,
    *,
    length: int,
) -> tuple[LayerCache, jax.Array]:
    """hidden [B, T, D], positions [B, T], writes [B] -> the cache and hidden [B, T, D].

    The rows are `row` .. row + B - 1; B or T is 1. At most `length` cache positions are read. `places` [2, B]: where the states of the
    rows are read, and where they are written.
    """
    given: dict[str, Any] = {"position_ids": positions, "write_indices": writes, "hidden_in": hidden, COUNT: jnp.int32(hidden.shape[0])}
    used = jnp.minimum(jnp.max(positions) + 1, length)
    for which, array in (("past_key", cache.key), ("past_value", cache.value)):
        if array is not None:
            given[which] = CacheView(array, row, used, hidden.shape[0], length)
    for number, array in enumerate(cache.states):
        assert places is not None
        # The barrier has the states read before others are written, so that the array is updated in place.
        given[f"past_state_{number}"] = jax.lax.optimization_barrier(array[places[0]])
    out = _run(block, weights, given)
    key = None if cache.key is None else out["present_key"].array
    value = None if cache.value is None else out["present_value"].array
    return LayerCache(key, value, _written(cache.states, places, out)), out["hidden_out"]


def _written(states: Sequence[jax.Array], places: jax.Array | None, out: Mapping[str, jax.Array]) -> tuple[jax.Array, ...]:
    """The states of a layer with those of this step at `places[1]`."""
    if places is None:
        return ()
    return tuple(array.at[places[1]].set(out[f"present_state_{n}"], mode="promise_in_bounds") for n, array in enumerate(states))


def packed_layer(
    block: Lowered,
    weights: Mapping[str, Any],
    cache: LayerCache,
    hidden: jax.Array,
    positions: jax.Array,
    rows: jax.Array,
    count: jax.Array,
    *,
    length: int,
) -> tuple[LayerCache, jax.Array]:
    """hidden [N, 1, D], positions [N, 1], rows [N], of which `count` are real -> the cache and hidden [N, 1, D]. Consecutive positions of
    a row are next to each other."""
    given: dict[str, Any] = {"position_ids": positions, "write_indices": positions[:, 0], "hidden_in": hidden, COUNT: count}
    for which, array in (("past_key", cache.key), ("past_value", cache.value)):
        given[which] = PackedView(array, rows, count, length)
    out = _run(block, weights, given)
    return LayerCache(out["present_key"].array, out["present_value"].array), out["hidden_out"]


def layers(
    runs: Sequence[Callable[..., tuple[LayerCache, jax.Array]]],
    weights: Sequence[Mapping[str, Any]],
    caches: Sequence[LayerCache],
    hidden: jax.Array,
    positions: jax.Array,
    *where: jax.Array,
) -> tuple[tuple[LayerCache, ...], jax.Array]:
    """`layer` of each block, one after the other; `where` are its other arguments."""
    updated = []
    for index, (run, own, cache) in enumerate(zip(runs, weights, caches, strict=True)):
        with jax.named_scope(f"layer{index}"):
            cache, hidden = run(own, cache, hidden, positions, *where)
        updated.append(cache)
    return tuple(updated), hidden


def head(
    block: Lowered,
    weights: Mapping[str, Any],
    history: jax.Array,
    hidden: jax.Array,
    tokens: jax.Array,
    writes: jax.Array,
    row: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """hidden [B, 1, D]; tokens [B, 1]; writes [B]; history [R, S] of input tokens by position -> the history with these, logits
    [B, V] as float32 and the likeliest token of each row [B]."""
    rows = row + jnp.arange(writes.shape[0])
    history = history.at[rows, writes].set(tokens[:, 0], mode="promise_in_bounds", unique_indices=True)
    logits = _logits(block, weights, hidden)
    return history, logits, argmax(logits)


def sampled(
    logits: jax.Array,
    history: jax.Array,
    positions: jax.Array,
    row: jax.Array,
    floats: jax.Array,
    ints: jax.Array,
    raw: jax.Array,
    *,
    length: int,
) -> Sampled:
    """logits [B, V] of `head`, shaped where a row asks for it, and `raw` as they were; the history with this step's tokens; positions
    [B, 1]; floats, ints of a RowTable -> what was sampled for each row. Penalties look back at `length` tokens."""
    seen = jax.lax.dynamic_slice(history, (row, 0), (logits.shape[0], length))
    return sample(logits, floats, ints, seen, positions[:, 0], raw)


def packed_head(block: Lowered, weights: Mapping[str, Any], hidden: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """hidden [K, 1, D], of which `count` are real -> logits [K, V] as float32 and the likeliest token of each [K]."""
    with jax.named_scope("head"):
        logits = _run(block, weights, {"hidden_in": hidden, COUNT: count})["logits"][:, 0].astype(jnp.float32)
    return logits, argmax(logits)


def states(block: Lowered, weights: Mapping[str, Any], hidden: jax.Array) -> jax.Array:
    """hidden [1, 1, D] -> the state after the final norm [E] as float32; E is D, but for models that project it."""
    with jax.named_scope("states"):
        return _run(block, weights, {"hidden_in": hidden})[block.outputs[0]].reshape(-1).astype(jnp.float32)


def last_of_chunk(
    history: jax.Array, hidden: jax.Array, tokens: jax.Array, positions: jax.Array, row: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """hidden [1, T, D], tokens, positions [1, T] of which `count` are real -> the history with them, and what `head` takes of the last
    one: hidden [1, 1, D], token and position [1, 1], write [1]."""
    history = jax.lax.dynamic_update_slice(history, tokens, (row, positions[0, 0]))
    last, token, position = (jax.lax.dynamic_slice_in_dim(array, count - 1, 1, axis=1) for array in (hidden, tokens, positions))
    return history, last, token, position, position[0]


def copied(array: jax.Array, source: jax.Array, target: jax.Array, *, positions: int) -> jax.Array:
    """array [R, ..., S, D], or a history [R, S] -> the same, with the first `positions` of row `source` in row `target` too."""
    axis = 1 if array.ndim == 2 else array.ndim - 2
    zeros = (0,) * (array.ndim - 1)
    shape = (1, *array.shape[1:axis], positions, *array.shape[axis + 1 :])
    # The barrier has the part read before it is written, so that the array is updated in place.
    part = jax.lax.optimization_barrier(jax.lax.dynamic_slice(array, (source, *zeros), shape))
    return jax.lax.dynamic_update_slice(array, part, (target, *zeros))


def _logits(block: Lowered, weights: Mapping[str, Any], hidden: jax.Array) -> jax.Array:
    """hidden [B, 1, D] -> [B, V]."""
    with jax.named_scope("head"):
        return _run(block, weights, {"hidden_in": hidden})["logits"][:, 0].astype(jnp.float32)


def _run(lowered: Lowered, weights: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return lowered(weights, {name: given[name] for name in lowered.inputs})
