"""Make a llama of a given size with random weights, as a Hugging Face directory, for measurements that do not depend on the answers.

    python bench/random_llama.py OUT [--layers 22] [--hidden 2048] [--inner 5632] [--heads 32] [--kv-heads 4] [--vocabulary 32000]
    mesh import OUT models/random

The defaults are 1.1 billion parameters, 4.4 GB. Needs the import extra.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    for name, default in (("layers", 22), ("hidden", 2048), ("inner", 5632), ("heads", 32), ("kv-heads", 4), ("vocabulary", 32000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    hidden, inner, head = args.hidden, args.inner, args.hidden // args.heads
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": args.vocabulary,
    }
    (args.out / "config.json").write_text(json.dumps(config, indent=1))
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (args.kv_heads * head, hidden),
        "self_attn.v_proj": (args.kv_heads * head, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    random = np.random.default_rng(args.seed)
    index: dict[str, str] = {}

    def save(name: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, args.out / name, metadata={"format": "np"})
        index.update(dict.fromkeys(tensors, name))

    def weights(shape: tuple[int, ...]) -> np.ndarray:
        return random.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)

    for layer in range(args.layers):
        tensors = {f"model.layers.{layer}.{name}.weight": weights(shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{norm}.weight"] = np.ones(hidden, np.float32)
        save(f"model-{layer:03d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": weights((args.vocabulary, hidden)), "lm_head.weight": weights((args.vocabulary, hidden))}
    save("model-ends.safetensors", {**ends, "model.norm.weight": np.ones(hidden, np.float32)})
    (args.out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1))


if __name__ == "__main__":
    main()
