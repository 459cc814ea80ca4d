"""The two programs a stage runs, as pure functions of its weights and state.

    decode     one token for each of the rows 0 .. rows-1 of the wave
    prefill    up to `chunk` tokens of one row

A program runs the stage's blocks in order: embed if the stage is the first, its layers, and, if it is the last, the head and
the sampler. State is donated: the caches are updated where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mesh.lowering import Lowered
from mesh.runtime.cache import CacheView
from mesh.runtime.sampling import Sampled, sample

__all__ = ["LayerCache", "Program", "State"]


class LayerCache(NamedTuple):
    """key [R, Hkv, S, Dk] and value [R, Hkv, S, Dv] of one layer."""

    key: Any
    value: Any


class State(NamedTuple):
    """What a stage keeps between steps: a cache a layer, and on the last stage the input tokens by position [R, S] int32."""

    caches: tuple[LayerCache, ...]
    history: Any


@dataclass(frozen=True)
class Program:
    """The blocks of a stage as lowered graphs; hashable by identity, so it can be a static argument."""

    embed: Lowered | None
    layers: tuple[Lowered, ...]
    head: Lowered | None

    def decode(
        self,
        weights: Sequence[Mapping[str, Any]],
        state: State,
        x: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        writes: jax.Array,
        floats: jax.Array,
        ints: jax.Array,
        *,
        length: int,
    ) -> tuple[State, jax.Array | Sampled]:
        """One token a row. x [B, D] hidden (ignored by a first stage), tokens, positions, writes [B] int32; floats, ints are rows of
        a RowTable. `length` slots are read. Returns hidden [B, D], or what was sampled."""
        rows = positions.shape[0]
        with jax.named_scope("decode"):
            hidden, caches = self._blocks(
                weights, state.caches, x[:, None], tokens[:, None], positions[:, None], writes, row=None, rows=rows, length=length
            )
        if self.head is None:
            return State(caches, state.history), hidden[:, 0]
        history = state.history.at[jnp.arange(rows), writes].set(tokens, mode="promise_in_bounds", unique_indices=True)
        logits = self._logits(weights, hidden)
        seen = jax.lax.slice(history, (0, 0), (rows, length))
        return State(caches, history), sample(logits, floats, ints, seen, positions)

    def prefill(
        self,
        weights: Sequence[Mapping[str, Any]],
        state: State,
        x: jax.Array,
        tokens: jax.Array,
        row: jax.Array,
        start: jax.Array,
        count: jax.Array,
        floats: jax.Array,
        ints: jax.Array,
        *,
        length: int,
    ) -> tuple[State, jax.Array | Sampled]:
        """`count` tokens of `row` at positions start .. start + count - 1, padded to the chunk. x [T, D], tokens [T]; floats [1, 6],
        ints [1, 5]. Returns hidden [T, D], or what was sampled after the last token (arrays of one)."""
        positions = start + jnp.arange(tokens.shape[0], dtype=jnp.int32)
        with jax.named_scope("prefill"):
            hidden, caches = self._blocks(
                weights, state.caches, x[None], tokens[None], positions[None], start[None], row=row, rows=1, length=length
            )
        if self.head is None:
            return State(caches, state.history), hidden[0]
        history = jax.lax.dynamic_update_slice(state.history, tokens[None], (row, start))
        last = jax.lax.dynamic_slice_in_dim(hidden, count - 1, 1, axis=1)  # [1, 1, D]
        seen = jax.lax.dynamic_slice(history, (row, 0), (1, length))
        return State(caches, history), sample(self._logits(weights, last), floats, ints, seen, (start + count - 1)[None])

    def _blocks(
        self,
        weights: Sequence[Mapping[str, Any]],
        caches: tuple[LayerCache, ...],
        hidden: jax.Array,
        tokens: jax.Array,
        positions: jax.Array,
        writes: jax.Array,
        *,
        row: Any,
        rows: int,
        length: int,
    ) -> tuple[jax.Array, tuple[LayerCache, ...]]:
        """Embed and layers: hidden [B, T, D], tokens and positions [B, T], writes [B] -> hidden [B, T, D] and the caches."""
        given: dict[str, Any] = {"input_ids": tokens, "position_ids": positions, "write_indices": writes}
        index = 0
        if self.embed is not None:
            hidden = _run(self.embed, weights[0], given)["hidden_out"]
            index = 1
        updated = []
        for lowered, cache in zip(self.layers, caches, strict=True):
            given["hidden_in"] = hidden
            given["past_key"] = CacheView(cache.key, row, rows, length)
            given["past_value"] = CacheView(cache.value, row, rows, length)
            out = _run(lowered, weights[index], given)
            hidden = out["hidden_out"]
            updated.append(LayerCache(out["present_key"].array, out["present_value"].array))
            index += 1
        return hidden, tuple(updated)

    def _logits(self, weights: Sequence[Mapping[str, Any]], hidden: jax.Array) -> jax.Array:
        """hidden [B, 1, D] -> [B, V]."""
        assert self.head is not None
        with jax.named_scope("head"):
            return _run(self.head, weights[-1], {"hidden_in": hidden})["logits"][:, 0]


def _run(lowered: Lowered, weights: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    return lowered(weights, {name: given[name] for name in lowered.inputs})
