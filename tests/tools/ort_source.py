"""Runs an exported decoder as it is in stock onnxruntime: the oracle its blocks are compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort

TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64, "tensor(int32)": np.int32}


class SourceSession:
    """One row of tokens. With past inputs the cache is fed back, without them every call runs the whole sequence."""

    def __init__(self, path: Path) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {i.name: (TYPES[i.type], i.shape) for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.past_names = [name for name, (_, shape) in self.inputs.items() if len(shape) >= 4]
        self.start()

    def start(self) -> None:
        self.tokens: list[int] = []
        self.past = {name: np.zeros(self._empty(name), self.inputs[name][0]) for name in self.past_names}

    def _empty(self, name: str) -> list[int]:
        shape = self.inputs[name][1]
        rank = len(shape)
        return [0 if axis == rank - 2 else dim if isinstance(dim, int) else 1 for axis, dim in enumerate(shape)]

    def __call__(self, tokens: list[int]) -> np.ndarray:
        """Append the tokens; logits [len(tokens), vocab]."""
        before = len(self.tokens)
        self.tokens += tokens
        first = before if self.past_names else 0
        fed = {
            "input_ids": [self.tokens[first:]],
            "attention_mask": [[1] * len(self.tokens)],
            "position_ids": [list(range(first, len(self.tokens)))],
        }
        feeds = {name: np.asarray(value, self.inputs[name][0]) for name, value in fed.items() if name in self.inputs}
        results = dict(zip(self.outputs, self.session.run(None, feeds | self.past), strict=True))
        presents = [name for name in self.outputs if name.startswith("present")]
        for past, present in zip(self.past_names, presents, strict=True):
            self.past[past] = results[present]
        return np.asarray(results["logits"][0, before - first :], np.float32)
