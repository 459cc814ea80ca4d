"""Make a llama of a given size with random weights, for measurements that do not depend on the answers.

    python bench/random_llama.py OUT [--layers 22] [--hidden 2048] [--inner 5632] [--heads 32] [--kv-heads 4] [--vocabulary 32000]
                                     [--dtype float32|bfloat16] [--family llama|granite]
    mesh import OUT models/random

OUT is a Hugging Face directory (4.4 GB with the defaults, which are 1.1 billion parameters of float32), or a file that ends in .gguf, of
float16, without a tokenizer, which llama.cpp reads too. Needs the import extra. A granite of the same tensors is traced, a llama is built.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

NORMS = ("input_layernorm", "post_attention_layernorm")
CONTEXT, EPSILON, THETA = 2048, 1e-5, 10000.0


@dataclass(frozen=True)
class Size:
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str = "float32"
    family: str = "llama"

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    def of_layer(self) -> dict[str, tuple[int, ...]]:
        """The shape [out, in] of each product of a layer."""
        keys = (self.kv_heads * self.head, self.hidden)
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": keys,
            "self_attn.v_proj": keys,
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.inner, self.hidden),
            "mlp.up_proj": (self.inner, self.hidden),
            "mlp.down_proj": (self.hidden, self.inner),
        }


def tensors_of(size: Size, random: np.random.Generator) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """(a name of the part, its tensors by the names of Hugging Face), part after part."""

    def weights(shape: tuple[int, ...]) -> np.ndarray:
        return random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)

    for layer in range(size.layers):
        tensors = {f"model.layers.{layer}.{name}.weight": weights(shape) for name, shape in size.of_layer().items()}
        yield f"{layer:03d}", tensors | {f"model.layers.{layer}.{norm}.weight": np.ones(size.hidden, np.float32) for norm in NORMS}
    ends = {f"{name}.weight": weights((size.vocabulary, size.hidden)) for name in ("model.embed_tokens", "lm_head")}
    yield "ends", {**ends, "model.norm.weight": np.ones(size.hidden, np.float32)}


def write_huggingface(out: Path, size: Size, random: np.random.Generator) -> None:
    out.mkdir(parents=True)
    config = {
        "architectures": [f"{size.family.capitalize()}ForCausalLM"],
        "model_type": size.family,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": EPSILON,
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "torch_dtype": size.dtype,
        "vocab_size": size.vocabulary,
    }
    if size.family == "granite":
        config["attention_multiplier"] = size.head**-0.5
    (out / "config.json").write_text(json.dumps(config, indent=1))
    index: dict[str, str] = {}
    dtype = ml_dtypes.bfloat16 if size.dtype == "bfloat16" else np.float32
    for part, wide in tensors_of(size, random):
        tensors = {name: values.astype(dtype) for name, values in wide.items()}
        save_file(tensors, out / f"model-{part}.safetensors", metadata={"format": "np"})
        index.update(dict.fromkeys(tensors, f"model-{part}.safetensors"))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))


def write_gguf(out: Path, size: Size, random: np.random.Generator) -> None:
    """The queries and keys of GGUF lie in another order than Hugging Face's, which random ones do not show."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, size.layers)
    writer = gguf.GGUFWriter(out, "llama", use_temp_file=True)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(size.hidden)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.inner)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_rope_dimension_count(size.head)
    writer.add_rope_freq_base(THETA)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_vocab_size(size.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    for _, tensors in tensors_of(size, random):
        for name, values in tensors.items():
            found = names.get_name(name, try_suffixes=(".weight",))
            assert found is not None, name
            writer.add_tensor(found, values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("layers", 22), ("hidden", 2048), ("inner", 5632), ("heads", 32), ("kv-heads", 4), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the safetensors files")
    parser.add_argument("--family", choices=("llama", "granite"), default="llama", help="of the Hugging Face directory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = Size(args.layers, args.hidden, args.inner, args.heads, args.kv_heads, args.vocabulary, args.dtype, args.family)
    write = write_gguf if args.out.suffix == ".gguf" else write_huggingface
    write(args.out, size, np.random.default_rng(args.seed))


if __name__ == "__main__":
    main()
