"""The compiled programs of a stage: what is compiled for which bucket, and running a step through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby
from typing import Any

import jax
import numpy as np

from mesh.runtime import step
from mesh.runtime.loading import Block
from mesh.runtime.sampling import RowTable, Sampled
from mesh.runtime.step import LayerCache

__all__ = ["Bucket", "Compiled", "Group", "Programs", "to_host"]


Compiled = dict[tuple[Any, ...], Any]
"""(kind, bucket, signature, shape of the state) -> executable."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """One shape of a step: `size` rows of a decode wave or tokens of a prefill chunk, reading `length` cache slots."""

    prefill: bool
    size: int
    length: int

    @property
    def tokens_shape(self) -> tuple[int, int]:
        return (1, self.size) if self.prefill else (self.size, 1)

    def __str__(self) -> str:
        return f"{'prefill' if self.prefill else 'decode'} {self.size} x {self.length}"


@dataclass(frozen=True)
class Group:
    """Consecutive layers of one program."""

    blocks: tuple[Block, ...]
    first: int  # index of its first layer within the stage

    @cached_property
    def signature(self) -> tuple[str, ...]:
        return tuple(block.signature for block in self.blocks)


class Programs:
    """Compiles on demand and keeps what it compiled. Groups of equal signature and shapes share a program, and stages of one
    process do that are given the same `compiled`."""

    def __init__(self, embed: Block | None, layers: Sequence[Block], head: Block | None, compiled: Compiled | None = None) -> None:
        self.embed = embed
        self.head = head
        self.groups = list(_groups(layers))
        self._compiled: Compiled = {} if compiled is None else compiled
        self._weights = [tuple(block.weights for block in group.blocks) for group in self.groups]

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._compiled)

    def run(
        self,
        bucket: Bucket,
        caches: list[LayerCache],
        history: Any,
        hidden: np.ndarray | None,
        tokens: np.ndarray,
        positions: np.ndarray,
        writes: np.ndarray,
        *,
        row: int = 0,
        count: int = 0,
        floats: np.ndarray,
        ints: np.ndarray,
    ) -> tuple[Any, Any]:
        """One step. `caches` is updated in place; returns (history, hidden [B, T, D] or Sampled)."""
        tokens_, positions_, writes_, row_ = jax.device_put((tokens, positions, writes, np.int32(row)))
        if self.embed is not None:
            x = self._get("embed", bucket, self.embed)(self.embed.weights, tokens_, positions_)
        else:
            x = jax.device_put(hidden)
        for group, weights in zip(self.groups, self._weights, strict=True):
            stop = group.first + len(group.blocks)
            run = self._get("layers", bucket, group, caches[group.first : stop], x)
            caches[group.first : stop], x = run(weights, tuple(caches[group.first : stop]), x, positions_, writes_, row_)
        if self.head is None:
            return history, x
        run = self._get("head", bucket, self.head, history, x)
        if bucket.prefill:
            return run(self.head.weights, history, x, tokens_, positions_, row_, np.int32(count), floats, ints)
        return run(self.head.weights, history, x, tokens_, positions_, writes_, floats, ints)

    def compile(self, bucket: Bucket, caches: Sequence[LayerCache], history: Any, hidden_size: int, dtype: Any) -> None:
        """Compile everything a step of this shape runs."""
        x = jax.ShapeDtypeStruct((*bucket.tokens_shape, hidden_size), dtype)
        if self.embed is not None:
            self._get("embed", bucket, self.embed)
        for group in self.groups:
            self._get("layers", bucket, group, caches[group.first : group.first + len(group.blocks)], x)
        if self.head is not None:
            self._get("head", bucket, self.head, history, x)

    def _get(self, kind: str, bucket: Bucket, what: Any, state: Any = None, x: Any = None) -> Any:
        key = (kind, bucket, what.signature, None if state is None else jax.tree.leaves(state)[0].shape)
        found = self._compiled.get(key)
        if found is None:
            found = self._compiled[key] = _COMPILE[kind](bucket, what, state, x)
        return found


def _groups(layers: Sequence[Block]) -> Iterator[Group]:
    """Runs of equal layers cut evenly; unlike neighbours (a pattern of windows, say) together up to the same number."""
    runs = [list(run) for _, run in groupby(layers, key=lambda block: block.signature)]
    first = 0
    if max(map(len, runs)) < step.GROUP_LAYERS:
        runs = [list(layers)]
    for run in runs:
        start = 0
        for size in step.group_sizes(len(run)):
            yield Group(tuple(run[start : start + size]), first)
            start += size
            first += size


def _shape(dims: tuple[int, ...], dtype: Any = np.int32) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)


def _vectors(bucket: Bucket) -> tuple[Any, Any]:
    """(tokens or positions [B, T], writes [B])"""
    return _shape(bucket.tokens_shape), _shape(bucket.tokens_shape[:1])


def _compile_embed(bucket: Bucket, block: Block, state: Any, x: Any) -> Any:
    tokens, _ = _vectors(bucket)
    return jax.jit(partial(step.embed, block.lowered)).lower(block.weights, tokens, tokens).compile()


def _compile_layers(bucket: Bucket, group: Group, caches: Sequence[LayerCache], x: Any) -> Any:
    tokens, writes = _vectors(bucket)
    program = partial(step.layers, tuple(b.lowered for b in group.blocks), prefill=bucket.prefill, length=bucket.length)
    weights = tuple(block.weights for block in group.blocks)
    return jax.jit(program, donate_argnums=1).lower(weights, tuple(caches), x, tokens, writes, _shape(())).compile()


def _compile_head(bucket: Bucket, block: Block, history: Any, x: Any) -> Any:
    tokens, writes = _vectors(bucket)
    rows = bucket.tokens_shape[0]
    table = (_shape((rows, len(RowTable.FLOATS)), np.float32), _shape((rows, len(RowTable.INTS))))
    program: Callable[..., Any] = step.head_prefill if bucket.prefill else step.head_decode
    scalars = (_shape(()), _shape(())) if bucket.prefill else (writes,)
    jitted = jax.jit(partial(program, block.lowered, length=bucket.length), donate_argnums=1)
    return jitted.lower(block.weights, history, x, tokens, tokens, *scalars, *table).compile()


_COMPILE: dict[str, Callable[..., Any]] = {"embed": _compile_embed, "layers": _compile_layers, "head": _compile_head}


def to_host(sampled: Any) -> Sampled:
    """What was sampled, as numpy; waits for it."""
    return Sampled(*(np.asarray(part) for part in sampled))
