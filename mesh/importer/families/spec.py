"""What a family says about a decoder, enough to build its blocks: numbers in `DecoderSpec`, and the weights of each block.

Optional parts have no flag, which could contradict the weights: a part is there if its weight is. A layer with a `gate` has a
gated MLP, one with a `q_norm` normalizes its queries, and a linear with a `bias` adds it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from mesh.importer.write.writer import WeightValue
from mesh.model.manifest import CacheInfo

__all__ = [
    "ACTIVATIONS",
    "DecoderSpec",
    "DecoderWeights",
    "EmbedWeights",
    "Experts",
    "HeadWeights",
    "LayerWeights",
    "Linear",
    "Norm",
    "Rotary",
    "alibi_slopes",
]

# names as config.json has them -> our own
ACTIVATIONS: dict[str, str] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
}


@dataclass(frozen=True, eq=False, slots=True)
class Rotary:
    """Rotary position embedding: angle = position * inverse_frequencies [rotary_dim / 2] (float32), radians.

    `factor` multiplies cos and sin (YaRN, LongRoPE). The first half of the rotated dimensions pairs with the second;
    dimensions beyond rotary_dim pass through.
    """

    inverse_frequencies: npt.NDArray[np.float32]
    factor: float = 1.0

    @property
    def dim(self) -> int:
        return 2 * len(self.inverse_frequencies)


@dataclass(frozen=True, slots=True)
class Experts:
    """Mixture of experts: each token goes through the `active` of `count` experts that its router scores highest.

    Scores are softmax over all experts; `normalize` makes those of the chosen ones sum to 1.
    """

    count: int
    active: int
    normalize: bool = True


@dataclass(frozen=True, eq=False, slots=True)
class DecoderSpec:
    """Sizes and arithmetic of a decoder; sequences have one entry a layer.

    placement: where norms stand. "pre": norm before attention and MLP; "post": norm after each residual sum instead.
    parallel: attention and MLP read the same hidden state, one residual sum.
    residual_after_norm: the residual is what the norm gave, not what it was given (BLOOM's option).
    final_norm: whether a norm stands before the output projection (OPT's option; the other families always have one).
    context_note: why the context is shorter than the model's, if it is.
    """

    architecture: str
    layers: int
    hidden_size: int
    vocab_size: int
    context_length: int
    heads: int
    kv_heads: int
    head_dim: int
    norm: Literal["rms", "layer"]
    norm_eps: float
    activation: str
    scale: Sequence[float]
    window: Sequence[int | None]
    rotary: Sequence[Rotary | None]
    alibi: bool = False
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    logit_scale: float = 1.0
    embed_scale: float = 1.0
    placement: Literal["pre", "post"] = "pre"
    parallel: bool = False
    residual_after_norm: bool = False
    final_norm: bool = True
    context_note: str | None = None
    experts: Experts | None = None

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_size(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def cache(self) -> tuple[CacheInfo, ...]:
        return tuple(
            CacheInfo(kv_heads=self.kv_heads, key_dim=self.head_dim, value_dim=self.head_dim, window=window) for window in self.window
        )


@dataclass(frozen=True, eq=False, slots=True)
class Linear:
    """weight [in, out] (for experts [experts, in, out]), bias [out]."""

    weight: WeightValue
    bias: WeightValue | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Norm:
    """weight [size], as the multiplier itself (never "1 + weight"), and bias [size]."""

    weight: WeightValue
    bias: WeightValue | None = None


@dataclass(frozen=True, eq=False, slots=True)
class LayerWeights:
    """One layer. `up` and `down` are those of experts when there is a `router`."""

    q: Linear
    k: Linear
    v: Linear
    o: Linear
    up: Linear
    down: Linear
    attention_norm: Norm
    mlp_norm: Norm
    gate: Linear | None = None
    router: Linear | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    attention_out_norm: Norm | None = None
    mlp_out_norm: Norm | None = None


@dataclass(frozen=True, eq=False, slots=True)
class EmbedWeights:
    """tokens [vocab, width]; positions [context + position_offset, hidden], read at position + position_offset."""

    tokens: WeightValue
    positions: WeightValue | None = None
    position_offset: int = 0
    norm: Norm | None = None
    project: Linear | None = None


@dataclass(frozen=True, eq=False, slots=True)
class HeadWeights:
    """norm, then project [hidden, width], then logits [hidden or width, vocab]."""

    logits: Linear
    norm: Norm | None = None
    project: Linear | None = None


class DecoderWeights(Protocol):
    """Gives the weights of each block. Nothing is read before a block is written."""

    def embed(self) -> EmbedWeights: ...
    def layer(self, index: int) -> LayerWeights: ...
    def head(self) -> HeadWeights: ...
    def release(self) -> None:
        """Called when a block has been written: pages of the source in memory are no longer needed."""
        ...


def alibi_slopes(heads: int) -> npt.NDArray[Any]:
    """ALiBi slopes [heads], float32 (Press et al. 2022, with the authors' rule for a number that is no power of two)."""
    closest = 2 ** math.floor(math.log2(heads))
    base = 2 ** -(2 ** -(math.log2(closest) - 3))
    slopes = [base**power for power in range(1, closest + 1)]
    extra = 2 ** -(2 ** -(math.log2(2 * closest) - 3))
    slopes += [extra**power for power in range(1, 2 * (heads - closest) + 1, 2)]
    return np.asarray(slopes, np.float32)
