"""Decode speed of one model on one machine: ours, llama.cpp, transformers and onnxruntime, on the same 64 tokens.

    python bench/decode.py MODEL.gguf [--rows 1,4,8,16,32] [--rounds 3] [--out results.json]

Every engine runs the model at float32 in a process of its own, one engine after the other, in as many rounds; a figure is the median
over rounds of the median step. The floor is the bytes of all weights over the memory bandwidth measured in the same run.
Needs the extras `import` and `fixtures`, accelerate for transformers, and llama-cpp-python for llama.cpp.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PROMPT = list(range(100, 116))
STEPS = 64
POSITIONS = 128


def tokens(rows: int) -> np.ndarray:
    """The tokens [STEPS, rows], the same for every engine. Their values do not affect the time."""
    return np.random.default_rng(7).integers(100, 4000, (STEPS, rows)).astype(np.int32)


def measure(step: Callable[[int, np.ndarray], object], rows: int, steps: int = STEPS) -> float:
    """The median seconds of `step(position, tokens [rows])` over the first `steps` of the 64."""
    seconds = []
    for index, column in enumerate(tokens(rows)[:steps]):
        began = time.perf_counter()
        step(len(PROMPT) + index, column)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def ours(model: Path, rows: list[int]) -> dict[int, float]:
    from mesh.runtime.device import prepare
    from mesh.runtime.generate import Pipeline
    from mesh.runtime.sampling import SamplingParams

    prepare()
    pipeline = Pipeline.load(model, rows=max(rows), context=POSITIONS)

    def step(live: np.ndarray, at: int, column: np.ndarray) -> object:
        return pipeline.decode(live, np.full(len(live), at), column)

    result = {}
    for count in rows:
        for row in range(count):
            pipeline.start(row, PROMPT, SamplingParams(temperature=0), max_tokens=STEPS)
        live = np.arange(count)
        pipeline.decode(live, np.full(count, len(PROMPT)), np.full(count, 5))
        result[count] = measure(partial(step, live), count)
    return result


def llama_cpp(gguf: Path, rows: list[int]) -> dict[int, float]:
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), llama_cpp.llama_model_default_params())

    def run(batch: Any, context: Any, entries: list[tuple[int, int, int]]) -> None:
        batch.n_tokens = len(entries)
        for index, (token, position, sequence) in enumerate(entries):
            batch.token[index], batch.pos[index], batch.n_seq_id[index] = token, position, 1
            batch.seq_id[index][0], batch.logits[index] = sequence, 1
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(context)

    def step(batch: Any, context: Any, at: int, column: np.ndarray) -> None:
        run(batch, context, [(int(token), at, row) for row, token in enumerate(column)])

    result = {}
    for count in rows:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = POSITIONS * count, 512, count
        params.n_threads = params.n_threads_batch = os.cpu_count()
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        context = llama_cpp.llama_init_from_model(model, params)
        batch = llama_cpp.llama_batch_init(max(count, len(PROMPT)), 0, 1)
        for row in range(count):
            run(batch, context, [(token, position, row) for position, token in enumerate(PROMPT)])
        result[count] = measure(partial(step, batch, context), count)
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
    return result


def transformers(source: Path, rows: list[int]) -> dict[int, float]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def step(cache: Any, at: int, column: np.ndarray) -> object:
        tokens = torch.from_numpy(column)[:, None].long()
        return model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1).numpy()

    result = {}
    with torch.inference_mode():
        for count in rows:
            cache = DynamicCache()
            model(torch.tensor([PROMPT] * count), past_key_values=cache, use_cache=True)
            result[count] = measure(partial(step, cache), count)
    return result


def onnxruntime(model: Path, rows: list[int]) -> dict[int, float]:
    """onnxruntime on the blocks, one session for each block. It copies each layer's cache in every step, so many rows take fewer steps."""
    import onnxruntime as ort

    from mesh.model.manifest import Manifest

    manifest = Manifest.load(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = os.cpu_count() or 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the pools of 32 sessions would spin against each other
    names = [block.name for block in manifest.blocks]
    sessions = [ort.InferenceSession(str(model / f"{name}.onnx"), options, providers=["CPUExecutionProvider"]) for name in names]
    wanted = [{item.name for item in session.get_inputs()} for session in sessions]

    def step(past: list[list[np.ndarray]], at: int, column: np.ndarray) -> np.ndarray:
        count = len(column)
        given = {
            "input_ids": column[:, None].astype(np.int64),
            "position_ids": np.full((count, 1), at, np.int64),
            "write_indices": np.full(count, at, np.int64),
        }
        (given["hidden_in"],) = sessions[0].run(["hidden_out"], {name: given[name] for name in wanted[0]})
        for layer, session in enumerate(sessions[1:-1]):
            given["past_key"], given["past_value"] = past[layer]
            outputs = ["hidden_out", "present_key", "present_value"]
            given["hidden_in"], *past[layer] = session.run(outputs, {name: given[name] for name in wanted[layer + 1]})
        (logits,) = sessions[-1].run(["logits"], {"hidden_in": given["hidden_in"]})
        return logits[:, -1].argmax(-1)

    result = {}
    for count in rows:
        past = [
            [np.zeros((count, info.kv_heads, POSITIONS, width), np.float32) for width in (info.key_dim, info.value_dim)]
            for info in manifest.cache
        ]
        for position, token in enumerate(PROMPT):
            step(past, position, np.full(count, token))
        result[count] = measure(partial(step, past), count, STEPS if count < 8 else 8)
    return result


ENGINES = {"ours": ours, "llama.cpp": llama_cpp, "transformers": transformers, "onnxruntime": onnxruntime}


def bandwidth() -> float:
    """The bytes a second that all cores together read from memory; the best of several measurements."""
    import jax
    import jax.numpy as jnp

    data = jnp.ones(1 << 28, jnp.float32)
    total = jax.jit(jnp.sum)
    total(data).block_until_ready()
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        total(data).block_until_ready()
        best = min(best, time.perf_counter() - began)
    return data.nbytes / best


def dequantize_gguf(source: Path, out: Path) -> None:
    """A copy of the GGUF file with every tensor at float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    skip = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture", "general.file_type"}
    for field in reader.fields.values():
        if field.name not in skip:
            kind = field.types[0]
            writer.add_key_value(field.name, field.contents(), kind, field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
    writer.add_file_type(0)
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        writer.add_tensor(tensor.name, values.reshape([int(n) for n in reversed(tensor.shape)]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def dequantize_huggingface(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(loaded)(config)
    plain.load_state_dict(loaded.state_dict())
    plain.save_pretrained(out)


def prepare_sources(gguf: Path, work: Path) -> dict[str, Path]:
    from mesh.importer.options import ImportOptions
    from mesh.importer.run import import_model

    paths = {"ours": work / "model", "llama.cpp": work / "float32.gguf", "transformers": work / "huggingface"}
    paths["onnxruntime"] = paths["ours"]
    if not paths["ours"].exists():
        import_model(gguf, paths["ours"], ImportOptions(bits=32))
    if not paths["llama.cpp"].exists():
        dequantize_gguf(gguf, paths["llama.cpp"])
    if not paths["transformers"].exists():
        dequantize_huggingface(gguf, paths["transformers"])
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--rows", default="1,4,8,16,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--work", type=Path, help="where converted models are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = [int(part) for part in args.rows.split(",")]
    if args.one:
        print(json.dumps(ENGINES[args.one](args.gguf, rows)))
        return
    work = args.work or Path(tempfile.mkdtemp(prefix="bench-decode-"))
    work.mkdir(parents=True, exist_ok=True)
    paths = prepare_sources(args.gguf, work)
    engines = args.engines.split(",")
    steps: dict[str, dict[int, list[float]]] = {engine: {count: [] for count in rows} for engine in engines}
    speeds = []
    for _ in range(args.rounds):
        speeds.append(bandwidth())
        for engine in engines:
            command = [sys.executable, __file__, str(paths[engine]), "--rows", args.rows, "--one", engine]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for count, seconds in json.loads(output.splitlines()[-1]).items():
                steps[engine][int(count)].append(seconds)
            print(engine, {count: f"{int(count) / times[-1]:.1f}/s" for count, times in steps[engine].items()}, file=sys.stderr, flush=True)
    weight_bytes = (work / "float32.gguf").stat().st_size
    floor = weight_bytes / max(speeds)
    rates = {engine: {count: count / statistics.median(times) for count, times in by.items()} for engine, by in steps.items()}
    print(f"memory {max(speeds) / 1e9:.1f} GB/s, weights {weight_bytes / 1e6:.0f} MB")
    print(f"floor {floor * 1e3:.1f} ms a step, {1 / floor:.1f} steps/s")
    print("| tokens/s, rows | " + " | ".join(map(str, rows)) + " |")
    print("|---|" + "---|" * len(rows))
    for engine, by in rates.items():
        print(f"| {engine} | " + " | ".join(f"{by[count]:.1f}" for count in rows) + " |")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"floor_s": floor, "bandwidth": speeds, "tokens_per_s": rates, "steps_s": steps}, indent=1))


if __name__ == "__main__":
    main()
