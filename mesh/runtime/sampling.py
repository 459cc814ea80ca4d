"""Choosing the next token on the device: a pure function of (logits, parameters, history, position).

A step that is replayed draws the same token, and a request draws the same tokens whatever other rows are in its batch: each row's
randomness is jax.random seeded by (seed, position), and no row's parameters affect another row.

    logits -> penalties over the row's history -> temperature -> top_k -> top_p -> min_p -> Gumbel arg-max
           temperature 0: arg-max of the penalised logits

Only what some row of the step asks for is computed. A decode batch whose rows all want the likeliest token (`RowTable.plain`) needs
none of this: its head's program has that token.

Penalties are those in common use: repetition (Keskar et al. 2019) over prompt and output, presence and frequency (OpenAI)
over the output. top_p is Holtzman et al. 2019, min_p Nguyen et al. 2024. Filters keep every token that ties with the last kept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mesh.errors import BadRequest

__all__ = ["MAX_LOGPROBS", "RowTable", "Sampled", "SamplingParams", "argmax", "sample"]

MAX_LOGPROBS = 20
"""The most alternatives reported with a token."""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request chooses its tokens. `top_k` 0, `top_p` 1 and `min_p` 0 are off; `logprobs` None is off, 0 the chosen
    token's alone, n that and the n likeliest. BadRequest names a field out of range."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    logprobs: int | None = None

    def __post_init__(self) -> None:
        def need(ok: bool, field: str, want: str) -> None:
            if not ok:
                raise BadRequest(f"{field} is {getattr(self, field)!r}: give {want}", field=field)

        for item in fields(self):
            value = getattr(self, item.name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value and abs(value) != float("inf")
            need(number or (item.name == "logprobs" and value is None), item.name, "a finite number")
        need(0 <= self.temperature <= 100, "temperature", "0 (greedy) to 100")
        need(isinstance(self.top_k, int) and self.top_k >= 0, "top_k", "a whole number, 0 for no limit")
        need(0 < self.top_p <= 1, "top_p", "more than 0 and at most 1")
        need(0 <= self.min_p <= 1, "min_p", "0 to 1")
        need(0 < self.repetition_penalty <= 100, "repetition_penalty", "more than 0 and at most 100 (1 is none)")
        need(-10 <= self.presence_penalty <= 10, "presence_penalty", "-10 to 10")
        need(-10 <= self.frequency_penalty <= 10, "frequency_penalty", "-10 to 10")
        need(isinstance(self.seed, int) and 0 <= self.seed < 2**63, "seed", "a whole number from 0 to 2^63 - 1")
        ok = self.logprobs is None or (isinstance(self.logprobs, int) and 0 <= self.logprobs <= MAX_LOGPROBS)
        need(ok, "logprobs", f"0 to {MAX_LOGPROBS}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Nothing but the likeliest token is wanted."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return self.greedy and penalties == (1.0, 0.0, 0.0) and self.logprobs is None


class RowTable:
    """The sampling parameters of every row, as the two small arrays that a step takes. In host memory; written when a row is opened."""

    FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    INTS = ("top_k", "seed_low", "seed_high", "prompt_length", "logprobs")

    def __init__(self, rows: int) -> None:
        self.floats = np.zeros((rows, len(self.FLOATS)), np.float32)
        self.ints = np.zeros((rows, len(self.INTS)), np.int32)
        self.plain = [True] * rows
        """Of which rows nothing but the likeliest token is wanted."""
        for row in range(rows):
            self.set(row, SamplingParams(temperature=0.0), prompt_length=0)

    def set(self, row: int, params: SamplingParams, *, prompt_length: int) -> None:
        """Set the parameters of `row`. Penalties count positions from `prompt_length` on as output."""
        self.floats[row] = [getattr(params, name) for name in self.FLOATS]
        self.plain[row] = params.plain
        low, high = np.array([params.seed], np.uint64).view(np.uint32).view(np.int32)
        top_k = min(params.top_k, 2**31 - 1)
        self.ints[row] = [top_k, low, high, prompt_length, -1 if params.logprobs is None else params.logprobs]

    def only(self, rows: np.ndarray, base: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(floats, ints) of a decode batch of `size` rows from `base` on. Only `rows` get their parameters; the others are greedy. The
        arrays are copies: a CPU device may keep using the memory that it was given, and the table changes when a row gets another
        session."""
        floats, ints = np.zeros((size, len(self.FLOATS)), np.float32), np.zeros((size, len(self.INTS)), np.int32)
        floats[:, 1] = floats[:, 3] = 1.0
        ints[:, -1] = -1
        floats[rows - base], ints[rows - base] = self.floats[rows], self.ints[rows]
        return floats, ints


class Sampled(NamedTuple):
    """tokens [B] int32; logprob [B] float32 of the chosen token; top_tokens, top_logprobs [B, MAX_LOGPROBS].

    Log-probabilities are of the model's own distribution, before penalties and temperature. They are zero for rows that asked for none.
    """

    tokens: Any
    logprob: Any
    top_tokens: Any
    top_logprobs: Any


def sample(logits: jax.Array, floats: jax.Array, ints: jax.Array, history: jax.Array, positions: jax.Array) -> Sampled:
    """Next tokens for logits [B, V].

    floats [B, 6] and ints [B, 5] are rows of a RowTable; history [B, S] int32 holds the input token of each position;
    positions [B] is the position whose logits these are.
    """
    logits = logits.astype(jnp.float32)
    temperature, top_p, min_p, repetition, presence, frequency = (floats[:, i, None] for i in range(6))
    top_k, prompt_length, wanted = ints[:, 0, None], ints[:, 3], ints[:, 4]

    penalised_any = jnp.any((repetition != 1) | (presence != 0) | (frequency != 0))
    scores = jax.lax.cond(
        penalised_any,
        lambda: _penalise(logits, history, positions, prompt_length, repetition, presence, frequency),
        lambda: logits,
    )

    def draw() -> jax.Array:
        return _draw(scores, temperature, top_k, top_p, min_p, ints[:, 1:3], positions)

    greedy = argmax(scores)
    drawn = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)
    tokens = jnp.where(temperature[:, 0] > 0, drawn, greedy)

    def report() -> tuple[jax.Array, jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        values, indices = jax.lax.top_k(logprobs, count)
        pad = ((0, 0), (0, MAX_LOGPROBS - count))
        chosen = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        return chosen, jnp.pad(indices.astype(jnp.int32), pad), jnp.pad(values, pad, constant_values=-jnp.inf)

    batch, count = logits.shape[0], min(MAX_LOGPROBS, logits.shape[1])
    nothing = (jnp.zeros(batch), jnp.zeros((batch, MAX_LOGPROBS), jnp.int32), jnp.zeros((batch, MAX_LOGPROBS)))
    chosen, top_tokens, top_logprobs = jax.lax.cond(jnp.any(wanted >= 0), report, lambda: nothing)
    return Sampled(tokens, chosen, top_tokens, top_logprobs)


def _penalise(logits: Any, history: Any, positions: Any, prompt_length: Any, repetition: Any, presence: Any, frequency: Any) -> Any:
    batch, _ = logits.shape
    slots = jnp.arange(history.shape[1])[None]
    past = slots <= positions[:, None]
    output = past & (slots >= prompt_length[:, None])
    rows = jnp.arange(batch)[:, None]
    zeros = jnp.zeros(logits.shape, jnp.float32)
    seen = zeros.at[rows, history].max(past.astype(jnp.float32))
    counts = zeros.at[rows, history].add(output.astype(jnp.float32))
    repeated = jnp.where(logits > 0, logits / repetition, logits * repetition)
    scores = jnp.where(seen > 0, repeated, logits)
    return scores - frequency * counts - presence * (counts > 0)


def _draw(scores: Any, temperature: Any, top_k: Any, top_p: Any, min_p: Any, seeds: Any, positions: Any) -> Any:
    batch, vocab = scores.shape
    scaled = scores / jnp.where(temperature > 0, temperature, 1.0)
    filtered = jnp.any(((top_k > 0) & (top_k < vocab)) | (top_p < 1) | (min_p > 0))
    scaled = jax.lax.cond(filtered, lambda: _filter(scaled, top_k, top_p, min_p), lambda: scaled)

    def noise(seed: Any, position: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(seed[0].astype(jnp.uint32)), seed[1])
        return jax.random.gumbel(jax.random.fold_in(key, position), (vocab,), jnp.float32)

    gumbel = jax.lax.map(lambda args: noise(*args), (seeds, positions)) if batch > 1 else noise(seeds[0], positions[0])[None]
    return argmax(scaled + gumbel)


def argmax(scores: Any) -> Any:
    """The first index of the largest of scores [B, V] -> int32 [B]; the last index if there is a NaN.

    Written as two plain reductions, which XLA vectorises on a CPU. jnp.argmax takes 10 times as long there: 0.2 ms for a row of 49,152.
    """
    vocab = scores.shape[-1]
    largest = jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(scores == largest, jnp.arange(vocab, dtype=jnp.int32), vocab - 1), axis=-1)


def _filter(scaled: Any, top_k: Any, top_p: Any, min_p: Any) -> Any:
    """Mask what the filters exclude. Thresholds are found by bisection, without sorting the vocabulary."""
    vocab = scaled.shape[-1]
    weights = jnp.exp(scaled - jnp.max(scaled, axis=-1, keepdims=True))  # 1 for the likeliest
    k = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab)
    # The largest threshold that still keeps k tokens.
    k_threshold = _largest(lambda t: jnp.sum(weights >= t, axis=-1, keepdims=True) >= k, weights.shape[0])
    weights = jnp.where((weights >= k_threshold) | (top_k == 0), weights, 0.0)
    # The largest threshold whose tokens together weigh top_p of the rest.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    p_threshold = _largest(
        lambda t: jnp.sum(jnp.where(weights >= t, weights, 0.0), axis=-1, keepdims=True) >= top_p * total, weights.shape[0]
    )
    weights = jnp.where((weights >= p_threshold) | (top_p >= 1), weights, 0.0)
    weights = jnp.where(weights >= min_p, weights, 0.0)
    return jnp.where(weights > 0, scaled, -jnp.inf)


def _largest(keeps: Any, batch: int) -> Any:
    """The largest t in [0, 1] for which keeps(t) [B, 1] holds, from below, by bisection over the exponent and the mantissa:
    on the bits of a non-negative float, which order as the floats do."""
    one = np.float32(1).view(np.int32)
    low, high = jnp.zeros((batch, 1), jnp.int32), jnp.full((batch, 1), one, jnp.int32)

    def halve(_: Any, bounds: tuple[Any, Any]) -> tuple[Any, Any]:
        low, high = bounds
        middle = low + (high - low + 1) // 2
        ok = keeps(jax.lax.bitcast_convert_type(middle, jnp.float32))
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jax.lax.bitcast_convert_type(low, jnp.float32)
