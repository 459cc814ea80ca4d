"""The compiled programs of a stage: what is compiled for which bucket, and running a step through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import numpy as np

from mesh.runtime import step
from mesh.runtime.cache import SLACK
from mesh.runtime.loading import Block
from mesh.runtime.sampling import RowTable, Sampled
from mesh.runtime.step import LayerCache

__all__ = ["Bucket", "Compiled", "Group", "Programs", "to_host"]


_HEAD_LENGTH = 512

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


class _Step(NamedTuple):
    """The executables of one bucket: of the embedding, of each group of layers, of the head, after what makes one token of a chunk."""

    embed: Any
    layers: tuple[Any, ...]
    last: Any
    head: Any


class Programs:
    """Compiles on demand and keeps what it compiled. Groups of equal signature and shapes share a program, and stages of one
    process do that are given the same `compiled`. `hidden`: size and type of the hidden state.

    `own` of `layers` (None: all) run as groups. The others are held so that `serve` can take them in: those, and what is left of a
    group that `serve` cuts, run layer by layer, and that program is compiled with the rest."""

    def __init__(
        self,
        embed: Block | None,
        layers: Sequence[Block],
        head: Block | None,
        *,
        hidden: tuple[int, Any],
        own: slice | None = None,
        compiled: Compiled | None = None,
    ) -> None:
        self._embed, self._head = embed, head
        self._layers = tuple(layers)
        self._own = own or slice(0, len(layers))
        self._grouped = [replace(group, first=group.first + self._own.start) for group in _groups(self._layers[self._own])]
        alone = {block.signature: Group((block,), index) for index, block in enumerate(self._layers)}
        self._alone = tuple(alone.values()) if len(self._layers) > self._own.stop - self._own.start else ()
        self._hidden = hidden
        self._compiled: Compiled = {} if compiled is None else compiled
        self._steps: dict[Bucket, _Step] = {}
        self._table: tuple[bytes, Any] = (b"", None)
        # Flat, as a call would otherwise flatten them in every step.
        self._embed_weights = tuple(jax.tree.leaves(embed.weights)) if embed is not None else ()
        self._head_weights = tuple(jax.tree.leaves(head.weights)) if head is not None else ()

        self.serve(self._own, embed=embed is not None, head=head is not None)

    def serve(self, own: slice, *, embed: bool, head: bool) -> None:
        """Run `own` of the layers from now on, with the embedding and the head where asked and there."""
        self.embed = self._embed if embed else None
        self.head = self._head if head else None
        kept = {group.first: group for group in self._grouped if own.start <= group.first and group.first + len(group.blocks) <= own.stop}
        self.groups: list[Group] = []
        at = own.start
        while at < own.stop:
            self.groups.append(kept.get(at) or Group((self._layers[at],), at))
            at += len(self.groups[-1].blocks)
        self._weights = [tuple(jax.tree.leaves([block.weights for block in group.blocks])) for group in self.groups]
        self._steps.clear()

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
        step = self._steps.get(bucket) or self.compile(bucket, caches, history)
        tokens_, positions_, writes_, row_ = jax.device_put((tokens, positions, writes, np.int32(row)))
        if self.embed is not None:
            x = step.embed(self._embed_weights, tokens_, positions_)
        else:
            x = jax.device_put(hidden)
        for run, group, weights in zip(step.layers, self.groups, self._weights, strict=True):
            stop = group.first + len(group.blocks)
            caches[group.first : stop], x = run(weights, tuple(caches[group.first : stop]), x, positions_, writes_, row_)
        if self.head is None:
            return history, x
        table = self._on_device(floats, ints)
        if bucket.prefill:
            history, x, tokens_, positions_, writes_ = step.last(history, x, tokens_, positions_, row_, np.int32(count))
        return step.head(self._head_weights, history, x, tokens_, positions_, writes_, row_, *table)

    def compile(self, bucket: Bucket, caches: Sequence[LayerCache], history: Any) -> _Step:
        """Everything a step of this shape runs, now or after another `serve`."""
        size, dtype = self._hidden
        x = jax.ShapeDtypeStruct((*bucket.tokens_shape, size), dtype)
        for group in self._alone:
            self._get("layers", bucket, group, caches[group.first : group.first + 1], x)
        if self._alone and self._embed is not None:
            self._get("embed", bucket, self._embed)
        if self._alone and self._head is not None:
            self._get("head", bucket, self._head, history, x)
            if bucket.prefill:
                self._get("last", bucket, self._head, history, x)
        self._steps[bucket] = step = _Step(
            None if self.embed is None else self._get("embed", bucket, self.embed),
            tuple(self._get("layers", bucket, group, caches[group.first : group.first + len(group.blocks)], x) for group in self.groups),
            self._get("last", bucket, self.head, history, x) if self.head is not None and bucket.prefill else None,
            None if self.head is None else self._get("head", bucket, self.head, history, x),
        )
        return step

    def _on_device(self, floats: np.ndarray, ints: np.ndarray) -> Any:
        """The rows' parameters; sent anew only when they differ from the last step's."""
        key = floats.tobytes() + ints.tobytes()
        if self._table[0] != key:
            self._table = (key, jax.device_put((floats, ints)))
        return self._table[1]

    def _get(self, kind: str, bucket: Bucket, what: Any, state: Any = None, x: Any = None) -> Any:
        bucket = _relevant(kind, bucket, state)
        key = (kind, bucket, what.signature, None if state is None else jax.tree.leaves(state)[0].shape)
        found = self._compiled.get(key)
        if found is None:
            found = self._compiled[key] = _COMPILE[kind](bucket, what, state, x)
        return found


def _relevant(kind: str, bucket: Bucket, state: Any) -> Bucket:
    """What of a bucket makes a difference to a program, so that fewer are compiled. The head runs for one token a row, and of the
    length it uses only how many tokens it looks back at."""
    if kind in ("embed", "last"):
        return replace(bucket, length=0)
    if kind == "head":
        return Bucket(False, 1 if bucket.prefill else bucket.size, max(bucket.length, min(_HEAD_LENGTH, state.shape[1] - SLACK)))
    return bucket


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


def _flat(program: Callable[..., Any], weights: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(the program taking its weights as a flat tuple, that tuple)"""
    leaves, tree = jax.tree.flatten(weights)
    return lambda flat, *args: program(jax.tree.unflatten(tree, flat), *args), tuple(leaves)


def _compile_embed(bucket: Bucket, block: Block, state: Any, x: Any) -> Any:
    tokens, _ = _vectors(bucket)
    program, weights = _flat(partial(step.embed, block.lowered), block.weights)
    return _compile(jax.jit(program), weights, tokens, tokens)


def _compile_layers(bucket: Bucket, group: Group, caches: Sequence[LayerCache], x: Any) -> Any:
    tokens, writes = _vectors(bucket)
    run = partial(step.layers, tuple(b.lowered for b in group.blocks), length=bucket.length)
    program, weights = _flat(run, [block.weights for block in group.blocks])
    return _compile(jax.jit(program, donate_argnums=1), weights, tuple(caches), x, tokens, writes, _shape(()))


def _compile_last(bucket: Bucket, block: Block, history: Any, x: Any) -> Any:
    tokens, _ = _vectors(bucket)
    return _compile(jax.jit(step.last_of_chunk, donate_argnums=0), history, x, tokens, tokens, _shape(()), _shape(()))


def _compile_head(bucket: Bucket, block: Block, history: Any, x: Any) -> Any:
    tokens, writes = _vectors(bucket)
    table = (_shape((bucket.size, len(RowTable.FLOATS)), np.float32), _shape((bucket.size, len(RowTable.INTS))))
    program, weights = _flat(partial(step.head, block.lowered, length=bucket.length), block.weights)
    hidden = _shape((bucket.size, 1, x.shape[-1]), x.dtype)
    return _compile(jax.jit(program, donate_argnums=1), weights, history, hidden, tokens, tokens, writes, _shape(()), *table)


def _compile(jitted: Any, *args: Any) -> Any:
    """On a CPU a reduction in two steps, as XLA would make every one, is two operations where one is as fast."""
    options = {"xla_disable_hlo_passes": "tree_reduction_rewriter"} if jax.default_backend() == "cpu" else {}
    return jitted.lower(*args).compile(compiler_options=options)


_COMPILE: dict[str, Callable[..., Any]] = {
    "embed": _compile_embed,
    "layers": _compile_layers,
    "last": _compile_last,
    "head": _compile_head,
}


def to_host(sampled: Any) -> Sampled:
    """What was sampled, as numpy; waits for it."""
    return Sampled(*(np.asarray(part) for part in sampled))
