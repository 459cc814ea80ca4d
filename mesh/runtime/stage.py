"""A stage: one layer range on one device.

    Stage.load(directory, config)    memory predicted and refused if over, files checked, blocks lowered, weights packed
    stage.warm_up()                  every program compiled; nothing compiles afterwards
    stage.open(row, params)          a session's sampling parameters, on the last stage
    stage.prefill(row, start, x)     a chunk of one row
    stage.decode(rows, positions, x) one token for each of several rows

Synchronous, one caller at a time. What is written at a position depends only on that position's input and on what is before
it, so a step that is repeated changes nothing: recovery is replay.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mesh.errors import BadRequest, DoesNotFit, PromptTooLong
from mesh.lowering.weights import Forms, PackedWeight
from mesh.memory import MemoryNeed, predict
from mesh.model.manifest import Manifest
from mesh.runtime.buckets import Buckets
from mesh.runtime.cache import SLACK
from mesh.runtime.loading import Block, block_names, load_block
from mesh.runtime.sampling import RowTable, Sampled, SamplingParams
from mesh.runtime.step import LayerCache, Program, State
from mesh.types import LayerRange
from mesh.units import format_bytes

__all__ = ["Stage", "StageConfig", "Token"]

_DTYPES: dict[str, Any] = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class StageConfig:
    """What a stage holds and for how much. embed and head None: as the range begins at 0 and ends at the last layer.

    rows: sessions held at once. context: positions a row, at most (None: the model's). chunk: prefill tokens at a time.
    max_memory_bytes: refuse to load over this (None: no limit). checksums: read every file and compare its sha256.
    """

    layers: LayerRange
    embed: bool | None = None
    head: bool | None = None
    rows: int = 8
    context: int | None = None
    chunk: int = 256
    max_memory_bytes: int | None = None
    checksums: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token; `logprob` and `top` ((token, logprob), likeliest first) only where the row asked for them."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Counters:
    """Steps run and seconds in them, since load."""

    prefill_steps: int = 0
    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_steps: int = 0
    decode_tokens: int = 0
    decode_s: float = 0.0


class Stage:
    """See the module's docstring. Made by `load`."""

    def __init__(self, manifest: Manifest, config: StageConfig, blocks: Sequence[Block], need: MemoryNeed) -> None:
        self.manifest = manifest
        self.config = config
        self.layers = config.layers
        self.first = bool(config.embed)
        self.last = bool(config.head)
        self.rows = config.rows
        self.context = config.context or manifest.context_length
        self.need = need
        self.counters = Counters()
        self.buckets = Buckets.plan(rows=config.rows, context=self.context, chunk=config.chunk)
        graphs = [block.lowered for block in blocks]
        self.program = Program(embed=graphs.pop(0) if self.first else None, head=graphs.pop() if self.last else None, layers=tuple(graphs))
        self._weights = tuple(block.weights for block in blocks)
        self._table = RowTable(config.rows)
        self._dtype = np.dtype(_DTYPES[manifest.hidden.dtype])
        self._state = self._fresh_state()
        self._compiled: dict[tuple[str, int, int], Any] = {}

    # -- loading -------------------------------------------------------------------------------------------------------

    @classmethod
    def load(
        cls,
        directory: Path,
        config: StageConfig,
        *,
        forms: Callable[[PackedWeight], Forms] | None = None,
        progress: Progress = lambda what, done, total: None,
    ) -> Stage:
        """Errors: ModelNotFound, CorruptModel, BadLayerRange, DoesNotFit (with the figures), UnsupportedModel."""
        manifest = Manifest.load(directory)
        layers = manifest.check_range(config.layers)
        embed = layers.start == 0 if config.embed is None else config.embed
        head = layers.stop == manifest.layers if config.head is None else config.head
        context = min(config.context or manifest.context_length, manifest.context_length)
        config = StageConfig(layers, embed, head, config.rows, context, config.chunk, config.max_memory_bytes, config.checksums)
        need = predict(manifest, layers, embed=embed, head=head, rows=config.rows, context=context, chunk=config.chunk)
        allowed = config.max_memory_bytes
        if allowed is not None and need.total_bytes > allowed:
            raise DoesNotFit(
                f"layers {layers} of {manifest.name} need {format_bytes(need.total_bytes)} "
                f"(weights {format_bytes(need.weights_bytes)}, KV cache {format_bytes(need.cache_bytes)} for {config.rows} rows of "
                f"{context} tokens, workspace {format_bytes(need.workspace_bytes)}) but {format_bytes(allowed)} are allowed: "
                "give fewer layers, rows or context, more memory, or import at fewer bits",
                needed_bytes=need.total_bytes,
                allowed_bytes=allowed,
            )
        manifest.verify_files(Path(directory), layers, checksums=config.checksums, embed=embed, head=head)
        names = block_names(layers, embed=embed, head=head)
        blocks = []
        for index, name in enumerate(names):
            progress(f"load {name}", index, len(names))
            blocks.append(load_block(Path(directory), name, forms=forms))
        progress("loaded", len(names), len(names))
        return cls(manifest, config, blocks, need)

    def warm_up(self, progress: Progress = lambda what, done, total: None) -> None:
        """Compile every program the buckets allow. Idempotent."""
        wanted = [key for key in self._programs() if key not in self._compiled]
        for index, key in enumerate(wanted):
            kind, size, length = key
            progress(f"compile {kind} {size} x {length}", index, len(wanted))
            self._executable(*key)
        progress("compiled", len(wanted), len(wanted))

    def compile_for(self, prompt_length: int, max_tokens: int) -> None:
        """Compile the programs of one request alone: its prefill chunks, then decode steps of one row."""
        chunk = self.buckets.chunks[-1]
        for start in range(0, prompt_length, chunk):
            count = min(chunk, prompt_length - start)
            self._executable("prefill", self.buckets.chunk(start, count), Buckets.fit(self.buckets.lengths, start + count))
        for size in self.buckets.lengths:
            if size >= Buckets.fit(self.buckets.lengths, prompt_length) and max_tokens > 1:
                self._executable("decode", self.buckets.rows[0], size)
            if size >= prompt_length + max_tokens:
                break

    # -- steps ---------------------------------------------------------------------------------------------------------

    def open(self, row: int, params: SamplingParams, *, prompt_length: int) -> None:
        """Give a row its sampling parameters; only the last stage has use for them."""
        self._check_row(row)
        self._table.set(row, params, prompt_length=prompt_length)

    def prefill(self, row: int, start: int, tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray | Token:
        """Run tokens [T] (and, unless this is the first stage, their hidden state [T, D]) of `row` from position `start` on.

        Returns hidden [T, D] of the compute type, or on the last stage the token sampled after the last one.
        """
        self._check_row(row)
        tokens = np.asarray(tokens, np.int32)
        if tokens.ndim != 1 or not len(tokens):
            raise BadRequest(f"a chunk needs at least one token, not an array of shape {tokens.shape}", field="tokens")
        self._check_positions(start, start + len(tokens) - 1)
        hidden = self._check_hidden(hidden, len(tokens))
        began = time.perf_counter()
        pieces: list[np.ndarray] = []
        result: Any = None
        done = 0
        while done < len(tokens):
            size = self.buckets.chunk(start + done, len(tokens) - done)
            count = min(size, len(tokens) - done)
            result = self._prefill_chunk(
                row, start + done, tokens[done : done + count], None if hidden is None else hidden[done : done + count], size
            )
            if not self.last:
                pieces.append(np.asarray(result)[:count])
            done += count
        answer = self._token(result, 0, row) if self.last else pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        self.counters.prefill_steps += 1
        self.counters.prefill_tokens += len(tokens)
        self.counters.prefill_s += time.perf_counter() - began
        return answer

    def decode(
        self, rows: np.ndarray, positions: np.ndarray, tokens: np.ndarray, hidden: np.ndarray | None = None
    ) -> np.ndarray | list[Token]:
        """One step of a wave: tokens [n] (and hidden [n, D] unless this is the first stage) of `rows` [n] at `positions` [n].

        Returns hidden [n, D] in the same order, or on the last stage n tokens. Rows that are not named stay as they are.
        """
        rows, positions = np.asarray(rows, np.int32), np.asarray(positions, np.int32)
        tokens = np.asarray(tokens, np.int32)
        if not (rows.shape == positions.shape == tokens.shape) or rows.ndim != 1 or not len(rows):
            raise BadRequest("rows, positions and tokens of a decode step must be equally long and not empty", field="rows")
        low, high = int(rows.min()), int(rows.max())
        self._check_row(low)
        self._check_row(high)
        if len(np.unique(rows)) != len(rows):
            raise BadRequest("a row appears twice in a decode step", field="rows")
        last = int(positions.max())
        self._check_positions(int(positions.min()), last)
        hidden = self._check_hidden(hidden, len(rows))
        began = time.perf_counter()
        size = Buckets.fit(self.buckets.rows, high + 1)
        length = Buckets.fit(self.buckets.lengths, last + 1)
        wave_tokens = np.zeros(size, np.int32)
        wave_positions = np.zeros(size, np.int32)
        writes = np.full(size, self.context + SLACK - 1, np.int32)  # the slot nobody sees
        wave_tokens[rows], wave_positions[rows], writes[rows] = tokens, positions, positions
        x = self._no_hidden(size)
        if hidden is not None:
            x = np.zeros((size, self.manifest.hidden.size), self._dtype)
            x[rows] = hidden
        run = self._executable("decode", size, length)
        floats, ints = self._table.floats[:size], self._table.ints[:size]
        self._state, result = run(self._weights, self._state, x, wave_tokens, wave_positions, writes, floats, ints)
        if self.last:
            host = Sampled(*(np.asarray(part) for part in result))
            answer: Any = [self._token(host, int(row), int(row)) for row in rows]
        else:
            answer = np.asarray(result)[rows]
        self.counters.decode_steps += 1
        self.counters.decode_tokens += len(rows)
        self.counters.decode_s += time.perf_counter() - began
        return answer

    # -- inside --------------------------------------------------------------------------------------------------------

    def _prefill_chunk(self, row: int, start: int, tokens: np.ndarray, hidden: np.ndarray | None, size: int) -> Any:
        count = len(tokens)
        padded = np.zeros(size, np.int32)
        padded[:count] = tokens
        x = self._no_hidden(size)
        if hidden is not None:
            x = np.zeros((size, self.manifest.hidden.size), self._dtype)
            x[:count] = hidden
        length = Buckets.fit(self.buckets.lengths, start + count)
        run = self._executable("prefill", size, length)
        floats, ints = self._table.floats[row : row + 1], self._table.ints[row : row + 1]
        scalars = (np.int32(row), np.int32(start), np.int32(count))
        self._state, result = run(self._weights, self._state, x, padded, *scalars, floats, ints)
        return Sampled(*(np.asarray(part) for part in result)) if self.last else result

    def _fresh_state(self) -> State:
        slots = self.context + SLACK
        caches = []
        dtype = _DTYPES[self.manifest.cache_dtype]
        for layer in self.layers:
            info = self.manifest.cache[layer]
            shapes = ((self.rows, info.kv_heads, slots, dim) for dim in (info.key_dim, info.value_dim))
            caches.append(LayerCache(*(jnp.zeros(shape, dtype) for shape in shapes)))
        history = jnp.zeros((self.rows, slots) if self.last else (), jnp.int32)
        return State(tuple(caches), history)

    def _programs(self) -> Iterator[tuple[str, int, int]]:
        for length in self.buckets.lengths:
            for rows in self.buckets.rows:
                yield ("decode", rows, length)
            for chunk in self.buckets.chunks:
                if chunk <= length or chunk == self.buckets.chunks[0]:
                    yield ("prefill", chunk, length)

    def _executable(self, kind: str, size: int, length: int) -> Any:
        key = (kind, size, length)
        if key not in self._compiled:
            self._compiled[key] = self._compile(*key)
        return self._compiled[key]

    def _compile(self, kind: str, size: int, length: int) -> Any:
        def shape(dims: tuple[int, ...], dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(dims, dtype)

        table_rows = size if kind == "decode" else 1
        floats = shape((table_rows, self._table.floats.shape[1]), np.float32)
        ints = shape((table_rows, self._table.ints.shape[1]))
        x = shape(self._no_hidden(size).shape if self.first else (size, self.manifest.hidden.size), self._dtype)
        vector, scalar = shape((size,)), shape(())
        step = getattr(self.program, kind)
        args = (x, vector, vector, vector, floats, ints) if kind == "decode" else (x, vector, scalar, scalar, scalar, floats, ints)
        jitted = jax.jit(partial(step, length=length), donate_argnums=1)
        return jitted.lower(self._weights, self._state, *args).compile()

    def _no_hidden(self, size: int) -> np.ndarray:
        """What a first stage is given for a hidden state it does not read: [size, 0]."""
        return np.zeros((size, 0), self._dtype)

    def _token(self, sampled: Sampled, index: int, row: int) -> Token:
        wanted = int(self._table.ints[row, -1])
        token = int(sampled.tokens[index])
        if wanted < 0:
            return Token(token)
        pairs = zip(sampled.top_tokens[index][:wanted], sampled.top_logprobs[index][:wanted], strict=True)
        return Token(token, float(sampled.logprob[index]), tuple((int(i), float(p)) for i, p in pairs if np.isfinite(p)))

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
