"""Which architectures of GGUF files import, and whether their tokens are those of the converted model and of llama.cpp.

    python bench/gguf_families.py --work DIR --llama SRC --tokens PROGRAM [--only NAME ...] [--again]

Each family that llama.cpp's converter knows is a tiny model with random weights (bench/tiny_decoders.py), made by transformers and
converted by `SRC/conversion`, which a source distribution of llama-cpp-python has (vendor/llama.cpp). Three engines add 24 tokens to one
prompt: transformers from the model itself, llama.cpp from the file, and our runtime from the imported file at every number of shards. The
models have no vocabulary. Where layers carry states, tokens past a checkpoint of them (a prompt of 280) are compared with the model's own
too. Results go to DIR/gguf.jsonl; bench/families.py --table writes them into docs/models.md.

PROGRAM is bench/llama_tokens.cpp, built against llama.cpp:

    g++ -O2 -std=c++17 -I SRC/include -I SRC/ggml/include bench/llama_tokens.cpp -o llama_tokens BUILD/src/libllama.a \\
        BUILD/ggml/src/libggml.a BUILD/ggml/src/libggml-cpu.a BUILD/ggml/src/libggml-base.a -lgomp -lpthread -ldl -lm
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MethodType
from typing import Any

import families
import tiny_decoders

from mesh.errors import MeshError
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.importer.trace.library import quiet
from mesh.runtime.programs import Compiled

RESULTS = "gguf.jsonl"
OLDER_NAMES = {"rotary_pct": 0.25, "n_ctx": 320, "rotary_dim": 8}  # that the converter reads, and transformers 5 writes otherwise
SIGMOID = {"scoring_func": "sigmoid"}  # that configurations of checkpoints have, and transformers' own leave out
TIED = {"tie_word_embeddings": True}  # llama.cpp has no other form of these
PATTERN = {"num_hidden_layers": 4, "layer_types": ["sliding_attention"] * 3 + ["full_attention"]}
NO_WINDOW = {"sliding_window": None}  # llama.cpp leaves these windows out
TURNING = {"rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0], "rope_type": "default"}}
SQUARE = {"linear_value_head_dim": 8}  # llama.cpp has states as wide as high
SCALES = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7, "attention_multiplier": 0.3}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 20.0, "original_max_position_embeddings": 16, "beta_fast": 32.0}
LATER = NO_WINDOW | {"rope_parameters": YARN | {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}}
CHUNKS = {"attention_chunk_size": 8192, "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0], "interleave_moe_layer_step": 1}
LLAMA4 = CHUNKS | {"layer_types": ["chunked_attention"] * 3 + ["full_attention"]}
OWN: Mapping[str, Mapping[str, Any]] = {
    "afmoe": PATTERN | {"num_dense_layers": 1, "mup_enabled": True, "route_scale": 1.7, "route_norm": True},
    "bitnet": TIED,
    "cohere": TIED,
    "cohere2": TIED | PATTERN | {"rotary_pct": 1.0},
    "deepseek_v3": SIGMOID,
    "dots1": {"num_key_value_heads": 4, **SIGMOID},
    "ernie4_5_moe": {"intermediate_size": 48},
    "exaone4": NO_WINDOW | {"layer_types": ["full_attention"] * 2},
    "exaone_moe": SIGMOID,
    "falcon": {"num_kv_heads": 1, "multi_query": True, "ffn_hidden_size": 128},
    "falcon_h1": {"head_dim": 8},
    "falcon_mamba": {"intermediate_size": 64, "mixer_rms_eps": 1e-5},
    "gemma": TIED,
    "gemma3": TIED | {"text_config": TIED | {"query_pre_attn_scalar": 8}},
    "gemma3, with images": TIED | {"text_config": TIED | {"query_pre_attn_scalar": 8}},
    "gemma3_text": TIED | {"query_pre_attn_scalar": 8},
    "gemma3n": TIED | {"text_config": TIED | {"hidden_size_per_layer_input": 256, "laurel_rank": 64}},
    "gemma3n_text": TIED | {"hidden_size_per_layer_input": 256, "laurel_rank": 64},
    "gemma4": TIED | {"text_config": TIED | {"global_head_dim": 16}},
    "gemma4, with images": TIED | {"text_config": TIED | {"global_head_dim": 16}},
    "gemma4_text": TIED | {"global_head_dim": 16},
    "gemma4_unified": TIED | {"text_config": TIED | {"global_head_dim": 16}},
    "gemma2": TIED | {"query_pre_attn_scalar": 8},
    "glm": {"seq_length": 320},
    "glm4_moe_lite": SIGMOID,
    "glm4v, with images": {"text_config": TURNING},
    "glm4v_moe, with images": {"text_config": TURNING},
    "gpt2": {"n_inner": 128},
    "gpt-sw3": {"n_inner": 128},
    "gpt_bigcode": {"n_inner": 128},
    "granite": SCALES,
    "hunyuan_v1_moe": {"moe_topk": [2, 2], "moe_intermediate_size": [56, 56], "num_shared_expert": [1, 1]},
    "granitemoe": SCALES,
    "granitemoeshared": SCALES | {"shared_intermediate_size": 24},
    "kimi_linear": {"q_lora_rank": None, "mlp_layer_types": ["sparse"] * 2},  # others are saved by names that the converter lacks
    "lfm2_moe": TIED,
    "llama4": {"text_config": LLAMA4},
    "llama4, with images": {"text_config": LLAMA4},
    "llama4_text": LLAMA4,
    "mamba": {"intermediate_size": 64},
    "mellum": PATTERN,
    "minimax_m2": SIGMOID,
    "ministral3": LATER,
    "mistral": NO_WINDOW,
    "mistral3, with images": {"text_config": NO_WINDOW},
    "mixtral": NO_WINDOW,
    "nemotron_h": {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
    "nemotron_h, without experts": {"layers_block_type": ["linear_attention", "full_attention", "mlp"]},
    "olmoe": {"num_key_value_heads": 4},
    "phi": {"num_key_value_heads": 4, "intermediate_size": 128},
    "phi3": NO_WINDOW,
    "phimoe": NO_WINDOW | {"attention_bias": True, "lm_head_bias": True},
    "qwen3_5": {"text_config": SQUARE | TURNING},
    "qwen3_5, with images": {"text_config": SQUARE | TURNING},
    "qwen3_5_moe": {"text_config": SQUARE | TURNING},
    "qwen3_5_moe, with images": {"text_config": SQUARE | TURNING},
    "qwen3_5_moe_text": SQUARE | TURNING,
    "qwen3_5_text": SQUARE | TURNING,
    "qwen3_next": SQUARE,
    "qwen3_moe": {"norm_topk_prob": True},
    "qwen3_vl, with images": {"text_config": {"num_hidden_layers": 4}},  # more than layers that images come into
    "qwen3_vl_moe, with images": {"text_config": {"num_hidden_layers": 4, "norm_topk_prob": True}},
    "sarvam_mla": SIGMOID,
    "smollm3": {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4},
    "starcoder2": NO_WINDOW,
}
"""What the converter or llama.cpp asks of a tiny model besides. After a comma: a second model of the same family."""
_KDA = {"full_attn_layers": [2], "kda_layers": [1], "head_dim": 8, "num_heads": 4, "short_conv_kernel_size": 4}
AS_CHECKPOINTS: Mapping[str, Mapping[str, Any]] = {
    "glm4_moe_lite": {"first_k_dense_replace": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "kimi_linear": {"linear_attn_config": _KDA, "first_k_dense_replace": 0, "num_shared_experts": 1}
    | {"moe_router_activation_func": "sigmoid"},
    "nemotron_h, without experts": dict.fromkeys(("num_experts_per_tok", "n_routed_experts", "n_group", "topk_group"))
    | {"hybrid_override_pattern": "M*-"},
    "phimoe": {"original_max_position_embeddings": 320},
    "solar_open": {"partial_rotary_factor": 1.0},
}
"""What configurations of checkpoints say, and transformers 5 writes otherwise: for the converter alone. None: they do not say it."""
TURNED = ("qwen3_vl_moe, with images",)
"""Families whose checkpoints have experts as [experts, in, out], which transformers 5 saves turned."""
OTHERWISE: Mapping[str, str] = {
    "phimoe": "its norms do not subtract the mean, and a softmax weighs experts; with these two in transformers they are equal",
}
"""Why llama.cpp's tokens are not the model's, where that is known."""
TOKENIZER = {"model": {"vocab": {str(token): token for token in range(96)}}, "added_tokens": []}
"""What the converter counts the tokens of."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--llama", type=Path, required=True)
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--again", action="store_true", help="also those that are in the results already")
    parser.add_argument("--convert", nargs=2, type=Path, metavar=("FROM", "TO"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        convert(options.llama, *options.only, *options.convert)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    results = options.work / RESULTS
    done = set() if options.again else set(families.read(results))
    for kind in options.only or convertible(options.llama):
        if kind not in done:
            result = tried(kind, options)
            with results.open("a") as file:
                file.write(json.dumps({"family": kind, **result}) + "\n")
            print(f"{kind}: {json.dumps(result)}", flush=True)


def convertible(llama: Path) -> list[str]:
    """Families of transformers whose class the converter has, alone or as a model of images and text, and the second models of these."""
    from transformers.models.auto import modeling_auto as auto

    code = "import conversion; print(*conversion.TEXT_MODEL_MAP)"
    ran = subprocess.run([sys.executable, "-c", code], env=_with(llama), capture_output=True, text=True, check=True)
    known = ran.stdout.lower().split()  # some are spelled otherwise
    causal, both = dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    found = {kind for kind, name in causal.items() if name.lower() in known}
    images = {f"{kind}{families.WITH_IMAGES}" for kind in tiny_decoders.families(True) if both[kind].lower() in known}
    return sorted(found | images | {name for name in OWN if name.partition(",")[0] in found})


def convert(llama: Path, family: str, source: Path, out: Path) -> None:
    """In a process of its own, whose gguf package is the converter's. The converted model says that it has no vocabulary."""
    import gguf
    import torch

    if family in TURNED:
        turn_experts(source / "model.safetensors")
    conversion = import_module("conversion")
    base = import_module("conversion.base")
    settings = OLDER_NAMES | base.ModelBase.load_hparams(source, False)
    settings |= AS_CHECKPOINTS.get(family, {})
    settings = {key: value for key, value in settings.items() if value is not None or key not in AS_CHECKPOINTS.get(family, {})}
    spelled = {name.lower(): name for name in conversion.TEXT_MODEL_MAP}
    settings["architectures"] = [spelled.get(name.lower(), name) for name in settings["architectures"]]
    kind: Any = conversion.get_model_class(conversion.get_model_architecture(settings, base.ModelType.TEXT))

    def without_vocabulary(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        if not any(key.endswith(".vocab_size") for part in self.gguf_writer.kv_data for key in part):
            self.gguf_writer.add_vocab_size(self.hparams["vocab_size"])

    kind.no_mtp = True  # the tiny models guess no tokens ahead
    with torch.inference_mode():
        made = kind(source, gguf.LlamaFileType.ALL_F32, out, eager=False, hparams=settings)
        writer = getattr(made, "impl", made)  # some choose the class of the model themselves
        writer.set_vocab = MethodType(without_vocabulary, writer)
        made.write()


def turn_experts(path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    ends = (".experts.gate_up_proj", ".experts.down_proj")
    turned = {name: each.swapaxes(1, 2).copy() if name.endswith(ends) else each for name, each in load_file(path).items()}
    save_file(turned, path, metadata={"format": "pt"})


def tried(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """How one family went: `outcome` as in bench/families.py, or unconverted; `llama`: whether llama.cpp's tokens are the model's."""
    source, file, out = (options.work / each for each in ("source", f"{kind}.gguf", "model"))
    for each in (source, out):
        shutil.rmtree(each, ignore_errors=True)
    file.unlink(missing_ok=True)
    try:
        with quiet():
            own, images = OWN.get(kind, {}), kind.endswith(families.WITH_IMAGES)
            model = tiny_decoders.make(kind.partition(",")[0], source, own, multimodal=images)
            generated = families.wanted(model)
            expected = families.uncached(model, generated[: families.PROMPT])
            (source / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    except Exception as error:  # each family has its own demands on its sizes
        return {"outcome": "unmade", "why": families.one_line(error)}
    call = [sys.executable, __file__, "--work", options.work, "--llama", options.llama, "--only", kind, "--convert", source, file]
    made = subprocess.run(call, env=_with(options.llama), capture_output=True, text=True)
    if made.returncode:
        return {"outcome": "unconverted", "why": made.stderr.strip().splitlines()[-1][:300]}
    said, llama = by_llama(options.tokens, file, expected) if options.tokens else ("not run", [])
    if kind in OTHERWISE and said.startswith("differs"):
        said = f"{said}: {OTHERWISE[kind]}"
    result = {"architecture": _architecture(file), "llama": said, **imported(file, out, model, expected, llama)}
    if expected != generated:
        result.setdefault("note", families.DIFFERS)
    if result["outcome"] == "equal":
        file.unlink()
    return result


def imported(file: Path, out: Path, model: Any, expected: Sequence[int], llama: Sequence[int]) -> dict[str, Any]:
    """How the import went. Tokens of llama.cpp that are not the model's show what the converter has lost: ours have to be these. Where
    layers carry states, tokens past a checkpoint of them are compared with those of `model` too."""
    began = time.process_time()
    try:
        manifest = import_model(file, out, ImportOptions())
        took = {"way": "trace" if "made_by" in manifest.report else "builder", "cpu_seconds": round(time.process_time() - began, 1)}
        counts = list(range(1, manifest.layers + 1))
        compiled: Compiled = {}
        found = {count: families.greedy(out, manifest, expected[: families.PROMPT], count, compiled) for count in counts}
        wrong = [count for count, tokens in found.items() if tokens != expected]
        if manifest.has_states and not wrong:
            wrong = families.wrong_past_a_checkpoint(model, out, manifest, compiled)
        as_llama = wrong == counts and all(tokens[families.PROMPT :] == llama for tokens in found.values())
        note = {"note": "; llama.cpp's tokens, which are not those of the model that was converted"} if as_llama else {}
        return {"outcome": "different" if wrong and not as_llama else "equal", "shards": counts, "wrong": wrong, **note, **took}
    except MeshError as error:
        took = {"cpu_seconds": round(time.process_time() - began, 1)}
        return {"outcome": "refused", "kind": type(error).__name__, "why": families.one_line(error), **took}
    except Exception as error:
        return {"outcome": "failed", "why": f"{type(error).__name__}: {families.one_line(error)}"}


def by_llama(program: Path, file: Path, expected: Sequence[int]) -> tuple[str, list[int]]:
    """How llama.cpp's tokens compare with those expected, and the tokens."""
    prompt, wanted = expected[: families.PROMPT], list(expected[families.PROMPT :])
    call = [str(program), str(file), str(len(wanted)), *map(str, prompt)]
    run = subprocess.run(call, capture_output=True, text=True, env={**os.environ, "GGML_NO_BACKTRACE": "1"})
    if run.returncode:
        why = re.sub(r"\S*/", "", " ".join(run.stderr.split()))  # without the folders it was built in
        return f"cannot run it: {why[:200]}", []
    found = [int(line) for line in run.stdout.split()]
    differs = next((f"differs from token {i}" for i in range(len(wanted)) if found[i] != wanted[i]), None)
    return differs or "equal", found


def _architecture(file: Path) -> str:
    from mesh.importer.sources.gguf_file import GgufCheckpoint

    return str(GgufCheckpoint(file).metadata["general.architecture"])


def _with(llama: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join((str(llama), str(llama / "gguf-py"), str(Path(__file__).parent)))}


if __name__ == "__main__":
    main()
