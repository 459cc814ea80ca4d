"""A stage: one layer range on one device, with a KV cache.

    Stage.load(directory, config)    predict memory and refuse if it is too much, check files, lower blocks, pack weights
    stage.warm_up()                  compile every program; nothing compiles afterwards
    stage.open(row, params)          a session's sampling parameters, on the last stage
    stage.prefill(row, start, x)     a chunk of one row
    stage.decode(rows, positions, x) one token for each of several rows
    stage.packed(segments, x)        tokens of several rows, any number of each
    stage.copy(source, target, n)    what one row holds at its first n positions, for another row

Synchronous, one caller at a time. What is written at a position depends only on that position's input and on earlier positions, so
repeating a step changes nothing up to its last position: recovery is replay. After a prefill chunk comes its padding. Where layers carry
states, a step begins where the row's states stand at one of a few positions (row_states.py), and a chunk has no padding.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import jax.numpy as jnp
import numpy as np

from mesh.dtypes import CACHE_DTYPES, NUMPY_DTYPES, cache_width
from mesh.errors import BadLayerRange, BadRequest, DoesNotFit, PromptTooLong
from mesh.model.arrivals import Arrivals
from mesh.model.grammar import Vocabulary
from mesh.model.manifest import Manifest
from mesh.model.memory import SPARE_STATES, STATE_PLACES, MemoryNeed, predict
from mesh.protocol.frame import EMBEDDED, NOT_ALLOWED
from mesh.runtime.buckets import Buckets
from mesh.runtime.cache import SLACK
from mesh.runtime.device import memory_habits
from mesh.runtime.engine import SampledToken, StageCounters
from mesh.runtime.kernel_variants import VariantTable
from mesh.runtime.loading import Block, block_names, load_block
from mesh.runtime.packing import can_pack, in_turn, token_sizes
from mesh.runtime.programs import Compiled, Pick, Programs, ShapeBucket, chunk_numbers, decode_numbers, packed_numbers, to_host
from mesh.runtime.row_states import Move, RowStates, StatesOfRows
from mesh.runtime.sampling import RowTable, Sampled, SamplingParams
from mesh.runtime.segments import Segments
from mesh.runtime.shaping import Pending, RowShapes, Shaping
from mesh.runtime.step import LayerCache
from mesh.settings.units import format_bytes
from mesh.types import LayerRange, Progress, no_progress

__all__ = ["Stage", "StageConfig"]

_LONG_CHUNK: Final = 1 << 20
"""Tokens times the positions that they read. A larger chunk takes some 70 ms a layer on two cores; 6 ms more at its first run do not
matter there."""


@dataclass(frozen=True)
class StageConfig:
    """What a stage serves, and its limits. embed and head None: held if the range begins at 0 or ends at the last layer.

    rows: sessions held at once. context: the most positions of a row (None: the model's). chunk: prefill tokens at a time.
    max_memory_bytes: refuse to load if more is needed (None: no limit). checksums: compare the sha256 of every file.
    overlap: so many layers on either side are held as well, with embedding or head if that reaches them; see Stage.serve. kept_rows: the
    rows of the RecomputingStage around this one, which keeps input in place of a cache; memory is predicted for that.
    """

    layers: LayerRange
    embed: bool | None = None
    head: bool | None = None
    rows: int = 8
    context: int | None = None
    chunk: int = 256
    max_memory_bytes: int | None = None
    checksums: bool = True
    overlap: int = 0
    kept_rows: int | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a chunk that is one step: `count` tokens from position `start` on in a program of `bucket`, with the states at the row's
    place `source` (None: zeros) before and `target` after."""

    start: int
    count: int
    bucket: ShapeBucket
    source: int | None
    target: int


class Stage:
    """An Engine that keeps keys and values of every row. Made by `load`; see the module's docstring."""

    def __init__(
        self,
        manifest: Manifest,
        config: StageConfig,
        blocks: Sequence[Block],
        need: MemoryNeed,
        compiled: Compiled | None = None,
        vocabulary: Callable[[], Vocabulary] | None = None,
    ) -> None:
        """`vocabulary`: reads the model's tokens, where answers may have to follow a grammar."""
        self.manifest = manifest
        self.config = config
        self.layers = config.layers
        self.held = config.layers.widened(config.overlap, manifest.layers)
        self.first = self.last = False  # `serve` sets them
        self.rows = config.rows
        self.context = config.context or manifest.context_length
        self.need = need
        self.counters = StageCounters()
        self.bucket = 0
        self.sampled_s = 0.0
        self.carries = manifest.has_states
        self.buckets = Buckets.plan(rows=config.rows, context=self.context, chunk=config.chunk, exact=self.carries)
        inner = list(blocks)
        embed = inner.pop(0) if config.embed else None
        head = inner.pop() if config.head else None
        self._table = RowTable(config.rows)
        self._embedding: set[int] = set()
        """The rows that get a hidden state in place of a token."""
        self._shapes = RowShapes(vocabulary or partial(_no_vocabulary, manifest), manifest.vocab_size)
        self._dtype = NUMPY_DTYPES[manifest.hidden.dtype]
        own = slice(self.layers.start - self.held.start, self.layers.stop - self.held.start)
        self.programs = Programs(
            embed, inner, head, own=own, hidden=(manifest.hidden.size, self._dtype), vocab=manifest.vocab_size, compiled=compiled
        )
        slots = self.context + SLACK
        self._caches = [self._fresh_cache(layer, slots) for layer in self.held]
        self._packs = can_pack(inner, manifest, list(self.held))
        self._token_sizes = token_sizes(max(self.buckets.chunks[-1], self.rows))
        # Input tokens by position. Where steps are packed, only what penalties need of them goes to the device.
        history: Any = np.zeros((self.rows, slots), np.int32) if self._packs else jnp.zeros((self.rows, slots), jnp.int32)
        self._history: Any = history if head is not None else None
        self.serve(self.layers)

    # -- loading -------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        directory: Path,
        config: StageConfig,
        *,
        manifest: Manifest | None = None,
        compiled: Compiled | None = None,
        progress: Progress = no_progress,
        arrivals: Arrivals | None = None,
    ) -> Stage:
        """Load a stage. `manifest`: the model's (None: that of the directory). `compiled`: programs to share with other stages of this
        process. `arrivals`: files are still being fetched; each block is loaded once it is there. Each block is compared with its
        checksum just before it is used, while the block before it is loaded.

        Errors: ModelNotFound, CorruptModel, BadLayerRange, DoesNotFit (with the figures), UnsupportedModel.
        """
        manifest = manifest or Manifest.load(directory)
        layers = manifest.check_range(config.layers)
        held = config.layers.widened(config.overlap, manifest.layers)
        embed = held.start == 0 if config.embed is None else config.embed
        head = held.stop == manifest.layers if config.head is None else config.head
        context = min(config.context or manifest.context_length, manifest.context_length)
        config = replace(config, embed=embed, head=head, context=context)
        rows, kept = config.kept_rows or config.rows, config.kept_rows is None
        need = predict(
            manifest,
            held,
            embed=embed,
            head=head,
            rows=rows,
            context=context,
            chunk=config.chunk,
            kv_cache=kept,
            **memory_habits(),
        )
        allowed = config.max_memory_bytes
        if allowed is not None and need.total_bytes > allowed:
            overlap = f" and {config.overlap} more on either side" if config.overlap else ""
            raise DoesNotFit(
                f"layers {layers}{overlap} of {manifest.name} need {format_bytes(need.total_bytes)} "
                f"(weights {format_bytes(need.weights_bytes)}, KV cache {format_bytes(need.cache_bytes)} for {rows} rows of "
                f"{context} tokens, workspace {format_bytes(need.workspace_bytes)}, process {format_bytes(need.process_bytes)}) "
                f"but {format_bytes(allowed)} are allowed: "
                "give fewer layers, rows or context, more memory, or import at fewer bits",
                needed_bytes=need.total_bytes,
                allowed_bytes=allowed,
            )
        if arrivals is None:
            manifest.verify_files(Path(directory), held, checksums=False, embed=embed, head=head)
        names = block_names(held, embed=embed, head=head)
        blocks, variants = [], VariantTable()

        def check_block(name: str) -> None:
            if arrivals is not None:
                arrivals.wait(file.name for file in manifest.block(name).files)
            manifest.verify_block(Path(directory), name, checksums=config.checksums)

        with ThreadPoolExecutor(1, "checksum") as pool:
            checks = [pool.submit(check_block, name) for name in names]
            try:
                for index, (name, check) in enumerate(zip(names, checks, strict=True)):
                    progress(f"load {name}", index, len(names))
                    check.result()
                    vocabulary = manifest.vocab_size if head and name == names[-1] else None
                    blocks.append(load_block(Path(directory), name, variants=variants.lookup, vocabulary=vocabulary))
            finally:
                if arrivals is not None:
                    arrivals.stop()  # no check waits any more
                pool.shutdown(cancel_futures=True)
        progress("loaded", len(names), len(names))
        return cls(manifest, config, blocks, need, compiled, partial(Vocabulary.load, Path(directory), manifest))

    def serve(self, layers: LayerRange) -> None:
        """Serve `layers`, a range of those that are held, from now on. Nothing is loaded and, after warm_up, nothing is compiled. The
        rows' contents are lost. BadLayerRange: not all of the layers are held."""
        held = self.held
        if not (held.start <= layers.start < layers.stop <= held.stop):
            raise BadLayerRange(f"layers {layers} are not all held here, which are {held}: give a range of these")
        self.layers = layers
        self.first = bool(self.config.embed) and layers.start == held.start
        self.last = bool(self.config.head) and layers.stop == held.stop
        self.programs.serve(slice(layers.start - held.start, layers.stop - held.start), embed=self.first, head=self.last)
        self._forget_states()

    def warm_up(self, progress: Progress = no_progress, *, decode: bool = True) -> None:
        """Compile every program that the buckets allow; those of decode steps only if `decode`. Idempotent.

        Stages begin at different buckets. If several start together on one machine, each finds the others' programs in the cache,
        because equal layers are equal programs.
        """
        wanted = [bucket for bucket in self._buckets() if decode or isinstance(bucket, Pick) or bucket.prefill or bucket.packed]
        begin = len(wanted) * self.layers.start // self.manifest.layers
        wanted = wanted[begin:] + wanted[:begin]
        with ThreadPoolExecutor(_compilers(), "compile") as pool:
            others = [pool.submit(self._compile_copies)]
            if self.programs.has_states:
                others.append(pool.submit(self.programs.compile_states))
            for index, (bucket, _) in enumerate(zip(wanted, pool.map(self._compile, wanted), strict=True)):
                progress(f"compile {bucket}", index, len(wanted))
            for other in others:
                other.result()
        progress("compiled", len(wanted), len(wanted))
        if self.last and self.manifest.tokenizer is not None:
            self._shapes.warm_up()

    def compile_for(self, prompt_length: int, max_tokens: int) -> None:
        """Compile only the programs of one request: its prefill chunks, then decode steps of one row."""
        chunk = self.buckets.chunks[-1]
        if self._packs:
            parts = {min(chunk, prompt_length), prompt_length % chunk or chunk, *((1,) if max_tokens > 1 else ())}
            for size in {Buckets.fit(self._token_sizes, min(part, prompt_length)) for part in parts}:
                self._compile(self._packed_bucket(size))
            if self.last:
                self._compile(Pick(1, Buckets.fit(self.buckets.lengths, min(prompt_length + max_tokens, self.context))))
            return
        for piece in self._cut(RowStates(), 0, prompt_length):
            self._compile(piece.bucket)
        longest = Buckets.fit(self.buckets.lengths, min(prompt_length + max_tokens, self.context))
        for length in self.buckets.lengths:
            if max_tokens > 1 and Buckets.fit(self.buckets.lengths, prompt_length + 1) <= length <= longest:
                self._compile(ShapeBucket(False, self.buckets.rows[0], length))

    def exercise(self) -> None:
        """Run every compiled program once: its first run takes a multiple of the later ones, and a session that fails over to this shard
        should not wait for that. Programs that take long anyway are left out. Call it before any row is in use: it writes to them."""

        def hidden(count: int) -> np.ndarray | None:
            return None if self.first else np.zeros((count, self.manifest.hidden.size), self._dtype)

        if self.embeds:
            self.programs.state(np.zeros((1, 1, self.manifest.hidden.size), self._dtype))
        buckets = self.buckets
        if self._packs:
            for smaller in (0, *self._token_sizes[:-1]):
                count = min(smaller + 1, self.context)
                self.packed(Segments([0], [0], [count], [True]), np.zeros(count, np.int32), hidden(count))
            self._exercise_copies()
            for rows in buckets.rows:
                every = range(rows)
                self.packed(Segments(every, [0] * rows, [1] * rows, [True] * rows), np.zeros(rows, np.int32), hidden(rows))
            self.counters = StageCounters()
            return
        if self.carries:
            for size in buckets.chunks:
                self.prefill(0, 0, np.zeros(size, np.int32), hidden(size))
            for rows in buckets.rows:
                self.decode(np.array([rows - 1], np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32), hidden(1))
            self._forget_states()
            self.counters = StageCounters()
            return
        self._exercise_copies()
        for shorter in (0, *buckets.lengths[:-1]):
            for smaller in (0, *buckets.chunks[:-1]):
                start = max(shorter - smaller, 0)  # one token more than the next smaller bucket and length hold
                size = buckets.chunk(start, smaller + 1)
                if start + smaller < self.context and size * (start + size) < _LONG_CHUNK:
                    self.prefill(0, start, np.zeros(smaller + 1, np.int32), hidden(smaller + 1))
            for rows in buckets.rows:
                self.decode(np.array([rows - 1], np.int32), np.array([shorter], np.int32), np.zeros(1, np.int32), hidden(1))
        self.counters = StageCounters()

    def _exercise_copies(self) -> None:
        for size in self.buckets.copies[:1]:  # larger ones differ in nothing but memory that would be touched
            self.copy(0, 1, size)

    # -- steps ---------------------------------------------------------------------------------------------------------

    def open(self, row: int, params: SamplingParams, *, prompt_length: int) -> None:
        """Give a row its sampling parameters; only the last stage has use for them."""
        self._check_row(row)
        self._table.set(row, params, prompt_length=prompt_length)
        (self._embedding.add if params.embed else self._embedding.discard)(row)
        if self.last:
            self._shapes.open(row, params, prompt_length=prompt_length)

    def copy(self, source: int, target: int, positions: int) -> None:
        """Give row `target` what row `source` holds at its first `positions` positions."""
        self._check_row(source)
        self._check_row(target)
        self._check_positions(0, positions - 1)
        if self.carries:
            why = "which stand at single positions: no row begins with a part of another one"
            raise BadRequest(f"{self.manifest.name} carries states, {why}", field="row")
        if source == target or positions < 1:
            return
        size = Buckets.fit(self.buckets.copies, positions)
        for index, cache in enumerate(self._caches):
            key, value = self.programs.copy((cache.key, cache.value), source, target, size)
            self._caches[index] = LayerCache(key, value)
        if isinstance(self._history, np.ndarray):
            self._history[target, :positions] = self._history[source, :positions]
        elif self._history is not None:
            (self._history,) = self.programs.copy((self._history,), source, target, size)

    def prefill(self, row: int, start: int, tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray | SampledToken:
        """Run tokens [T] (and, unless this is the first stage, their hidden state [T, D]) of `row` from position `start` on.

        Returns hidden [T, D] of the compute type, or on the last stage the token sampled after the last one.
        """
        self._check_row(row)
        tokens = np.asarray(tokens, np.int32)
        hidden = self.check_chunk(start, tokens, hidden)
        if self.carries:
            self._states.check_begins(row, start)
        if self._packs:
            packed = self._packed(Segments([row], [start], [len(tokens)], [True]), tokens, hidden)
            return packed[0] if self.last else packed  # type: ignore[return-value]  # a token was wanted
        began = time.perf_counter()
        self._shapes.fed(row, start, tokens.tolist())
        pieces: list[np.ndarray] = []
        result: Any = None
        pending: Pending | None = None
        computed = 0
        for piece in self._cut(self._states.of[row], start, len(tokens)):
            bucket, count = piece.bucket, piece.count
            computed += bucket.size
            part = slice(piece.start - start, piece.start - start + count)
            pending = self._begin_shaping([row]) if part.stop == len(tokens) else None
            result = self._prefill_chunk(row, piece, tokens[part], None if hidden is None else hidden[part], pending)
            if not self.last:
                pieces.append(result[:count])
        if self.last and row in self._embedding:
            answer: Any = self._embedded(np.asarray(self.programs.before_head))
        elif self.last:
            answer = self._shaped(pending, [row], [self._token(result, 0, row)])[0]
        else:
            answer = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        self.bucket, self.sampled_s = computed, self.programs.sampled_s if self.last else 0.0
        self.counters.prefill_steps += 1
        self.counters.prefill_tokens += len(tokens)
        self.counters.prefill_s += time.perf_counter() - began
        return answer

    def decode(
        self, rows: np.ndarray, positions: np.ndarray, tokens: np.ndarray, hidden: np.ndarray | None = None
    ) -> np.ndarray | list[SampledToken]:
        """One step of a decode batch: tokens [n] (and hidden [n, D] unless this is the first stage) of `rows` [n] at `positions` [n].

        Returns hidden [n, D] in the same order, or on the last stage n tokens. Rows that are not named stay as they are.
        """
        # A few numbers, as Python lists: after a step has read its weights, numpy's code is no longer in the processor's caches.
        rows_, positions_, tokens_ = rows.tolist(), positions.tolist(), tokens.tolist()
        if not (len(rows_) == len(positions_) == len(tokens_)) or not rows_ or rows.ndim != 1:
            raise BadRequest("rows, positions and tokens of a decode step must be equally long and not empty", field="rows")
        low, high, last = min(rows_), max(rows_), max(positions_)
        self._check_row(low)
        self._check_row(high)
        if len(set(rows_)) != len(rows_):
            raise BadRequest("a row appears twice in a decode step", field="rows")
        self._check_positions(min(positions_), last)
        hidden = self._check_hidden(hidden, len(rows_))
        if self._packs:
            ones = [1] * len(rows_)
            return self._packed(Segments(rows_, positions_, ones, [True] * len(rows_)), tokens, hidden)  # type: ignore[return-value]
        began = time.perf_counter()
        size = Buckets.fit(self.buckets.rows, high - low + 1)
        base = min(low, self.rows - size)
        places = self._states.decode_places(rows_, positions_, base, size) if self.carries else None
        length = Buckets.fit(self.buckets.lengths, last + 1)
        whole = rows_ == list(range(base, base + size))
        numbers = decode_numbers(rows_, positions_, tokens_, base=base, size=size, unseen=self.context + SLACK - 1)
        x = None
        if hidden is not None and whole:
            x = hidden[:, None]
        elif hidden is not None:
            x = np.zeros((size, 1, self.manifest.hidden.size), self._dtype)
            x[rows - base, 0] = hidden
        wanted = pending = None
        if self.last and not all(self._table.plain[row] for row in rows_):
            if not all(self._table.likeliest_allowed[row] for row in rows_):
                wanted = self._table.only(rows, base, size)
            for row, position, token in zip(rows_, positions_, tokens_, strict=True):
                self._shapes.fed(row, position, (token,))
            pending = self._begin_shaping(rows_)
        shaping, allowed = _applied(pending, range(base, base + size), size)
        bucket = ShapeBucket(False, size, length)
        self._history, result = self.programs.run(
            bucket, self._caches, self._history, x, numbers, wanted, shaping, allowed=allowed, places=places
        )
        if self.last:
            host = to_host(result, logprobs=wanted is not None and bool((wanted[1][:, -1] >= 0).any()))
            answer: Any = self._shaped(pending, rows_, [self._token(host, row - base, row) for row in rows_])
            if not self._embedding.isdisjoint(rows_):
                states = np.asarray(self.programs.before_head)
                for index, row in enumerate(rows_):
                    if row in self._embedding:
                        answer[index] = self._embedded(states[row - base : row - base + 1])
        else:
            answer = np.asarray(result)[:, 0] if whole else np.asarray(result)[rows - base, 0]
        self.bucket, self.sampled_s = size, self.programs.sampled_s if self.last else 0.0
        self.counters.decode_steps += 1
        self.counters.decode_tokens += len(rows)
        self.counters.decode_s += time.perf_counter() - began
        return answer

    def packed(self, segments: Segments, tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray | list[SampledToken | None]:
        """Run tokens [m] (and hidden [m, D] unless this is the first stage) of several rows, segment after segment.

        Returns hidden [m, D], or on the last stage the token sampled after each segment, None for those that want none.
        """
        tokens = np.asarray(tokens, np.int32)
        if not len(segments) or min(segments.counts) < 1 or sum(segments.counts) != len(tokens):
            raise BadRequest("the segments of a packed step need a token each, and as many as there are", field="counts")
        if len(set(segments.rows)) != len(segments):
            raise BadRequest("a row appears twice in a packed step", field="rows")
        self._check_row(min(segments.rows))
        self._check_row(max(segments.rows))
        self._check_positions(min(segments.starts), max(start + n - 1 for start, n in zip(segments.starts, segments.counts, strict=True)))
        hidden = self._check_hidden(hidden, len(tokens))
        return self._packed(segments, tokens, hidden) if self._packs else in_turn(self, segments, tokens, hidden)

    @property
    def packs(self) -> bool:
        """Whether a packed step runs as one, and not as several of the other kinds."""
        return self._packs

    @property
    def embeds(self) -> bool:
        """Whether it can give the hidden state after the final norm in place of a token."""
        return self.last and self.programs.has_states

    @property
    def compiled(self) -> int:
        """Programs that are compiled."""
        return self.programs.compiled

    @property
    def hidden_dtype(self) -> np.dtype[Any]:
        return self._dtype

    def check_chunk(self, start: int, tokens: np.ndarray, hidden: np.ndarray | None) -> np.ndarray | None:
        """The hidden state that `prefill` would use. BadRequest or PromptTooLong if it would refuse."""
        if tokens.ndim != 1 or not len(tokens):
            raise BadRequest(f"a chunk needs at least one token, not an array of shape {tokens.shape}", field="tokens")
        self._check_positions(start, start + len(tokens) - 1)
        return self._check_hidden(hidden, len(tokens))

    # -- inside --------------------------------------------------------------------------------------------------------

    def _forget_states(self) -> None:
        self._states = StatesOfRows(self.rows)

    def _cut(self, states: RowStates, start: int, count: int) -> Iterator[_Piece]:
        """The pieces of a chunk that are computed one after the other. Where layers carry states, each begins with those that the piece
        before it has left."""
        moves = states.advance(start, count) if self.carries else [Move(None, 0, start, start + count)]
        for move in moves:
            at, source = move.start, move.source
            while at < move.stop:
                bucket = self._prefill_bucket(at, move.stop - at)
                size = min(bucket.size, move.stop - at)
                yield _Piece(at, size, bucket, source, move.target)
                at, source = at + size, move.target

    def _prefill_bucket(self, start: int, count: int) -> ShapeBucket:
        """The bucket of a chunk. If its padding would go beyond the row, it holds fewer than `count` tokens."""
        size = self.buckets.chunk(start, count)
        return ShapeBucket(True, size, Buckets.fit(self.buckets.lengths, start + min(size, count)))

    def _prefill_chunk(self, row: int, piece: _Piece, tokens: np.ndarray, hidden: np.ndarray | None, pending: Pending | None) -> Any:
        count, bucket, size = piece.count, piece.bucket, piece.bucket.size
        x = None
        if hidden is not None:
            x = np.zeros((1, size, self.manifest.hidden.size), self._dtype)
            x[0, :count] = hidden
        wanted = None if self._table.likeliest_allowed[row] else self._table.only(np.array([row]), row, 1)
        numbers = chunk_numbers(tokens, piece.start, row, size)
        shaping, allowed = _applied(pending, [row], 1)
        picks = row not in self._embedding
        places = self._states.places(row, piece.source, piece.target) if self.carries else None
        self._history, result = self.programs.run(
            bucket, self._caches, self._history, x, numbers, wanted, shaping, allowed=allowed, picks=picks, places=places
        )
        if self.last:
            return None if result is None else to_host(result, logprobs=self._table.logprobs(row) >= 0)
        return np.asarray(result)[0]

    def _packed(self, segments: Segments, tokens: np.ndarray, hidden: np.ndarray | None) -> np.ndarray | list[SampledToken | None]:
        began = time.perf_counter()
        hiddens: list[np.ndarray] = []
        sampled: dict[int, SampledToken] = {}  # by row
        sampled_s = 0.0
        for part, piece in segments.pieces(self._token_sizes[-1]):
            pending = self._begin_packed(part, tokens[piece]) if self.last else None
            x = self._through_layers(part, tokens[piece], None if hidden is None else hidden[piece])
            if not self.last:
                hiddens.append(x[: piece.stop - piece.start, 0])
            elif any(part.wants):
                sampled |= self._pick(part, x, pending)
                sampled_s += self.programs.sampled_s
        self.bucket, self.sampled_s = len(tokens), sampled_s
        self._count(segments, len(tokens), time.perf_counter() - began)
        if self.last:
            return [sampled.get(row) for row in segments.rows]
        return hiddens[0] if len(hiddens) == 1 else np.concatenate(hiddens)

    def _through_layers(self, segments: Segments, tokens: np.ndarray, hidden: np.ndarray | None) -> np.ndarray:
        """hidden [N, 1, D] after the layers; N is a compiled size. The rows' history has the tokens."""
        size = Buckets.fit(self._token_sizes, len(tokens))
        x = None
        if hidden is not None and len(tokens) == size:
            x = hidden[:, None]
        elif hidden is not None:
            x = np.zeros((size, 1, self.manifest.hidden.size), self._dtype)
            x[: len(tokens), 0] = hidden
        numbers = packed_numbers(segments.rows, segments.starts, segments.counts, tokens, size=size)
        if self.last:
            for row, start, count, end in zip(segments.rows, segments.starts, segments.counts, segments.ends(), strict=True):
                self._history[row, start : start + count] = tokens[end - count : end]
        return np.asarray(self.programs.run_packed(self._packed_bucket(size), self._caches, x, numbers))

    def _pick(self, segments: Segments, hidden: np.ndarray, pending: Pending | None) -> dict[int, SampledToken]:
        """The next token of each row that wants one, or its state, from hidden [N, 1, D]."""
        ends = segments.ends()
        chosen = [index for index, wants in enumerate(segments.wants) if wants]
        embedding = [index for index in chosen if segments.rows[index] in self._embedding]
        if embedding:
            states = {segments.rows[index]: self._embedded(hidden[ends[index] - 1 : ends[index]]) for index in embedding}
            drawn = replace(segments, wants=[wants and index not in embedding for index, wants in enumerate(segments.wants)])
            self.programs.sampled_s = 0.0
            return states | (self._pick(drawn, hidden, pending) if any(drawn.wants) else {})
        rows, at = [segments.rows[index] for index in chosen], [ends[index] - 1 for index in chosen]
        size = Buckets.fit(self.buckets.rows, len(rows))
        x = np.zeros((size, *hidden.shape[1:]), hidden.dtype)
        x[: len(rows)] = hidden[at]
        draw, seen = None, self.buckets.lengths[0]
        if not all(self._table.likeliest_allowed[row] for row in rows):
            positions = np.zeros(size, np.int32)
            positions[: len(rows)] = [segments.starts[index] + segments.counts[index] - 1 for index in chosen]
            seen = Buckets.fit(self.buckets.lengths, int(positions.max()) + 1)
            history = np.zeros((size, seen), np.int32)
            history[: len(rows)] = self._history[rows, :seen]
            draw = (history, positions, *self._table.of(rows, size))
        picked = self.programs.pick(x, len(rows), seen, draw, *_applied(pending, rows, size))
        host = to_host(picked, logprobs=draw is not None and any(self._table.logprobs(row) >= 0 for row in rows))
        return dict(zip(rows, self._shaped(pending, rows, [self._token(host, index, row) for index, row in enumerate(rows)]), strict=True))

    def _count(self, segments: Segments, tokens: int, seconds: float) -> None:
        decoded = sum(segments.decoding)
        counters = self.counters
        if decoded:
            counters.decode_steps += 1
            counters.decode_tokens += decoded
            counters.decode_s += seconds * decoded / tokens
        if decoded < len(segments):
            counters.prefill_steps += 1
            counters.prefill_tokens += tokens - decoded
            counters.prefill_s += seconds * (tokens - decoded) / tokens

    def _packed_bucket(self, size: int) -> ShapeBucket:
        return ShapeBucket(False, size, self.context, packed=True)

    def _begin_packed(self, segments: Segments, tokens: np.ndarray) -> Pending | None:
        for row, start, count, end in zip(segments.rows, segments.starts, segments.counts, segments.ends(), strict=True):
            if row in self._shapes:
                self._shapes.fed(row, start, tokens[end - count : end].tolist())
        return self._begin_shaping([row for row, wants in zip(segments.rows, segments.wants, strict=True) if wants])

    def _begin_shaping(self, rows: list[int]) -> Pending | None:
        return self._shapes.begin(rows) if self.last else None

    def _shaped(self, pending: Pending | None, rows: list[int], tokens: list[SampledToken]) -> list[SampledToken]:
        """The tokens, NOT_ALLOWED in place of those whose grammar allows nothing. What may follow the others is computed from now on."""
        if pending is None:
            return tokens
        tokens = [SampledToken(NOT_ALLOWED) if row in pending.failed else token for row, token in zip(rows, tokens, strict=True)]
        self._shapes.sampled(rows, [token.id for token in tokens])
        return tokens

    def _fresh_cache(self, layer: int, slots: int) -> LayerCache:
        info, dtype = self.manifest.cache[layer], self.manifest.cache_dtype
        shapes = ((self.rows, info.kv_heads, slots, cache_width(dtype, dim)) for dim in (info.key_dim, info.value_dim))
        key, value = (jnp.zeros(shape, CACHE_DTYPES[dtype]) if info.attends else None for shape in shapes)
        places = self.rows * STATE_PLACES + SPARE_STATES
        return LayerCache(key, value, tuple(jnp.zeros((places, *state.shape), jnp.float32) for state in info.states))

    def _buckets(self) -> Iterator[ShapeBucket | Pick]:
        """Every shape a step can have."""
        if self._packs:
            yield from map(self._packed_bucket, self._token_sizes)
            if self.config.head:
                yield from (Pick(rows, seen) for rows in self.buckets.rows for seen in self.buckets.lengths)
            return
        for length in self.buckets.lengths:
            for rows in self.buckets.rows:
                yield ShapeBucket(False, rows, length)
            for smaller, chunk in pairwise((0, *self.buckets.chunks)):
                if length > smaller:
                    yield ShapeBucket(True, chunk, length)

    def _compile(self, bucket: ShapeBucket | Pick) -> None:
        if isinstance(bucket, Pick):
            self.programs.compile_pick(bucket)
        elif bucket.packed:
            self.programs.compile_packed(bucket, self._caches)
        else:
            self.programs.compile(bucket, self._caches, self._history)

    def _compile_copies(self) -> None:
        histories = () if self._history is None or isinstance(self._history, np.ndarray) else ((self._history,),)
        for size in self.buckets.copies:
            for arrays in (*((cache.key, cache.value) for cache in self._caches), *histories):
                self.programs.compile_copy(arrays, size)

    def _token(self, sampled: Sampled, index: int, row: int) -> SampledToken:
        wanted = self._table.logprobs(row)
        token = int(sampled.tokens[index])
        if wanted < 0:
            return SampledToken(token)
        pairs = zip(sampled.top_tokens[index][:wanted], sampled.top_logprobs[index][:wanted], strict=True)
        return SampledToken(token, float(sampled.logprob[index]), tuple((int(i), float(p)) for i, p in pairs if np.isfinite(p)))

    def _embedded(self, hidden: np.ndarray) -> SampledToken:
        """The state after the final norm of hidden [1, 1, D], in place of a token."""
        return SampledToken(EMBEDDED, state=self.programs.state(hidden))

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.rows:
            raise BadRequest(f"row {row} is not one of this stage's {self.rows} rows", field="row")

    def _check_positions(self, first: int, last: int) -> None:
        if first < 0:
            raise BadRequest(f"position {first} is negative", field="position")
        if last >= self.context:
            raise PromptTooLong(
                f"position {last} is beyond the context of {self.context} tokens: shorten the prompt or the answer",
                tokens=last + 1,
                limit=self.context,
            )

    def _check_hidden(self, hidden: np.ndarray | None, count: int) -> np.ndarray | None:
        if self.first:
            return None
        want = (count, self.manifest.hidden.size)
        if hidden is None or hidden.shape != want or hidden.dtype != self._dtype:
            got = "nothing" if hidden is None else f"{hidden.dtype} {hidden.shape}"
            raise BadRequest(f"this stage needs a hidden state of {self._dtype} {want}, not {got}", field="hidden")
        return hidden


def _applied(
    pending: Pending | None, rows: Sequence[int], size: int
) -> tuple[Callable[[], Shaping] | None, Callable[[], np.ndarray] | None]:
    """What Programs asks for, where tokens are drawn and where the likeliest allowed ones suffice."""
    return (None, None) if pending is None else (partial(pending.take, rows, size), partial(pending.allowed, rows, size))


def _no_vocabulary(manifest: Manifest) -> Vocabulary:
    raise BadRequest(f"this stage of {manifest.name} was made without a tokenizer: load it from its directory", field="structured_outputs")


def _compilers() -> int:
    """How many programs to compile at a time. One alone leaves part of two cores idle, and each takes memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4)
