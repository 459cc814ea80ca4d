"""What changes a row's logits before a token is chosen: its grammar's mask, and its logit_bias.

    rows.open(row, params, prompt_length)     the grammar is compiled in a thread of this module, while the prompt is computed
    rows.fed(row, start, tokens)              the input of a step, before it runs
    rows.begin(rows) -> Pending               the masks that are not there yet are computed, while the step's layers are
    pending.allowed(rows, size)               the masks of the step: all it needs where every row wants the likeliest token (`choose`)
    pending.take(rows, size) -> Shaping       the arrays of any other step (`shape_logits`)
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

from mesh.kernels.calls import likeliest
from mesh.kernels.library import kernels
from mesh.model.grammar import Matcher, Vocabulary
from mesh.protocol.frame import NOT_ALLOWED
from mesh.protocol.sampling import SamplingParams
from mesh.protocol.structured import MAX_BIASES
from mesh.runtime.sampling import argmax

log = logging.getLogger("mesh.runtime")

__all__ = ["Pending", "RowShapes", "Shaping", "choose", "mask_shape", "shape_logits", "table_shapes"]

_Masks = dict[int, np.ndarray | None]
"""By row: the mask, or None where the grammar allows nothing."""


class Shaping(NamedTuple):
    """For each of B rows: allowed [B, ceil(V / 32)] int32, a bit for each token; and the biases of tokens, ids [B, K] int32 and values
    [B, K] float32, with zeros where there are fewer."""

    allowed: np.ndarray
    ids: np.ndarray
    values: np.ndarray


@dataclass(slots=True)
class _Row:
    """params: as they were opened. tokens: the row's output so far. matcher: there once it is compiled. ahead: the masks that are computed
    for the token that was drawn last: how many tokens there are with it, the token, the masks."""

    params: SamplingParams
    prompt_length: int
    matcher: Future[Matcher] | None
    tokens: list[int] = field(default_factory=list)
    ahead: tuple[int, int, Future[_Masks]] | None = None

    def fed(self, start: int, tokens: Sequence[int]) -> None:
        at = start - self.prompt_length
        if at == len(self.tokens):
            self.tokens += tokens
            return
        self.ahead = None
        self.tokens += [NOT_ALLOWED] * (at - len(self.tokens))  # what is not known has no mask
        self.tokens = [*self.tokens[: max(at, 0)], *tokens[max(-at, 0) :]]

    def drawn(self, token: int, masks: Future[_Masks]) -> None:
        self.ahead = len(self.tokens) + 1, token, masks

    def masks_ahead(self) -> Future[_Masks] | None:
        """The masks of the tokens so far, if they are what was drawn."""
        if self.ahead is None:
            return None
        count, token, masks = self.ahead
        return masks if len(self.tokens) == count and self.tokens[-1] == token else None


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
        """Compute the masks of those of `rows` that have a grammar, where `sampled` has not. None: no row needs shaping."""
        shaped = {row: self._rows[row] for row in rows if row in self._rows}
        if not shaped:
            return None
        masks: dict[int, Future[_Masks]] = {}
        states = {}
        for row, each in shaped.items():
            if each.matcher is None:
                continue
            ahead = each.masks_ahead()
            if ahead is None:
                states[row] = (each.matcher, list(each.tokens))
            else:
                masks[row] = ahead
        if states:
            masks |= dict.fromkeys(states, self._masking.submit(_masks, states))
        return Pending(shaped, masks, self._size)

    def sampled(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """`tokens` were sampled for `rows`: what may follow them is computed now, not when the next step has come."""
        states = {}
        for row, token in zip(rows, tokens, strict=True):
            shaped = self._rows.get(row)
            if shaped is not None and shaped.matcher is not None and token != NOT_ALLOWED:
                states[row] = (shaped.matcher, [*shaped.tokens, token])
        if states:
            masks = self._masking.submit(_masks, states)
            for row, (_, (*_, token)) in states.items():
                self._rows[row].drawn(token, masks)

    def _load(self) -> Future[Vocabulary]:
        if self._loaded is None or (self._loaded.done() and self._loaded.exception() is not None):
            self._loaded = self._compiling.submit(self._vocabulary)
        return self._loaded


class Pending:
    """Masks that are being computed. `failed`: the rows whose grammar allows nothing, once they were taken."""

    def __init__(self, shaped: dict[int, _Row], masks: dict[int, Future[_Masks]], size: int) -> None:
        self._shaped = shaped
        self._masks = masks
        self._size = size
        self.failed: set[int] = set()

    def allowed(self, rows: Sequence[int], size: int) -> np.ndarray:
        """The masks [size, ceil(V / 32)] int32 of a step whose places 0 to `size` are of `rows`, or of none. Waits for them."""
        allowed = np.full((size, _words(self._size)), -1, np.int32)
        for at, row in enumerate(rows):
            computed = self._masks.get(row)
            if computed is None:
                continue
            mask = computed.result()[row]
            if mask is None:
                self.failed.add(row)
            else:
                allowed[at] = mask
        return allowed

    def take(self, rows: Sequence[int], size: int) -> Shaping:
        """The arrays of such a step. Waits for the masks."""
        ids, values = np.zeros((size, MAX_BIASES), np.int32), np.zeros((size, MAX_BIASES), np.float32)
        for at, row in enumerate(rows):
            if row in self._shaped:
                for place, (token, bias) in enumerate(self._shaped[row].params.logit_bias.items()):
                    ids[at, place], values[at, place] = int(token), bias
        return Shaping(self.allowed(rows, size), ids, values)


def _masks(states: dict[int, tuple[Future[Matcher], list[int]]]) -> _Masks:
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
    with jax.named_scope("shape"):
        rows = jnp.arange(len(logits))[:, None]
        biased = jax.lax.cond(jnp.any(values != 0), lambda: logits.at[rows, ids].add(values), lambda: logits)
        return _masked(biased, allowed)


def choose(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """The likeliest token of each row of logits [B, V] that `allowed` [B, ceil(V / 32)] has a bit for: int32 [B]. It is the token that
    `sample` draws greedily from what `shape_logits` returns."""
    with jax.named_scope("choose"):
        if kernels().name is not None:
            chosen: jax.Array = likeliest(logits, allowed)
            return chosen
        return argmax(_masked(logits, allowed))


def _masked(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    batch, vocab = logits.shape
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return jnp.where(bits.reshape(batch, -1)[:, :vocab] != 0, logits, -jnp.inf)


def mask_shape(batch: int, vocab: int) -> Any:
    """The shape of the masks of `batch` rows."""
    return jax.ShapeDtypeStruct((batch, _words(vocab)), np.int32)


def table_shapes(batch: int, vocab: int) -> tuple[Any, ...]:
    """The shapes of a Shaping's arrays for `batch` rows."""
    pairs = (batch, MAX_BIASES)
    return mask_shape(batch, vocab), jax.ShapeDtypeStruct(pairs, np.int32), jax.ShapeDtypeStruct(pairs, np.float32)


def _words(vocab: int) -> int:
    return -(-vocab // 32)
