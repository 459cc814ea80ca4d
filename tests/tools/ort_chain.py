"""Runs the blocks of a model directory one after the other in stock onnxruntime, with the KV cache in numpy."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnxruntime as ort

from mesh.model.manifest import CacheInfo, block_name

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(bfloat16)": ml_dtypes.bfloat16}


class Chain:
    """One row of tokens through embed, every layer and head."""

    def __init__(self, directory: Path, cache: tuple[CacheInfo, ...], slots: int = 64) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        # by default onnxruntime rounds activations to 8 bits where it fuses DequantizeLinear into MatMul
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        names = [block_name("embed"), *(block_name(i) for i in range(len(cache))), block_name("head")]
        self.sessions = [ort.InferenceSession(directory / f"{name}.onnx", options, providers=["CPUExecutionProvider"]) for name in names]
        dtype = DTYPES[self.sessions[0].get_outputs()[0].type]
        self.caches = [
            [
                np.zeros((1, info.kv_heads, slots, info.key_dim), dtype),
                np.zeros((1, info.kv_heads, slots, info.value_dim), dtype),
            ]
            for info in cache
        ]
        self.length = 0

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """Append the tokens; logits [len(tokens), vocab]."""
        positions = np.arange(self.length, self.length + len(tokens), dtype=np.int64)[None]
        embed, *layers, head = self.sessions
        feeds = {"input_ids": np.asarray([tokens], np.int64), "position_ids": positions}
        hidden = embed.run(None, {i.name: feeds[i.name] for i in embed.get_inputs()})[0]
        for cache, layer in zip(self.caches, layers, strict=True):
            feeds = {
                "hidden_in": hidden,
                "position_ids": positions,
                "write_indices": np.asarray([self.length], np.int64),
                "past_key": cache[0],
                "past_value": cache[1],
            }
            hidden, *cache[:] = layer.run(["hidden_out", "present_key", "present_value"], feeds)
        self.length += len(tokens)
        return head.run(None, {"hidden_in": hidden})[0][0]


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference over the largest magnitude."""
    return float(np.abs(got.astype(np.float64) - want).max() / np.abs(want).max())
