"""Every import verifies itself: the source, its blocks in stock onnxruntime, and its blocks in our runtime must agree.

    source     the original graph in onnxruntime (ONNX sources): logits of whole sequences
    oracle     the blocks in stock onnxruntime, one after the other: a chunk, then the rest on its cache
    runtime    the embedding, and the layers as stages run them: prompts prefilled whole and in chunks, then 32 decode steps of all rows

Sequences are three random prompts. The source's own greedy tokens continue them if it is small enough to be run whole, random
tokens otherwise. Logits are compared at every position, so agreement means equal greedy tokens. Blocks are verified in groups
that fit a budget of memory, so that a model of any size can be verified. Late positions are compared too: after made-up keys and values,
or, where layers carry states, at the end of one longer sequence.
"""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from mesh.errors import UnsupportedModel, VerificationFailed
from mesh.importer.verify.oracle import OrtBlock, OrtParts
from mesh.model.manifest import CacheInfo, Manifest, block_name
from mesh.runtime.loading import load_block, read_model
from mesh.runtime.programs import Compiled
from mesh.runtime.row_states import EVERY
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import DType, LayerRange, Progress, no_progress

__all__ = ["GREEDY_STEPS", "MadeUpCache", "Outside", "Reference", "runtime_logits", "verify"]

Array = npt.NDArray[Any]
Reference = Callable[[Array], Array]
"""The source's logits of a whole sequence: tokens [T] -> [T, V] float32."""


@dataclass(frozen=True)
class Outside:
    """What runs the source itself, in an engine of its own.

    greedy: fast enough to be run token by token. rows: the logits of whole sequences, where it is slow. parts: the source part by part.
    late: the logits of tokens [T] after made-up keys and values, which is how a late position is reached at once. owners: the layer whose
    keys and values each layer reads; nothing where each has its own. dtype: the type of its arithmetic, to which its logits are right.
    """

    engine: str
    greedy: Reference | None = None
    rows: Reference | None = None
    parts: OrtParts | None = None
    late: Callable[[Array, MadeUpCache], Array] | None = None
    owners: tuple[int, ...] = ()
    dtype: DType = "float32"


@dataclass(frozen=True)
class MadeUpCache:
    """Keys and values of `start` positions that no token has made, one layer at a time: they are computed when they are asked for."""

    cache: tuple[CacheInfo, ...]
    start: int
    seed: int
    owners: tuple[int, ...] = ()

    @property
    def held(self) -> int:
        """How many layers have keys and values of their own: the first ones."""
        return len(set(self.owners)) or len(self.cache)

    def layer(self, index: int) -> tuple[Array, Array]:
        """The key [heads, start, width] and the value that one layer reads."""
        index = self.owners[index] if self.owners else index
        info, rng = self.cache[index], np.random.default_rng((self.seed, index))
        key, value = (rng.standard_normal((info.kv_heads, self.start, width), np.float32) for width in (info.key_dim, info.value_dim))
        return LATE_SCALE * key, LATE_SCALE * value


NOTHING = Outside("")

GREEDY_STEPS = 32
PROMPT_LENGTHS = (24, 13, 9)
CHUNK = 16
GROUP_BYTES = 64 << 20  # a larger layer is a group of its own

LARGE_BLOCK = 256 << 20
ORACLE_TOKENS = 8  # that onnxruntime takes at a time through a larger block

LATE_TOKENS = 8
LONG_TOKENS = EVERY + 64
LATE_SCALE = np.float32(0.5)
LATE_BYTES = 128 << 20  # of the made-up keys and values of a layer
LATE_TOLERANCE = 3e-7  # for each position

TOLERANCE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 6e-2}
# The most that storing weights in fewer bits may change, as a share of the logits. More means damaged weights, not rounding.
STORED_TOLERANCE = {32: 0.0, 16: 5e-2, 8: 0.25, 4: 0.8}
# The same at least where a router chooses experts: rounding lets it choose another one, which changes more than the rounding itself.
ROUTED_TOLERANCE = 0.25


@dataclass(frozen=True)
class Sequences:
    """Rows of tokens [T]; `prompts` [i] of each are prefilled, the rest is decoded one by one."""

    tokens: list[Array]
    prompts: list[int]


def verify(
    directory: Path,
    manifest: Manifest,
    *,
    outside: Outside = NOTHING,
    seed: int = 0,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Verify a model directory; returns what was measured, for the manifest's report.

    The greedy tokens of `outside` continue the prompts, if it can be run so often. VerificationFailed names the first layer that differs
    and by how much.
    """
    reference, parts = outside.greedy, outside.parts
    sequences = _sequences(manifest, reference, seed)
    tolerance = TOLERANCE[manifest.weights.inputs or manifest.hidden.dtype]
    oracle_runs = True
    ours: list[Array] = [np.asarray(tokens, np.int64) for tokens in sequences.tokens]  # tokens, then hidden [T, D]
    theirs: list[Array] = list(ours)
    worst = 0.0
    groups = list(_groups(manifest))
    compiled: Compiled = {}
    for index, group in enumerate(groups):
        progress(f"verify {group}", index, len(groups) + 1)
        if oracle_runs:
            try:
                theirs = _oracle_group(directory, manifest, group, theirs)
            except UnsupportedModel:
                if manifest.hidden.dtype == "float32":
                    raise
                oracle_runs = False  # stock onnxruntime has no kernels of this type on the CPU
        ours = _runtime_group(directory, manifest, group, ours, sequences, compiled=compiled)
        if oracle_runs:
            error = _error(ours, theirs)
            worst = max(worst, error)
            if not error <= tolerance:
                layer, error = _first_layer(directory, manifest, group, sequences, fallback=error)
                raise _failed(f"layer {layer} differs from onnxruntime's result for the same block", layer, error, tolerance)
    progress("verify head", len(groups), len(groups) + 1)
    logits = _logits(directory, ours)
    if oracle_runs:
        head = OrtBlock(directory, "head")
        error = max((_error([got], [head.run(hidden, 0)]) for got, hidden in zip(logits, ours, strict=True)), key=_nan_first)
        del head
        worst = max(worst, error)
        if not error <= tolerance:
            raise _failed("the head differs from onnxruntime's result for the same block", None, error, tolerance)
    report: dict[str, Any] = {
        "positions": int(sum(len(tokens) for tokens in sequences.tokens)),
        "greedy_steps": GREEDY_STEPS * len(PROMPT_LENGTHS),
        "oracle": "onnxruntime" if oracle_runs else None,
        "oracle_error": worst if oracle_runs else None,
    }
    stored = 0.0 if manifest.weights.kept else STORED_TOLERANCE[manifest.weights.bits]
    if stored and _chooses(directory, manifest):
        stored = max(stored, ROUTED_TOLERANCE)
    allowed = max(tolerance, stored, TOLERANCE[outside.dtype])
    whole = reference or outside.rows
    if whole is not None or parts is not None:
        progress(f"compare with {outside.engine}", len(groups), len(groups) + 1)
        expected = [whole(tokens) for tokens in sequences.tokens[:-1]] if whole is not None else _source(parts, manifest, sequences)
        report["source_engine"] = outside.engine
        try:
            report |= _against_source(manifest, sequences, logits, [*expected, expected[0]], allowed, outside.dtype)
        except VerificationFailed as error:
            if parts is None:
                raise
            layer, at = _first_layer_of_source(directory, manifest, sequences, parts, allowed)
            where = "the embedding or the head" if layer is None else f"layer {layer}"
            raise _failed(f"{where} is the first that differs from the source's", layer, at or error.error or 0.0, allowed) from None
    if manifest.has_states and whole is not None:
        report["late_positions"] = _compare_long(directory, manifest, outside.engine, whole, allowed, seed)
    elif outside.late is not None and oracle_runs:
        report["late_positions"] = _compare_late(directory, manifest, outside, allowed, seed)
    progress("verified", len(groups) + 1, len(groups) + 1)
    return report


def _chooses(directory: Path, manifest: Manifest) -> bool:
    """Whether a router of some layer chooses experts."""
    graphs = (read_model(directory / f"{block_name(layer)}.onnx").graph for layer in range(manifest.layers))
    return any(node.op_type == "TopK" for graph in graphs for node in graph.node)


def _compare_late(directory: Path, manifest: Manifest, outside: Outside, allowed: float, seed: int) -> list[int]:
    """Compare tokens far into the context, after keys and values that are made up: beyond every window, and at the context's end.

    Returns the positions that were compared.
    """
    assert outside.late is not None
    rng = np.random.default_rng(seed)
    done = []
    for start in _late_positions(manifest):
        tokens = rng.integers(0, manifest.vocab_size, LATE_TOKENS)
        past = MadeUpCache(manifest.cache, start, seed, outside.owners)
        error = _error([_late_logits(directory, manifest, tokens, past)], [outside.late(tokens, past)])
        # frequencies that differ in their last bit turn a late position by as many bits as it has
        limit = max(allowed, LATE_TOLERANCE * start)
        if not error <= limit:
            raise _failed(f"the logits at position {start} differ from those of {outside.engine}", None, error, limit)
        done.append(start)
    return done


def _compare_long(directory: Path, manifest: Manifest, engine: str, whole: Reference, allowed: float, seed: int) -> list[int]:
    """Compare the last tokens of a sequence that is longer than the distance of two checkpoints: states are those of all tokens before,
    and cannot be made up. Returns the position from which on tokens were compared."""
    tokens = np.random.default_rng(seed).integers(0, manifest.vocab_size, min(LONG_TOKENS, manifest.context_length))
    (last,) = deque(runtime_logits(directory, manifest, tokens), maxlen=1)
    count = min(LATE_TOKENS, len(last))
    start = len(tokens) - count
    error = _error([last[-count:]], [whole(tokens)[-count:]])
    if not error <= allowed:
        raise _failed(f"the logits at position {start} differ from those of {engine}", None, error, allowed)
    return [start]


def _late_positions(manifest: Manifest) -> list[int]:
    """Where a chunk of late tokens starts: across the end of each window and beyond it, and at the end of the context."""
    last = manifest.context_length - LATE_TOKENS
    held = max(c.kv_heads * (c.key_dim + c.value_dim) * 4 for c in manifest.cache)
    most = min(last, LATE_BYTES // held)
    windows = {c.window for c in manifest.cache if c.window is not None}
    wanted = {most, *(w - LATE_TOKENS // 2 for w in windows), *(w + LATE_TOKENS for w in windows)}
    return sorted(start for start in wanted if 0 < start <= most)


def _late_logits(directory: Path, manifest: Manifest, tokens: Array, past: MadeUpCache) -> Array:
    """Our logits of tokens [T] after `past`, block by block in onnxruntime."""
    start = past.start
    row = OrtBlock(directory, "embed").run(tokens, start)
    for layer, info in enumerate(manifest.cache):
        block = OrtBlock(directory, block_name(layer), slots=start + len(tokens), cache=info, dtype=jnp.dtype(manifest.cache_dtype))
        block.preset(*past.layer(layer))
        row = block.run(row, start)
    return OrtBlock(directory, "head").run(row, 0).astype(np.float32)


def runtime_logits(directory: Path, manifest: Manifest, tokens: Array) -> Iterator[Array]:
    """Our logits for each position of one sequence, in slices [up to 64, V] float32."""
    hidden: list[Array] = [np.asarray(tokens, np.int64)]
    sequences = Sequences([hidden[0]], [len(tokens)])
    compiled: Compiled = {}
    for group in _groups(manifest):
        hidden = _runtime_group(directory, manifest, group, hidden, sequences, compiled=compiled, chunk=128)
    yield from _head(directory, hidden[0])


def _sequences(manifest: Manifest, reference: Reference | None, seed: int) -> Sequences:
    rng = np.random.default_rng(seed)
    room = manifest.context_length
    steps = min(GREEDY_STEPS, max(1, room // 2))
    prompts = [max(1, min(length, room - steps)) for length in PROMPT_LENGTHS]
    rows = []
    for length in prompts:
        tokens = rng.integers(0, manifest.vocab_size, length)
        for _ in range(min(steps, room - length)):
            following = rng.integers(0, manifest.vocab_size) if reference is None else reference(tokens)[-1].argmax()
            tokens = np.append(tokens, following)
        rows.append(tokens.astype(np.int64))
    # The first prompt once more, to be prefilled in chunks instead.
    return Sequences([*rows, rows[0]], [*prompts, prompts[0]])


def _groups(manifest: Manifest) -> Iterator[LayerRange]:
    """Layer ranges whose weights fit the budget together; embed and head are counted with neither."""
    start, held = 0, 0
    for layer in range(manifest.layers):
        size = manifest.block(block_name(layer)).weight_bytes
        if layer > start and held + size > GROUP_BYTES:
            yield LayerRange(start, layer)
            start, held = layer, 0
        held += size
    yield LayerRange(start, manifest.layers)


def _oracle_group(directory: Path, manifest: Manifest, group: LayerRange, rows: list[Array]) -> list[Array]:
    names = ([block_name("embed")] if group.start == 0 else []) + [block_name(i) for i in group]
    for name in names:
        rows = _oracle_block(directory, manifest, name, _distinct(rows))
        rows.append(rows[0])
    return rows


def _distinct(rows: list[Array]) -> list[Array]:
    """All but the last row, which repeats the first."""
    return rows[:-1]


def _oracle_block(directory: Path, manifest: Manifest, name: str, rows: Sequence[Array]) -> list[Array]:
    """Rows through one block, one after the other: a first chunk of each, then the rest on the cache it left. A large block takes few
    tokens at a time: where it has experts, onnxruntime copies the weights of each expert that a token has chosen."""
    cache = None if name == "embed" else manifest.cache[int(name.removeprefix("layer_"))]
    widen = 4 * manifest.block(name).parameters <= LARGE_BLOCK  # it is run several times, and a small one is no matter in memory
    slots = max(map(len, rows)) + 3
    block = OrtBlock(directory, name, slots=slots, cache=cache, dtype=jnp.dtype(manifest.cache_dtype), widen=widen)
    results = []
    for row in rows:
        block.forget()
        most = ORACLE_TOKENS if manifest.block(name).weight_bytes > LARGE_BLOCK else len(row)
        size = min(most, max(1, len(row) // 2))
        results.append(np.concatenate([block.run(row[start : start + size], start) for start in range(0, len(row), size)]))
    return results


def _runtime_group(
    directory: Path,
    manifest: Manifest,
    group: LayerRange,
    rows: list[Array],
    sequences: Sequences,
    *,
    compiled: Compiled | None = None,
    chunk: int = 32,
) -> list[Array]:
    """Run the rows through the layers as a stage does: tokens [T] or hidden [T, D] of each row -> hidden [T, D] of each. The embedding,
    which may be larger than any layer, is gone before the layers are loaded."""
    if group.start == 0:
        rows = _embedded(directory, rows)
        gc.collect()
    longest = max(len(row) for row in rows)
    config = StageConfig(group, embed=False, head=False, rows=len(rows), context=longest, chunk=chunk, checksums=False)
    stage = Stage.load(directory, config, manifest=manifest, compiled=compiled)
    tokens = sequences.tokens
    out: list[list[Array]] = [[] for _ in rows]
    for index, row in enumerate(rows):
        prompt = sequences.prompts[index]
        step = CHUNK if index == len(rows) - 1 and len(rows) > 1 else stage.buckets.chunks[-1]
        for start in range(0, prompt, step):
            stop = min(start + step, prompt)
            out[index].append(np.asarray(stage.prefill(index, start, tokens[index][start:stop], row[start:stop])))
    positions = list(sequences.prompts)
    while any(position < len(row) for position, row in zip(positions, rows, strict=True)):
        live = [index for index, row in enumerate(rows) if positions[index] < len(row)]
        at = np.array([positions[index] for index in live])
        hidden = np.stack([rows[index][positions[index]] for index in live])
        result = np.asarray(stage.decode(np.array(live), at, np.array([tokens[index][positions[index]] for index in live]), hidden))
        for place, index in enumerate(live):
            out[index].append(result[place : place + 1])
            positions[index] += 1
    del stage
    gc.collect()  # frees its weights before those of the next group are loaded
    return [np.concatenate(parts) for parts in out]


def _embedded(directory: Path, rows: list[Array]) -> list[Array]:
    """tokens [T] of each row -> hidden [T, D] of each."""
    block = load_block(directory, block_name("embed"))
    longest = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), longest), np.int64)
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    positions = np.broadcast_to(np.arange(longest), tokens.shape)

    @jax.jit
    def run(weights: Any, ids: Any, at: Any) -> Any:
        return block.lowered(weights, {"input_ids": ids, "position_ids": at})["hidden_out"]

    hidden = np.asarray(run(block.weights, tokens, positions))
    return [hidden[index, : len(row)] for index, row in enumerate(rows)]


def _logits(directory: Path, rows: list[Array]) -> list[Array]:
    """hidden [T, D] of each row -> its logits [T, V]; the head is loaded once, and gone afterwards."""
    hidden = np.concatenate(rows)
    logits, done = np.empty(0, np.float32), 0
    for piece in _head(directory, hidden):
        if not done:
            logits = np.empty((len(hidden), piece.shape[1]), np.float32)
        logits[done : done + len(piece)] = piece
        done += len(piece)
    gc.collect()
    return np.split(logits, np.cumsum([len(row) for row in rows])[:-1])


def _head(directory: Path, hidden: Array) -> Iterator[Array]:
    """hidden [T, D] -> logits [64 or fewer, V] float32, slice by slice, padded so that one program serves all."""
    block = load_block(directory, block_name("head"))
    size = min(64, len(hidden))

    @jax.jit
    def run(weights: Any, x: Any) -> Any:
        return block.lowered(weights, {"hidden_in": x})["logits"].astype(jnp.float32)

    for start in range(0, len(hidden), size):
        piece = hidden[start : start + size]
        padded = np.zeros((1, size, hidden.shape[1]), hidden.dtype)
        padded[0, : len(piece)] = piece
        yield np.asarray(run(block.weights, padded))[0, : len(piece)]


def _source(parts: OrtParts | None, manifest: Manifest, sequences: Sequences) -> list[Array]:
    """The source's logits, part by part; never more than one part in memory."""
    assert parts is not None
    tokens = _distinct(sequences.tokens)
    rows = tokens
    for index in range(manifest.layers + 2):
        rows = parts.run(index, tokens, rows)
    return [row.astype(np.float32) for row in rows]


def _first_layer_of_source(
    directory: Path, manifest: Manifest, sequences: Sequences, parts: OrtParts, tolerance: float
) -> tuple[int | None, float | None]:
    """The first layer that differs from the source's own nodes. Each is given what the source's parts before it compute."""
    tokens = _distinct(sequences.tokens)
    rows = parts.run(0, tokens, tokens)
    for layer in range(manifest.layers):
        given = [row.astype(jnp.dtype(manifest.hidden.dtype)) for row in rows]
        ours = _oracle_block(directory, manifest, block_name(layer), given)
        rows = parts.run(layer + 1, tokens, rows)
        error = _error(ours, rows)
        if not error <= tolerance:
            return layer, error
    return None, None


def _against_source(
    manifest: Manifest, sequences: Sequences, logits: list[Array], expected: list[Array], tolerance: float, dtype: DType
) -> dict[str, Any]:
    error = _error(logits, expected)
    same = total = 0
    for got, want, prompt in zip(logits, expected, sequences.prompts, strict=True):
        got, want = got[prompt - 1 :], want[prompt - 1 :]
        margin = np.take_along_axis(want, want.argmax(-1)[:, None], -1) - np.take_along_axis(want, got.argmax(-1)[:, None], -1)
        # Two tokens that differ by less than rounding are a tie: in the source too, rounding decides between them.
        tie = margin[:, 0] <= max(TOLERANCE[manifest.hidden.dtype], TOLERANCE[dtype]) * np.abs(want).max(-1)
        same += int(((got.argmax(-1) == want.argmax(-1)) | tie).sum())
        total += len(got)
    exact = (manifest.weights.bits == 32 or manifest.weights.kept is not None) and manifest.hidden.dtype == dtype == "float32"
    if not error <= tolerance:
        raise _failed("the logits differ from the source's", None, error, tolerance)
    if exact and same != total:
        raise VerificationFailed(f"{total - same} of {total} greedy tokens differ from the source's: please report this model", error=error)
    return {"source_error": error, "source_greedy_equal": same / total}


def _first_layer(
    directory: Path, manifest: Manifest, group: LayerRange, sequences: Sequences, *, fallback: float
) -> tuple[int | None, float]:
    """The first layer of a group that differs, and by how much. Each runs alone, on the input that the oracle computed."""
    tolerance = TOLERANCE[manifest.weights.inputs or manifest.hidden.dtype]
    rows: list[Array] = [np.asarray(tokens, np.int64) for tokens in sequences.tokens]
    for layer in range(group.stop):
        one = LayerRange(layer, layer + 1)
        expected = _oracle_group(directory, manifest, one, rows)
        error = _error(_runtime_group(directory, manifest, one, rows, sequences), expected)
        if not error <= tolerance:
            return layer, error
        rows = expected
    return None, fallback


def _error(ours: Sequence[Array], theirs: Sequence[Array]) -> float:
    """The largest relative error of any row: |a - b| / |b| over all its numbers; NaN where either has one."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        error = float(np.linalg.norm(wide_a - wide_b) / max(float(np.linalg.norm(wide_b)), 1e-30))
        worst = error if np.isnan(error) else max(worst, error)
        if np.isnan(worst):
            break
    return worst


def _nan_first(error: float) -> float:
    return float("inf") if np.isnan(error) else error


def _failed(what: str, layer: int | None, error: float, tolerance: float) -> VerificationFailed:
    text = (
        f"verification failed: {what} (relative error {error:.2g}, allowed {tolerance:.2g}); nothing was written, please report this model"
    )
    return VerificationFailed(text, layer=layer, error=error)
