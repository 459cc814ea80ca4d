"""Choosing the next token on the device: a pure function of (logits, parameters, history, position).

A step that is replayed draws the same token, and a request draws the same tokens whatever other rows are in its batch: each row's
randomness is jax.random seeded by (seed, position), and no row's parameters affect another row.

    logits -> logit_bias, grammar (shaping.py)
           -> penalties over the row's history -> temperature -> top_k -> top_p -> min_p -> Gumbel arg-max
           temperature 0: arg-max of the penalised logits

Only what some row of the step asks for is computed. A decode batch whose rows all want the likeliest token (`RowTable.plain`) needs
none of this: its head's program has that token. Where some want the likeliest that a grammar allows and nothing else
(`RowTable.likeliest_allowed`), `shaping.choose` has it.

Penalties are those in common use: repetition (Keskar et al. 2019) over prompt and output, presence and frequency (OpenAI)
over the output. top_p is Holtzman et al. 2019, min_p Nguyen et al. 2024. Filters keep every token that ties with the last kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mesh.protocol.sampling import MAX_LOGPROBS, SamplingFields, SamplingParams

__all__ = ["MAX_LOGPROBS", "RowTable", "Sampled", "SamplingParams", "argmax", "sample"]

# Columns of the two arrays, by the names of the parameters; a seed has 64 bits and so two columns.
_FLOATS = tuple(name for name, field in SamplingFields.model_fields.items() if field.annotation is float)
_INTS = tuple(name for name in SamplingFields.model_fields if name not in _FLOATS and name != "seed")
_INT_COLUMNS = (*_INTS, "seed_low", "seed_high", "prompt_length")
_FLOAT = {name: column for column, name in enumerate(_FLOATS)}
_INT = {name: column for column, name in enumerate(_INT_COLUMNS)}


class RowTable:
    """The parameters of every row, as the two small arrays a step takes. Host memory; written when a row is opened.

    floats [rows, FLOATS] float32; ints [rows, INTS] int32. A parameter that is None is -1.
    """

    FLOATS = len(_FLOATS)
    INTS = len(_INT_COLUMNS)

    def __init__(self, rows: int) -> None:
        self.plain = [True] * rows
        """Of which rows nothing but the likeliest token is wanted."""
        self.likeliest_allowed = [True] * rows
        """The same, or the likeliest of those that the row's grammar allows."""
        floats, ints = _columns(SamplingParams(temperature=0.0), prompt_length=0)
        self.floats, self.ints = np.tile(floats, (rows, 1)), np.tile(ints, (rows, 1))
        self._greedy = floats, ints

    def set(self, row: int, params: SamplingParams, *, prompt_length: int) -> None:
        """Set the parameters of `row`. Penalties count positions from `prompt_length` on as output."""
        self.floats[row], self.ints[row] = _columns(params, prompt_length)
        self.plain[row] = params.plain
        self.likeliest_allowed[row] = params.likeliest_allowed

    def logprobs(self, row: int) -> int:
        """How many alternatives are reported with a token of `row`; -1 where no log-probabilities are."""
        return int(self.ints[row, _INT["logprobs"]])

    def only(self, rows: np.ndarray, base: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(floats, ints) of a decode batch of `size` rows from `base` on. Only `rows` get their parameters; the others are greedy. The
        arrays are copies: a CPU device may keep using the memory that it was given, and the table changes when a row gets another
        session."""
        floats, ints = (np.tile(columns, (size, 1)) for columns in self._greedy)
        floats[rows - base], ints[rows - base] = self.floats[rows], self.ints[rows]
        return floats, ints

    def of(self, rows: Sequence[int], size: int) -> tuple[np.ndarray, np.ndarray]:
        """(floats, ints) of `rows` in that order, and greedy ones up to `size`. The arrays are copies."""
        floats, ints = (np.tile(columns, (size, 1)) for columns in self._greedy)
        floats[: len(rows)], ints[: len(rows)] = self.floats[rows], self.ints[rows]
        return floats, ints


def _columns(params: SamplingParams, prompt_length: int) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.array([params.seed or 0], np.uint64).view(np.uint32).view(np.int32)
    values = (getattr(params, name) for name in _INTS)
    ints = [*(-1 if value is None else value for value in values), low, high, prompt_length]
    return np.array([getattr(params, name) for name in _FLOATS], np.float32), np.array(ints, np.int32)


class Sampled(NamedTuple):
    """tokens [B] int32; logprob [B] float32 of the chosen token; top_tokens, top_logprobs [B, MAX_LOGPROBS].

    Log-probabilities are of the model's own distribution, before penalties and temperature. They are zero for rows that asked for none.
    """

    tokens: Any
    logprob: Any
    top_tokens: Any
    top_logprobs: Any


def sample(
    logits: jax.Array, floats: jax.Array, ints: jax.Array, history: jax.Array, positions: jax.Array, raw: jax.Array | None = None
) -> Sampled:
    """Next tokens for logits [B, V]. `raw` [B, V]: the model's own, where `logits` were shaped; log-probabilities are of these.

    floats [B, F] and ints [B, I] are rows of a RowTable; history [B, S] int32 holds the input token of each position;
    positions [B] is the position whose logits these are.
    """
    logits = logits.astype(jnp.float32)
    own = logits if raw is None else raw.astype(jnp.float32)
    real = {name: floats[:, column, None] for name, column in _FLOAT.items()}
    temperature, top_p, min_p = real["temperature"], real["top_p"], real["min_p"]
    repetition, presence, frequency = real["repetition_penalty"], real["presence_penalty"], real["frequency_penalty"]
    whole = {name: ints[:, column] for name, column in _INT.items()}
    top_k, prompt_length, wanted = whole["top_k"][:, None], whole["prompt_length"], whole["logprobs"]
    seeds = jnp.stack([whole["seed_low"], whole["seed_high"]], axis=-1)

    penalised_any = jnp.any((repetition != 1) | (presence != 0) | (frequency != 0))
    scores = jax.lax.cond(
        penalised_any,
        lambda: _penalise(logits, history, positions, prompt_length, repetition, presence, frequency),
        lambda: logits,
    )

    def draw() -> jax.Array:
        return _draw(scores, temperature, top_k, top_p, min_p, seeds, positions)

    greedy = argmax(scores)
    drawn = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)
    tokens = jnp.where(temperature[:, 0] > 0, drawn, greedy)

    def report() -> tuple[jax.Array, jax.Array, jax.Array]:
        logprobs = jax.nn.log_softmax(own, axis=-1)
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
