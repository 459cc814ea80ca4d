"""The engines that bench/compare.py compares, each in a process of its own: it prints its figures as one line of JSON.

    python bench/compare_engines.py ENGINE SOURCE JSON-OF-A-WORKLOAD

Every engine decodes the same tokens behind prompts of PROMPT; their values do not affect the time. transformers and onnxruntime run at
float32 alone. Needs the extras `import` and `fixtures`, and accelerate for transformers.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from resident import memory

PROMPT = list(range(100, 116))
STEPS = 64
POSITIONS = 128


@dataclass(frozen=True)
class Workload:
    """`rows`: of decode steps. `prompts`: tokens of prompts, one at a time. `depths`: positions before a decode step of one row."""

    rows: Sequence[int] = (1, 8, 32)
    prompts: Sequence[int] = (64, 512, 1500)
    depths: Sequence[int] = ()


@dataclass
class Figures:
    """Seconds: of a decode step by its rows, of a prompt by its tokens, of a step of one row by its depth; until the model was ready.
    Peak resident bytes of the engine's processes; 0: not measured."""

    decode: dict[int, float] = field(default_factory=dict)
    prefill: dict[int, float] = field(default_factory=dict)
    depth: dict[int, float] = field(default_factory=dict)
    start_s: float = 0.0
    peak_bytes: int = 0

    @classmethod
    def of(cls, values: dict[str, Any]) -> Figures:
        """From JSON, where numbers as keys are texts."""
        kinds = {kind: {int(size): seconds for size, seconds in values[kind].items()} for kind in ("decode", "prefill", "depth")}
        return cls(**kinds, start_s=values["start_s"], peak_bytes=values["peak_bytes"])

    def cells(self) -> dict[tuple[str, int], float]:
        return {(kind, size): seconds for kind in ("decode", "prefill", "depth") for size, seconds in getattr(self, kind).items()}


def tokens(rows: int) -> np.ndarray:
    """The tokens [STEPS, rows]."""
    return np.random.default_rng(7).integers(100, 4000, (STEPS, rows)).astype(np.int32)


def measure(step: Callable[[int, np.ndarray], object], rows: int, steps: int = STEPS) -> float:
    """The median seconds of `step(position, tokens [rows])` over the first `steps` of the 64."""
    seconds = []
    for index, column in enumerate(tokens(rows)[:steps]):
        began = time.perf_counter()
        step(len(PROMPT) + index, column)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def peak_bytes(pid: int | None = None) -> int:
    """The most that was resident of a process, this one by default; 0 where it has ended. The system's own count for ended processes begins
    with what the process that started them has held."""
    return memory(pid or "self", "VmHWM")[0]


def ours(model: Path, work: Workload) -> Figures:
    from mesh.runtime.device import prepare
    from mesh.runtime.generate import Pipeline
    from mesh.runtime.sampling import SamplingParams

    prepare()
    greedy = SamplingParams(temperature=0)
    began = time.perf_counter()
    pipeline = Pipeline.load(model, rows=max(work.rows), context=POSITIONS)
    pipeline.warm_up()
    found = Figures(start_s=time.perf_counter() - began)

    def step(live: np.ndarray, at: int, column: np.ndarray) -> object:
        return pipeline.decode(live, np.full(len(live), at), column)

    for count in work.rows:
        for row in range(count):
            pipeline.start(row, PROMPT, greedy, max_tokens=STEPS)
        live = np.arange(count)
        pipeline.decode(live, np.full(count, len(PROMPT)), np.full(count, 5))
        found.decode[count] = measure(partial(step, live), count)
    found.peak_bytes = peak_bytes()
    if work.prompts or work.depths:
        context = max([*work.prompts, *work.depths]) + 2 * STEPS
        del pipeline
        pipeline = Pipeline.load(model, rows=1, context=context)
    for length in work.prompts:
        prompt = np.random.default_rng(length).integers(100, 4000, length).tolist()
        pipeline.start(0, prompt, greedy, max_tokens=STEPS)
        began = time.perf_counter()
        pipeline.start(0, prompt, greedy, max_tokens=STEPS)
        found.prefill[length] = time.perf_counter() - began
    alone = np.arange(1)

    def step_behind(depth: int, at: int, column: np.ndarray) -> object:
        return step(alone, depth + at - len(PROMPT), column)

    for depth in work.depths:
        pipeline.start(0, [5] * depth, greedy, max_tokens=STEPS)
        pipeline.decode(alone, np.full(1, depth), np.full(1, 5))
        found.depth[depth] = measure(partial(step_behind, depth), 1)
    return found


def transformers(source: Path, work: Workload) -> Figures:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(os.cpu_count() or 1)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()

    def step(cache: Any, at: int, column: np.ndarray) -> object:
        tokens = torch.from_numpy(column)[:, None].long()
        return model(tokens, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1).numpy()

    found = Figures()
    with torch.inference_mode():
        for count in work.rows:
            cache = DynamicCache()
            model(torch.tensor([PROMPT] * count), past_key_values=cache, use_cache=True)
            found.decode[count] = measure(partial(step, cache), count)
    found.peak_bytes = peak_bytes()
    return found


def onnxruntime(model: Path, work: Workload) -> Figures:
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

    found = Figures()
    for count in work.rows:
        past = [
            [np.zeros((count, info.kv_heads, POSITIONS, width), np.float32) for width in (info.key_dim, info.value_dim)]
            for info in manifest.cache
        ]
        for position, token in enumerate(PROMPT):
            step(past, position, np.full(count, token))
        found.decode[count] = measure(partial(step, past), count, STEPS if count < 8 else 8)
    found.peak_bytes = peak_bytes()
    return found


ENGINES: dict[str, Callable[[Path, Workload], Figures]] = {"ours": ours, "transformers": transformers, "onnxruntime": onnxruntime}


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
    for entry in reader.fields.values():
        if entry.name not in skip:
            kind = entry.types[0]
            writer.add_key_value(entry.name, entry.contents(), kind, entry.types[-1] if kind == gguf.GGUFValueType.ARRAY else None)
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


if __name__ == "__main__":
    print(json.dumps(asdict(ENGINES[sys.argv[1]](Path(sys.argv[2]), Workload(**json.loads(sys.argv[3]))))))
