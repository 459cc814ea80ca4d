"""The compiled programs of a stage: what is compiled for which bucket, and running a step through them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mesh.lowering import Lowered
from mesh.runtime import step
from mesh.runtime.cache import SLACK
from mesh.runtime.executables import Executables
from mesh.runtime.loading import Block
from mesh.runtime.sampling import RowTable, Sampled, sample
from mesh.runtime.shaping import Shaping, choose, mask_shape, shape_logits, table_shapes
from mesh.runtime.step import LayerCache

__all__ = [
    "Compiled",
    "Group",
    "Pick",
    "Programs",
    "ShapeBucket",
    "chunk_numbers",
    "decode_numbers",
    "grouped",
    "packed_numbers",
    "to_host",
]

_SEEN, _SEEN_FACTOR = 2048, 4
"""Penalties look back over this many tokens, or a power of the factor times as many: few programs, for 0.02 ms more with penalties."""

Compiled = dict[tuple[Any, ...], Any]
"""(kind, bucket, signature, shapes of caches or history) -> executable."""


@dataclass(frozen=True, slots=True)
class ShapeBucket:
    """One shape of a step: `size` rows of a decode batch or tokens of a prefill chunk or of a packed step, reading `length` cache
    positions."""

    prefill: bool
    size: int
    length: int
    packed: bool = False

    @property
    def tokens_shape(self) -> tuple[int, int]:
        return (1, self.size) if self.prefill else (self.size, 1)

    def __str__(self) -> str:
        return f"{'prefill' if self.prefill else 'packed' if self.packed else 'decode'} {self.size} x {self.length}"


class Pick(NamedTuple):
    """What picks the next tokens of packed steps: of up to `size` tokens, with penalties that look back over `seen` tokens."""

    size: int
    seen: int

    def __str__(self) -> str:
        return f"pick {self.size} x {self.seen}"


@dataclass(frozen=True)
class Group:
    """Consecutive layers of one program."""

    blocks: tuple[Block, ...]
    first: int  # index of its first layer within the stage

    @cached_property
    def signature(self) -> tuple[str, ...]:
        return tuple(block.signature for block in self.blocks)


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """What sampling depends on; it takes the place of a block."""

    size: int

    @property
    def signature(self) -> str:
        return f"{self.size} tokens"


@dataclass(frozen=True, slots=True)
class _Arrays:
    """The arrays of which rows are copied; they take the place of a block."""

    signature: str

    @classmethod
    def like(cls, arrays: Sequence[Any]) -> _Arrays:
        return cls(", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays))


class _Step(NamedTuple):
    """The executables of one bucket: the embedding, each group of layers, the program that picks one token of a chunk, the head, and what
    draws other tokens than the likeliest. Those of a packed step's tokens have no head: it runs for other numbers of tokens."""

    embed: Any
    layers: tuple[Any, ...]
    last: Any = None
    head: Any = None
    drawing: _Drawing | None = None


class _Drawing(NamedTuple):
    """The executables that draw tokens from logits: the likeliest of those that are allowed; what changes logits, and sampling."""

    chosen: Any
    shaped: Any
    sampled: Any


@dataclass(frozen=True, slots=True)
class _States:
    """The part of a head that makes states; it takes the place of a block."""

    signature: str
    lowered: Lowered
    weights: dict[str, Any]

    @classmethod
    def of(cls, head: Block) -> _States | None:
        if head.states is None:
            return None
        return cls(head.signature, head.states, {name: head.weights[name] for name in head.states.weights})


class Programs:
    """Compiles programs on demand and keeps them. Groups of equal signature and shapes share a program; so do stages of one process that
    are given the same `compiled`. `hidden`: size and type of the hidden state. `vocab`: number of tokens.

    `own` of `layers` (None: all) run in groups. The other layers are held so that `serve` can take them in. Those, and what is left of a
    group that `serve` cuts, run layer by layer; that program is compiled with the rest.
    """

    def __init__(
        self,
        embed: Block | None,
        layers: Sequence[Block],
        head: Block | None,
        *,
        hidden: tuple[int, Any],
        vocab: int,
        own: slice | None = None,
        compiled: Compiled | None = None,
    ) -> None:
        self.sampled_s = 0.0
        """What drawing tokens took in the last step; 0 where the likeliest ones sufficed. Of the likeliest allowed ones, which are found
        while the device still computes, only the wait for the masks."""
        self._embed, self._head = embed, head
        self._layers = tuple(layers)
        self._own = own or slice(0, len(layers))
        self._grouped = [replace(group, first=group.first + self._own.start) for group in grouped(self._layers[self._own])]
        alone = {block.signature: Group((block,), index) for index, block in enumerate(self._layers)}
        self._alone = tuple(alone.values()) if len(self._layers) > self._own.stop - self._own.start else ()
        self._hidden = hidden
        self._vocabulary = _Vocabulary(vocab)
        self._compiled: Compiled = {} if compiled is None else compiled
        self._lock = threading.Lock()
        self._making: dict[Any, threading.Lock] = {}
        self._kept = Executables.of_this_process()
        self._steps: dict[ShapeBucket, _Step] = {}
        self._picks: dict[Pick, tuple[Any, _Drawing]] = {}  # of packed steps: the head, and what draws tokens
        self._table: tuple[bytes, Any] = (b"", None)
        self._on_host = jax.default_backend() == "cpu"
        # Flat tuples; otherwise every step would flatten the trees again.
        self._embed_weights = tuple(jax.tree.leaves(embed.weights)) if embed is not None else ()
        self._head_weights = tuple(jax.tree.leaves(head.weights)) if head is not None else ()
        self.before_head: Any = None
        """The hidden state [B, 1, D] that the head of the last step was given, or would have been."""
        self._states = None if head is None else _States.of(head)
        self._states_weights = () if self._states is None else tuple(jax.tree.leaves(self._states.weights))

        self.serve(self._own, embed=embed is not None, head=head is not None)

    def serve(self, own: slice, *, embed: bool, head: bool) -> None:
        """Run `own` of the layers from now on, with the embedding and the head if asked for and held."""
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
        self._picks.clear()

    @property
    def compiled(self) -> int:
        """Programs compiled so far."""
        return len(self._compiled)

    def run(
        self,
        bucket: ShapeBucket,
        caches: list[LayerCache],
        history: Any,
        hidden: np.ndarray | None,
        numbers: np.ndarray,
        wanted: tuple[np.ndarray, np.ndarray] | None = None,
        shaping: Callable[[], Shaping] | None = None,
        *,
        allowed: Callable[[], np.ndarray] | None = None,
        picks: bool = True,
        places: np.ndarray | None = None,
    ) -> tuple[Any, Any]:
        """Run one step of `numbers` (`decode_numbers` or `chunk_numbers`). `wanted`: the rows' sampling parameters; None if the
        likeliest tokens suffice. `shaping` is called once the logits are there, and says how they are changed. `allowed` is called while
        they are computed: the masks of a step without `wanted`, if the likeliest tokens that these allow suffice. `caches` is updated in
        place. `picks`: a token is wanted after a chunk; without it the head does not run, and the result of the last stage is None.
        `places` int32 [2, B]: where the rows' states are read and written, if layers carry some.
        Returns (history, hidden [B, T, D]), or on the last stage (history, Sampled)."""
        step = self._steps.get(bucket) or self.compile(bucket, caches, history)
        # A call copies host arrays to the device itself, faster than device_put. But an accelerator would get it once for each program.
        numbers_, x, places_ = (numbers, hidden, places) if self._on_host else jax.device_put((numbers, hidden, places))
        x = self._through_layers(step, caches, x, numbers_, places_)
        if self.head is None:
            return history, x
        if bucket.prefill:
            history, x, numbers_ = step.last(history, x, numbers_)
        self.before_head = x
        if bucket.prefill and not picks:
            self.sampled_s = 0.0
            return history, None
        history, logits, likeliest = step.head(self._head_weights, history, x, numbers_)
        self.sampled_s = 0.0
        if wanted is None:
            return history, self._likeliest(step.drawing, logits, likeliest, allowed)
        return history, self._drawn(step.drawing, logits, history, numbers_, wanted, shaping)

    def _through_layers(self, step: _Step, caches: list[LayerCache], x: Any, numbers: Any, places: Any = None) -> Any:
        if self.embed is not None:
            x = step.embed(self._embed_weights, numbers)
        for run, group, weights in zip(step.layers, self.groups, self._weights, strict=True):
            stop = group.first + len(group.blocks)
            own = tuple(caches[group.first : stop])
            caches[group.first : stop], x = run(weights, own, x, numbers, *((places,) if _carry(own) else ()))
        return x

    def _likeliest(self, drawing: Any, logits: Any, likeliest: Any, allowed: Callable[[], np.ndarray] | None) -> Sampled:
        """The likeliest tokens, or those among the `allowed` ones. The logits are still being computed."""
        if allowed is not None:
            began = time.perf_counter()
            masks = allowed()
            self.sampled_s = time.perf_counter() - began
            likeliest = drawing.chosen(logits, masks)
        return Sampled(likeliest, None, None, None)

    def _drawn(
        self,
        drawing: Any,
        logits: Any,
        history: Any,
        numbers: Any,
        wanted: tuple[np.ndarray, np.ndarray],
        shaping: Callable[[], Shaping] | None,
    ) -> Any:
        logits.block_until_ready()  # the result is needed at once in any case
        began = time.perf_counter()
        scores = logits if shaping is None else drawing.shaped(logits, *shaping())
        drawn = jax.block_until_ready(drawing.sampled(scores, history, numbers, *self._on_device(*wanted), logits))
        self.sampled_s = time.perf_counter() - began
        return drawn

    def copy(self, arrays: Sequence[Any], source: int, target: int, positions: int) -> tuple[Any, ...]:
        """`arrays` (caches or a history) with the first `positions`, a compiled number, of row `source` in row `target` too. They are
        updated in place."""
        copied: tuple[Any, ...] = self.compile_copy(arrays, positions)(tuple(arrays), np.int32(source), np.int32(target))
        return copied

    def compile_copy(self, arrays: Sequence[Any], positions: int) -> Any:
        """Compile what copies rows of `arrays`."""
        return self._get("copied", ShapeBucket(False, 1, positions), _Arrays.like(arrays), tuple(arrays))

    @property
    def has_states(self) -> bool:
        """Whether the head can be cut before its product with the vocabulary."""
        return self._states is not None

    def state(self, hidden: np.ndarray) -> np.ndarray:
        """The state after the final norm [E] float32 of hidden [1, 1, D]; `has_states` says whether there is one."""
        return np.asarray(self.compile_states()(self._states_weights, hidden))

    def compile_states(self) -> Any:
        """Compile what `state` runs."""
        assert self._states is not None
        one = ShapeBucket(False, 1, 0)
        return self._get("states", one, self._states, None, self._hidden_shape(one))

    # -- packed steps, on a CPU with kernels -------------------------------------------------------------------------------

    def run_packed(self, bucket: ShapeBucket, caches: list[LayerCache], hidden: np.ndarray | None, numbers: np.ndarray) -> Any:
        """The tokens of a packed step (`packed_numbers`) through the layers -> hidden [N, 1, D]. `caches` is updated in place."""
        step = self._steps.get(bucket) or self.compile_packed(bucket, caches)
        return self._through_layers(step, caches, hidden, numbers)

    def pick(
        self,
        hidden: np.ndarray,
        count: int,
        seen: int,
        draw: tuple[Any, Any, Any, Any] | None = None,
        shaping: Callable[[], Shaping] | None = None,
        allowed: Callable[[], np.ndarray] | None = None,
    ) -> Sampled:
        """The next tokens after hidden [K, 1, D], of which `count` are real. `draw`: None if the likeliest ones suffice, else (history
        [K, seen], positions [K], floats, ints): see `sample`. `shaping`, `allowed`: as for `run`."""
        size = Pick(len(hidden), seen)
        head, drawing = self._picks.get(size) or self.compile_pick(size)
        self.sampled_s = 0.0
        logits, likeliest = head(self._head_weights, hidden, np.int32(count))
        if draw is None:
            return self._likeliest(drawing, logits, likeliest, allowed)
        history, positions, *wanted = draw
        drawn: Sampled = self._drawn(drawing, logits, history, positions, (wanted[0], wanted[1]), shaping)
        return drawn

    def compile_packed(self, bucket: ShapeBucket, caches: Sequence[LayerCache]) -> _Step:
        """Compile what the tokens of a packed step of this shape run, now or after another `serve`."""
        self._steps[bucket] = step = self._compile_layers(bucket, caches)
        return step

    def _compile_layers(self, bucket: ShapeBucket, caches: Sequence[LayerCache]) -> _Step:
        """The embedding and the layers of a step of this shape."""
        x = self._hidden_shape(bucket)
        for group in self._alone:
            self._get("layers", bucket, group, caches[group.first : group.first + 1], x)
        if self._alone and self._embed is not None:
            self._get("embed", bucket, self._embed)
        return _Step(
            None if self.embed is None else self._get("embed", bucket, self.embed),
            tuple(self._get("layers", bucket, group, caches[group.first : group.first + len(group.blocks)], x) for group in self.groups),
        )

    def _hidden_shape(self, bucket: ShapeBucket) -> Any:
        size, dtype = self._hidden
        return jax.ShapeDtypeStruct((*bucket.tokens_shape, size), dtype)

    def compile_pick(self, pick: Pick) -> tuple[Any, _Drawing]:
        """Compile what picks the next tokens of packed steps."""
        assert self._head is not None
        rows = ShapeBucket(False, pick.size, 0, True)
        head = self._get("packed_head", rows, self._head, None, self._hidden_shape(rows))
        sampled = self._get("packed_sampled", ShapeBucket(False, pick.size, pick.seen, True), self._vocabulary)
        self._picks[pick] = picked = head, self._drawing(ShapeBucket(False, pick.size, 0), sampled)
        return picked

    def _drawing(self, bucket: ShapeBucket, sampled: Any) -> _Drawing:
        return _Drawing(self._get("chosen", bucket, self._vocabulary), self._get("shaped", bucket, self._vocabulary), sampled)

    # ----------------------------------------------------------------------------------------------------------------------

    def compile(self, bucket: ShapeBucket, caches: Sequence[LayerCache], history: Any) -> _Step:
        """Compile everything that a step of this shape runs, now or after another `serve`."""
        x = self._hidden_shape(bucket)
        layers = self._compile_layers(bucket, caches)
        if self._alone and self._head is not None:
            self._get("head", bucket, self._head, history, x)
            self._drawing(bucket, self._get("sampled", bucket, self._vocabulary, history))
            if bucket.prefill:
                self._get("last", bucket, self._head, history, x)
        head = self.head
        self._steps[bucket] = step = layers._replace(
            last=self._get("last", bucket, head, history, x) if head is not None and bucket.prefill else None,
            head=None if head is None else self._get("head", bucket, head, history, x),
            drawing=None if head is None else self._drawing(bucket, self._get("sampled", bucket, self._vocabulary, history)),
        )
        return step

    def _on_device(self, floats: np.ndarray, ints: np.ndarray) -> Any:
        """The rows' parameters on the device; sent again only if they differ from the last step's."""
        key = floats.tobytes() + ints.tobytes()
        if self._table[0] != key:
            self._table = (key, jax.device_put((floats, ints)))
        return self._table[1]

    def _get(self, kind: str, bucket: ShapeBucket, what: Any, state: Any = None, x: Any = None) -> Any:
        bucket = _relevant(kind, bucket, state)
        shapes = tuple(dict.fromkeys((leaf.shape, str(leaf.dtype)) for leaf in jax.tree.leaves(state)))
        key = (kind, bucket, what.signature, shapes)
        found = self._compiled.get(key)
        if found is None:
            with self._lock:
                making = self._making.setdefault(key, threading.Lock())
            with making:
                found = self._compiled.get(key)  # by another thread meanwhile
                if found is None:
                    found = self._compiled[key] = _PROGRAM[kind](bucket, what, state, x).compile(key, self._kept)
        return found


def _relevant(kind: str, bucket: ShapeBucket, state: Any) -> ShapeBucket:
    """The part of a bucket that a program depends on, so that fewer are compiled: head and sampling run for one token a row, and
    sampling looks back over one of a few lengths."""
    if kind in ("embed", "last"):
        return replace(bucket, length=0)
    if kind in ("head", "chosen", "shaped"):
        return ShapeBucket(False, 1 if bucket.prefill else bucket.size, 0)
    if kind == "sampled":
        seen = _SEEN
        while seen < bucket.length:
            seen *= _SEEN_FACTOR
        return ShapeBucket(False, 1 if bucket.prefill else bucket.size, min(seen, state.shape[1] - SLACK))
    return bucket


def grouped(layers: Sequence[Block]) -> Iterator[Group]:
    """Runs of equal layers, cut evenly. Neighbouring runs that fill no program (of a pattern of windows or of bits, say) are cut as one."""
    runs: list[list[Block]] = []
    open_ended = False  # whether the last of `runs` takes another short one
    for _, equal in groupby(layers, key=lambda block: block.signature):
        run = list(equal)
        short = len(run) < step.GROUP_LAYERS
        if short and open_ended:
            runs[-1] += run
        else:
            runs.append(run)
        open_ended = short
    first = 0
    for run in runs:
        start = 0
        for size in step.group_sizes(len(run)):
            yield Group(tuple(run[start : start + size]), first)
            start += size
            first += size


def _shape(dims: tuple[int, ...], dtype: Any = np.int32) -> Any:
    return jax.ShapeDtypeStruct(dims, dtype)


class _Numbers(NamedTuple):
    """What a step works on: tokens, positions [B, T], writes [B], the first row, and how many tokens of a chunk are real. In a packed step
    `row` has the row of each token."""

    tokens: Any
    positions: Any
    writes: Any
    row: Any
    count: Any


def decode_numbers(
    rows: Sequence[int], positions: Sequence[int], tokens: Sequence[int], *, base: int, size: int, unseen: int
) -> np.ndarray:
    """A decode step's input as the one array that is sent to the device: int32 [3 size + 1], with tokens, positions and write positions
    of the `size` rows from `base` on, and `base`. Rows that are not named write to position `unseen`."""
    numbers = [0] * (2 * size) + [unseen] * size + [base]
    for row, position, token in zip(rows, positions, tokens, strict=True):
        at = row - base
        numbers[at], numbers[size + at], numbers[2 * size + at] = token, position, position
    return np.array(numbers, np.int32)


def chunk_numbers(tokens: np.ndarray, start: int, row: int, size: int) -> np.ndarray:
    """The same for a prefill chunk: tokens [n] padded to `size`, int32 [size + 3]."""
    numbers = np.zeros(size + 3, np.int32)
    numbers[: len(tokens)] = tokens
    numbers[size:] = start, row, len(tokens)
    return numbers


def packed_numbers(rows: Sequence[int], starts: Sequence[int], counts: Sequence[int], tokens: np.ndarray, *, size: int) -> np.ndarray:
    """The same for a packed step: the tokens of all segments one after the other, padded to `size`. int32 [3 size + 1], with tokens,
    positions and rows, and how many tokens are real."""
    positions: list[int] = []
    own: list[int] = []
    for row, start, count in zip(rows, starts, counts, strict=True):
        positions += range(start, start + count)
        own += [row] * count
    padding = [0] * (size - len(own))
    return np.array([*tokens.tolist(), *padding, *positions, *padding, *own, *padding, len(own)], np.int32)


def _numbers(bucket: ShapeBucket, vector: Any) -> _Numbers:
    size = bucket.size
    if bucket.packed:
        tokens, positions, rows = (vector[index * size : (index + 1) * size] for index in range(3))
        return _Numbers(tokens[:, None], positions[:, None], positions, rows, vector[3 * size])
    if bucket.prefill:
        start, row, count = (vector[size + index] for index in range(3))
        return _Numbers(vector[None, :size], (start + jnp.arange(size, dtype=jnp.int32))[None], start[None], row, count)
    tokens, positions, writes = (vector[index * size : (index + 1) * size] for index in range(3))
    return _Numbers(tokens[:, None], positions[:, None], writes, vector[3 * size], None)


def _vector(bucket: ShapeBucket) -> Any:
    return _shape((bucket.size + 3 if bucket.prefill else 3 * bucket.size + 1,))


def _flat(weights: Any) -> tuple[tuple[Any, ...], Any]:
    """(the weights as a flat tuple, the tree that makes them whole again)"""
    leaves, tree = jax.tree.flatten(weights)
    return tuple(leaves), tree


class _Program(NamedTuple):
    """What to compile, and for which arguments. `weights`: how the flat arguments make up the blocks' weights."""

    jitted: Any
    args: tuple[Any, ...]
    weights: Any = None

    def compile(self, key: tuple[Any, ...], kept: Executables | None) -> Any:
        # On a CPU XLA splits every reduction in two, where one operation is as fast.
        options = {"xla_disable_hlo_passes": "tree_reduction_rewriter"} if jax.default_backend() == "cpu" else {}
        if kept is not None:
            return kept.get((key, str(self.weights)), self.jitted, self.args, options)
        return self.jitted.lower(*self.args).compile(compiler_options=options)


def _embed(bucket: ShapeBucket, block: Block, state: Any, x: Any) -> _Program:
    weights, tree = _flat(block.weights)

    def embed(flat: Any, vector: Any) -> Any:
        numbers = _numbers(bucket, vector)
        return step.embed(block.lowered, tree.unflatten(flat), numbers.tokens, numbers.positions)

    return _Program(jax.jit(embed), (weights, _vector(bucket)), tree)


def _layers(bucket: ShapeBucket, group: Group, caches: Sequence[LayerCache], x: Any) -> _Program:
    weights, tree = _flat([block.weights for block in group.blocks])
    # Equal layers are traced once. XLA inlines the calls, so the program is the same.
    graphs = {block.signature: block.lowered if bucket.prefill else block.decode for block in group.blocks}
    one = step.packed_layer if bucket.packed else step.layer
    traced = {signature: jax.jit(partial(one, graph, length=bucket.length)) for signature, graph in graphs.items()}

    def layers(flat: Any, caches: Any, hidden: Any, vector: Any, *places: Any) -> Any:
        n = _numbers(bucket, vector)
        runs = [traced[block.signature] for block in group.blocks]
        where = (n.row, n.count) if bucket.packed else (n.writes, n.row)
        return step.layers(runs, tree.unflatten(flat), caches, hidden, n.positions, *where, *places)

    places = (_shape((2, bucket.tokens_shape[0])),) if _carry(caches) else ()
    return _Program(jax.jit(layers, donate_argnums=1), (weights, tuple(caches), x, _vector(bucket), *places), tree)


def _carry(caches: Sequence[LayerCache]) -> bool:
    """Whether one of the layers has states."""
    return any(cache.states for cache in caches)


def _last(bucket: ShapeBucket, block: Block, history: Any, x: Any) -> _Program:
    def last(history: Any, hidden: Any, vector: Any) -> Any:
        n = _numbers(bucket, vector)
        history, hidden, token, position, write = step.last_of_chunk(history, hidden, n.tokens, n.positions, n.row, n.count)
        return history, hidden, jnp.concatenate((token[0], position[0], write, n.row[None]))

    return _Program(jax.jit(last, donate_argnums=0), (history, x, _vector(bucket)))


def _head(bucket: ShapeBucket, block: Block, history: Any, x: Any) -> _Program:
    weights, tree = _flat(block.weights)
    hidden = _shape((bucket.size, 1, x.shape[-1]), x.dtype)

    def head(flat: Any, history: Any, hidden: Any, vector: Any) -> Any:
        n = _numbers(bucket, vector)
        return step.head(block.lowered, tree.unflatten(flat), history, hidden, n.tokens, n.writes, n.row)

    return _Program(jax.jit(head, donate_argnums=1), (weights, history, hidden, _vector(bucket)), tree)


def _states(bucket: ShapeBucket, what: _States, state: Any, x: Any) -> _Program:
    weights, tree = _flat(what.weights)

    def states(flat: Any, hidden: Any) -> Any:
        return step.states(what.lowered, tree.unflatten(flat), hidden)

    return _Program(jax.jit(states), (weights, x), tree)


def _chosen(bucket: ShapeBucket, vocabulary: _Vocabulary, state: Any, x: Any) -> _Program:
    logits = _shape((bucket.size, vocabulary.size), np.float32)
    return _Program(jax.jit(choose), (logits, mask_shape(bucket.size, vocabulary.size)))


def _shaped(bucket: ShapeBucket, vocabulary: _Vocabulary, state: Any, x: Any) -> _Program:
    tables = table_shapes(bucket.size, vocabulary.size)
    return _Program(jax.jit(shape_logits), (_shape((bucket.size, vocabulary.size), np.float32), *tables))


def _sampled(bucket: ShapeBucket, vocabulary: _Vocabulary, history: Any, x: Any) -> _Program:
    table = (_shape((bucket.size, RowTable.FLOATS), np.float32), _shape((bucket.size, RowTable.INTS)))

    def sampled(logits: Any, history: Any, vector: Any, floats: Any, ints: Any, raw: Any) -> Any:
        n = _numbers(bucket, vector)
        return step.sampled(logits, history, n.positions, n.row, floats, ints, raw, length=bucket.length)

    logits = _shape((bucket.size, vocabulary.size), np.float32)
    return _Program(jax.jit(sampled), (logits, history, _vector(bucket), *table, logits))


def _packed_head(bucket: ShapeBucket, block: Block, state: Any, x: Any) -> _Program:
    weights, tree = _flat(block.weights)

    def head(flat: Any, hidden: Any, count: Any) -> Any:
        return step.packed_head(block.decode, tree.unflatten(flat), hidden, count)

    return _Program(jax.jit(head), (weights, x, _shape(())), tree)


def _packed_sampled(bucket: ShapeBucket, vocabulary: _Vocabulary, state: Any, x: Any) -> _Program:
    size = bucket.size
    table = (_shape((size, RowTable.FLOATS), np.float32), _shape((size, RowTable.INTS)))

    def sampled(logits: Any, history: Any, positions: Any, floats: Any, ints: Any, raw: Any) -> Any:
        return sample(logits, floats, ints, history, positions, raw)

    logits = _shape((size, vocabulary.size), np.float32)
    return _Program(jax.jit(sampled), (logits, _shape((size, bucket.length)), _shape((size,)), *table, logits))


def _copied(bucket: ShapeBucket, what: _Arrays, arrays: tuple[Any, ...], x: Any) -> _Program:
    def copied(arrays: Any, source: Any, target: Any) -> Any:
        return tuple(step.copied(array, source, target, positions=bucket.length) for array in arrays)

    return _Program(jax.jit(copied, donate_argnums=0), (arrays, _shape(()), _shape(())))


_PROGRAM: dict[str, Callable[..., _Program]] = {
    "embed": _embed,
    "layers": _layers,
    "last": _last,
    "head": _head,
    "states": _states,
    "chosen": _chosen,
    "shaped": _shaped,
    "sampled": _sampled,
    "packed_head": _packed_head,
    "packed_sampled": _packed_sampled,
    "copied": _copied,
}


def to_host(sampled: Any, *, logprobs: bool) -> Sampled:
    """The sampled tokens as numpy; waits for them. Without `logprobs` only the tokens are copied."""
    return Sampled(*(np.asarray(part) for part in sampled)) if logprobs else Sampled(np.asarray(sampled.tokens), None, None, None)
