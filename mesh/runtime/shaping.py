"""What changes a row's logits before a token is chosen: its grammar's mask, and its logit_bias.

    rows.open(row, params, prompt_length)     the grammar is compiled in a thread of this module, while the prompt is computed
    rows.fed(row, start, tokens)              the input of a step, before it runs
    rows.begin(rows) -> Pending               the masks are computed, while the step's layers are
    pending.take(rows, size) -> Shaping       the arrays of the step
    rows.sampled(row, token)                  the masks of the next step are computed at once, while other stages have the rows

A mask is a function of the row's grammar and of its tokens from `prompt_length` on, as penalties are: a step that is repeated, here or on
another shard, has the same mask. Rows that have neither grammar nor bias cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mesh.model.grammar import Matcher, Vocabulary
from mesh.protocol.frame import NOT_ALLOWED
from mesh.protocol.sampling import SamplingParams
from mesh.protocol.structured import MAX_BIASES

log = logging.getLogger("mesh.runtime")

__all__ = ["Pending", "RowShapes", "Shaping", "shape_logits"]


class Shaping(NamedTuple):
    """For each of B rows: allowed [B, ceil(V / 32)] int32, a bit for each token; and the biases of tokens, ids [B, K] int32 and values
    [B, K] float32, with zeros where there are fewer."""

    allowed: np.ndarray
    ids: np.ndarray
    values: np.ndarray


@dataclass(slots=True)
class _Row:
    """params: as they were opened. tokens: the row's output so far. matcher: there once it is compiled."""

    params: SamplingParams
    prompt_length: int
    matcher: Future[Matcher] | None
    tokens: list[int] = field(default_factory=list)

    def fed(self, start: int, tokens: Sequence[int]) -> None:
        at = start - self.prompt_length
        self.tokens += [NOT_ALLOWED] * (at - len(self.tokens))  # what is not known has no mask
        self.tokens = [*self.tokens[: max(at, 0)], *tokens[max(-at, 0) :]]


class RowShapes:
    """The rows of one stage. `vocabulary` makes the model's; it is called once, at the first grammar or by `warm_up`."""

    def __init__(self, vocabulary: Callable[[], Vocabulary], size: int) -> None:
        self._vocabulary = vocabulary
        self._size = size
        self._rows: dict[int, _Row] = {}
        # One thread each: a grammar that takes long to compile holds up no mask.
        self._compiling = ThreadPoolExecutor(1, "grammar")
        self._masking = ThreadPoolExecutor(1, "mask")
        self._loaded: Future[Vocabulary] | None = None

    def warm_up(self) -> None:
        """Read the vocabulary in the background, so that the first grammar does not wait for it."""
        self._load()

    def open(self, row: int, params: SamplingParams, *, prompt_length: int) -> None:
        """Give a row its parameters. A row that is opened again with the same ones keeps its tokens."""
        if not params.shaped:
            self._rows.pop(row, None)
            return
        had = self._rows.get(row)
        if had is not None and had.prompt_length == prompt_length and had.params == params:
            return
        matcher = None
        if params.grammar is not None:
            loaded = self._load()
            matcher = self._compiling.submit(lambda: loaded.result().matcher(params.grammar or ""))
        self._rows[row] = _Row(params, prompt_length, matcher)

    def __contains__(self, row: int) -> bool:
        return row in self._rows

    def fed(self, row: int, start: int, tokens: Sequence[int]) -> None:
        """`tokens` are the input of `row` from position `start` on."""
        shaped = self._rows.get(row)
        if shaped is not None:
            shaped.fed(start, tokens)

    def begin(self, rows: Sequence[int]) -> Pending | None:
        """Compute the masks of those of `rows` that have a grammar. None: no row needs shaping."""
        shaped = {row: self._rows[row] for row in rows if row in self._rows}
        if not shaped:
            return None
        states = {row: (each.matcher, list(each.tokens)) for row, each in shaped.items() if each.matcher is not None}
        return Pending(shaped, self._masking.submit(_masks, states), self._size)

    def sampled(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """`tokens` were sampled for `rows`: what may follow them is computed now, not when the next step has come."""
        states = {}
        for row, token in zip(rows, tokens, strict=True):
            shaped = self._rows.get(row)
            if shaped is not None and shaped.matcher is not None and token != NOT_ALLOWED:
                states[row] = (shaped.matcher, [*shaped.tokens, token])
        if states:
            self._masking.submit(_masks, states)

    def _load(self) -> Future[Vocabulary]:
        if self._loaded is None or (self._loaded.done() and self._loaded.exception() is not None):
            self._loaded = self._compiling.submit(self._vocabulary)
        return self._loaded


class Pending:
    """Masks that are being computed. `failed`: the rows whose grammar allows nothing, once they were taken."""

    def __init__(self, shaped: dict[int, _Row], masks: Future[dict[int, np.ndarray | None]], size: int) -> None:
        self._shaped = shaped
        self._masks = masks
        self._size = size
        self.failed: set[int] = set()

    def take(self, rows: Sequence[int], size: int) -> Shaping:
        """The arrays of a step whose places 0 to `size` are of `rows`, or of none. Waits for the masks."""
        allowed = np.full((size, -(-self._size // 32)), -1, np.int32)
        ids, values = np.zeros((size, MAX_BIASES), np.int32), np.zeros((size, MAX_BIASES), np.float32)
        masks = self._masks.result()
        for row, shaped in self._shaped.items():
            at, mask = rows.index(row), masks.get(row)
            if mask is not None:
                allowed[at] = mask
            elif shaped.matcher is not None:
                self.failed.add(row)
            for place, (token, bias) in enumerate(shaped.params.logit_bias.items()):
                ids[at, place], values[at, place] = int(token), bias
        return Shaping(allowed, ids, values)


def _masks(states: dict[int, tuple[Future[Matcher], list[int]]]) -> dict[int, np.ndarray | None]:
    """The mask after each answer; None where there is none. In the masking thread alone: a matcher is used by one thread at a time."""
    return {row: _mask(matcher, tokens) for row, (matcher, tokens) in states.items()}


def _mask(matcher: Future[Matcher], tokens: list[int]) -> np.ndarray | None:
    try:
        found = matcher.result()
        found.go_to(tokens)
        return found.allowed()
    except Exception as error:  # the coordinator compiled the same grammar: this shard's model or library is another one
        log.warning("a grammar has no mask: %r", error)
        return None


def shape_logits(logits: jax.Array, allowed: jax.Array, ids: jax.Array, values: jax.Array) -> jax.Array:
    """logits [B, V] with the biases added, and -inf where a token is not allowed; the others are the arrays of Shaping."""
    batch, vocab = logits.shape
    with jax.named_scope("shape"):
        rows = jnp.arange(batch)[:, None]
        biased = jax.lax.cond(jnp.any(values != 0), lambda: logits.at[rows, ids].add(values), lambda: logits)
        bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
        return jnp.where(bits.reshape(batch, -1)[:, :vocab] != 0, biased, -jnp.inf)


def table_shapes(batch: int, vocab: int) -> tuple[Any, ...]:
    """The shapes of a Shaping's arrays for `batch` rows."""
    words = -(-vocab // 32)
    pairs = (batch, MAX_BIASES)
    return (
        jax.ShapeDtypeStruct((batch, words), np.int32),
        jax.ShapeDtypeStruct(pairs, np.int32),
        jax.ShapeDtypeStruct(pairs, np.float32),
    )
