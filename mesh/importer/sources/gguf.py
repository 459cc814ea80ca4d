"""The source for GGUF files: decoders of the kinds llama (Mixtral's experts too), qwen2, qwen3 and gemma3. Others are traced."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.errors import CorruptModel, UnsupportedModel, decoding, short
from mesh.importer.families.decoder_source import DecoderSource
from mesh.importer.families.rotary import rotary_from_config
from mesh.importer.families.spec import DecoderSpec, EmbedWeights, Experts, HeadWeights, LayerWeights, Linear, Rotary
from mesh.importer.families.tensors import Tensors
from mesh.importer.sources.gguf_file import GgufCheckpoint
from mesh.importer.sources.gguf_tokenizer import write_gguf_tokenizer
from mesh.importer.sources.source import Source
from mesh.importer.trace.gguf_config import LARGEST, MOST_LAYERS
from mesh.types import Progress, no_progress

__all__ = ["SUPPORTED", "open_source"]

SUPPORTED = ("gemma3", "llama", "qwen2", "qwen3")

# values that llama.cpp fixes for gemma3; no metadata holds them
GEMMA3_LOCAL_BASE = 10000.0
GEMMA3_PATTERN = 6  # every sixth layer sees the whole context
GEMMA3_27B_LAYERS = 62  # the one size whose queries are scaled by hidden / heads

Array = npt.NDArray[Any]


def open_source(path: Path, progress: Progress = no_progress) -> Source:
    """Open a GGUF file (of a split model, the first part); reads only the header. What is not built here is traced.

    Errors: ModelNotFound, CorruptModel, UnsupportedModel.
    """
    path = Path(path)
    if find_spec("gguf") is None:
        raise UnsupportedModel(f"reading {path} needs the import extra: pip install 'stagemesh[import]'")
    checkpoint = GgufCheckpoint(path)
    with decoding(CorruptModel, str(path)):
        if checkpoint.metadata.get("general.architecture") in SUPPORTED:
            return _open(path, checkpoint)
        from mesh.importer.sources import gguf_traced

        return gguf_traced.open_source(path, checkpoint, progress)


def _open(path: Path, checkpoint: GgufCheckpoint) -> DecoderSource:
    metadata = _Metadata(checkpoint)
    spec = _spec(metadata, checkpoint)
    tensors = Tensors(checkpoint)
    weights = _Weights(spec, tensors)
    weights.embed()
    for index in range(spec.layers):
        weights.layer(index)
    weights.head()
    for name in checkpoint:
        if name not in tensors.used and name != "rope_freqs.weight":
            raise UnsupportedModel(
                f"{path}: {spec.architecture} has no use for the tensor {short(name)}: this is a variant that is not supported"
            )
    return DecoderSource("gguf", path.stem, spec, weights, lambda out: write_gguf_tokenizer(checkpoint.metadata, str(path), out))


_LARGEST_HEAD = 1 << 16
"""Tables are made as long as a head."""


class _Metadata:
    """Metadata of the architecture: `get("block_count")` is llama.block_count."""

    def __init__(self, checkpoint: GgufCheckpoint) -> None:
        self.path = checkpoint.path
        self._values = checkpoint.metadata
        self.architecture = str(self._values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        return self._values.get(f"{self.architecture}.{key}", default)

    def integer(self, key: str, default: int | None = None, *, most: int = LARGEST) -> int:
        """A positive integer. If the file has one value for each layer, all must be equal."""
        value = self.get(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise UnsupportedModel(f"{self.path}: {self.architecture}.{key} differs between layers, which is not supported")
            value = value[0]
        if not isinstance(value, int) or value < 1:
            raise CorruptModel(f"{self.path}: {self.architecture}.{key} is {short(repr(value))} where a positive integer is needed")
        if value > most:
            raise CorruptModel(f"{self.path}: {self.architecture}.{key} is {value:,} where at most {most:,} is believed")
        return value


def _spec(metadata: _Metadata, checkpoint: GgufCheckpoint) -> DecoderSpec:
    architecture = metadata.architecture
    gemma = architecture == "gemma3"
    layers = metadata.integer("block_count", most=MOST_LAYERS)
    hidden, heads = metadata.integer("embedding_length"), metadata.integer("attention.head_count")
    kv_heads = metadata.integer("attention.head_count_kv", heads)
    head_dim = metadata.integer("attention.key_length", hidden // heads)
    if head_dim > _LARGEST_HEAD:
        raise CorruptModel(f"{metadata.path}: a head of {head_dim:,} dimensions: at most {_LARGEST_HEAD:,} are believed")
    if metadata.integer("attention.value_length", head_dim) != head_dim:
        raise UnsupportedModel(f"{metadata.path}: keys and values of different sizes are not supported")
    context = metadata.integer("context_length")
    epsilon = metadata.get("attention.layer_norm_rms_epsilon")
    if not isinstance(epsilon, float):
        raise CorruptModel(
            f"{metadata.path}: {architecture}.attention.layer_norm_rms_epsilon is {short(repr(epsilon))} where a number is needed"
        )
    window = metadata.get("attention.sliding_window") or None
    windows = [None if gemma and (index + 1) % GEMMA3_PATTERN == 0 else window for index in range(layers)]
    whole, local = _rotary(metadata, checkpoint, head_dim, context, local=False), None
    if gemma:
        local = _rotary(metadata, checkpoint, head_dim, context, local=True)
    per_head = hidden / heads if gemma and layers == GEMMA3_27B_LAYERS else head_dim
    experts = int(metadata.get("expert_count") or 0)
    return DecoderSpec(
        architecture=architecture,
        layers=layers,
        hidden_size=hidden,
        vocab_size=checkpoint.shape("token_embd.weight")[0],
        context_length=context,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        norm="rms",
        norm_eps=epsilon,
        activation="gelu_tanh" if gemma else "silu",
        scale=[per_head**-0.5] * layers,
        window=windows,
        rotary=[whole if local is None or window is None else local for window in windows],
        embed_scale=float(np.float32(hidden**0.5)) if gemma else 1.0,
        experts=Experts(experts, metadata.integer("expert_used_count")) if experts else None,
    )


def _rotary(metadata: _Metadata, checkpoint: GgufCheckpoint, head_dim: int, context: int, *, local: bool) -> Rotary:
    """`local` is for Gemma-3's sliding layers, which have a base of their own and no scaling."""
    dim = metadata.integer("rope.dimension_count", head_dim)
    if dim != head_dim:
        raise UnsupportedModel(f"{metadata.path}: rotation over {dim} of {head_dim} dimensions of a head is not supported")
    base = GEMMA3_LOCAL_BASE if local else metadata.get("rope.freq_base", 10000.0)
    settings: dict[str, Any] = {"rope_theta": base, "rope_type": "default", "partial_rotary_factor": 1.0}
    kind = metadata.get("rope.scaling.type") or ("linear" if metadata.get("rope.scale_linear") else "none")
    if not local and kind != "none":
        if kind not in ("linear", "yarn"):
            raise UnsupportedModel(
                f"{metadata.path}: rotary scaling {short(repr(kind))} is not supported in GGUF: only linear and yarn are"
            )
        settings |= {
            "rope_type": kind,
            "factor": metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear") or 1.0,
            "original_max_position_embeddings": metadata.get("rope.scaling.original_context_length") or context,
        }
    rotary = rotary_from_config(settings, head_dim=dim, context_length=context)
    frequencies = rotary.inverse_frequencies
    if "rope_freqs.weight" in checkpoint and not local:
        factors = checkpoint.read("rope_freqs.weight")
        if factors.shape != frequencies.shape:
            raise CorruptModel(f"{metadata.path}: rope_freqs.weight has {factors.size} entries where {frequencies.size} are needed")
        frequencies = (frequencies / factors).astype(np.float32)
    return Rotary(frequencies, rotary.factor)


class _Weights:
    """Tensors as llama.cpp names them. Norms are multipliers as they are: the "+ 1" of Gemma is in the file."""

    def __init__(self, spec: DecoderSpec, tensors: Tensors) -> None:
        self.spec, self.tensors = spec, tensors

    def release(self) -> None:
        self.tensors.checkpoint.release()

    def embed(self) -> EmbedWeights:
        return EmbedWeights(self.tensors.matrix("token_embd.weight"))

    def head(self) -> HeadWeights:
        norm = self.tensors.norm("output_norm")
        if "output.weight" in self.tensors:
            return HeadWeights(self.tensors.linear("output"), norm)
        return HeadWeights(Linear(self.tensors.matrix("token_embd.weight")), norm)

    def layer(self, index: int) -> LayerWeights:
        spec, tensors, name = self.spec, self.tensors, f"blk.{index}."
        router = None
        if spec.experts is not None:
            router = tensors.linear(name + "ffn_gate_inp")
            gate, up, down = (self._experts(name, part) for part in ("gate", "up", "down"))
        else:
            gate, up, down = (tensors.linear(f"{name}ffn_{part}") for part in ("gate", "up", "down"))
        return LayerWeights(
            q=tensors.linear(name + "attn_q", self._halves(spec.heads), shape=(spec.query_size, spec.hidden_size)),
            k=tensors.linear(name + "attn_k", self._halves(spec.kv_heads), shape=(spec.key_size, spec.hidden_size)),
            v=tensors.linear(name + "attn_v", shape=(spec.key_size, spec.hidden_size)),
            o=tensors.linear(name + "attn_output", shape=(spec.hidden_size, spec.query_size)),
            gate=gate,
            up=up,
            down=down,
            router=router,
            attention_norm=tensors.norm(name + "attn_norm"),
            mlp_norm=tensors.norm(name + "ffn_norm"),
            q_norm=tensors.optional_norm(name + "attn_q_norm"),
            k_norm=tensors.optional_norm(name + "attn_k_norm"),
            attention_out_norm=tensors.optional_norm(name + "post_attention_norm"),
            mlp_out_norm=tensors.optional_norm(name + "post_ffw_norm"),
        )

    def _experts(self, name: str, part: str) -> Linear:
        """All experts' weights: one tensor [experts, out, in], or in older files one tensor for each expert."""
        if f"{name}ffn_{part}_exps.weight" in self.tensors:
            return Linear(self.tensors.experts(f"{name}ffn_{part}_exps.weight"))
        assert self.spec.experts is not None
        return Linear(self.tensors.stack([f"{name}ffn_{part}.{expert}.weight" for expert in range(self.spec.experts.count)]))

    def _halves(self, heads: int) -> Callable[[Array], Array] | None:
        """llama's q and k are stored with rotary pairs side by side: put them back to halves, as all others have them."""
        if self.spec.architecture != "llama":
            return None
        return lambda array: array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
