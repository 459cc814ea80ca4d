"""A decoder's ONNX graph made op by op, for forms of export that no exporter at hand writes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HIDDEN, HEADS, VOCAB = 16, 2, 24


@dataclass
class Graph:
    """A decoder of one layer without a cache, built step by step."""

    opset: int = 18
    seed: int = 0
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    def op(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        names = [f"{op_type}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, f"n{len(self.nodes)}", **attributes))
        return names[0] if outputs == 1 else names

    def const(self, value: Any) -> str:
        name = f"w{len(self.weights)}"
        self.weights[name] = np.array(value)
        return name

    def normal(self, *shape: int, scale: float = 0.4) -> str:
        rng = np.random.default_rng(self.seed + len(self.weights))
        return self.const(rng.normal(0, scale, shape).astype(np.float32))

    def embedding(self) -> str:
        return str(self.op("Gather", self.normal(VOCAB, HIDDEN, scale=1.0), "input_ids"))

    def heads(self, x: str) -> str:
        split = self.op("Reshape", self.op("MatMul", x, self.normal(HIDDEN, HIDDEN)), self.const([0, 0, HEADS, HIDDEN // HEADS]))
        return str(split)

    def unsqueeze(self, x: str, axis: int) -> str:
        """Axes are an input since opset 13, and an attribute before."""
        if self.opset >= 13:
            return str(self.op("Unsqueeze", x, self.const([axis])))
        return str(self.op("Unsqueeze", x, axes=[axis]))

    def mask(self) -> str:
        """float [T, T], very low above the diagonal."""
        length = self.op("Shape", "input_ids")
        length = self.op("Gather", length, self.const([1]))
        positions = self.op("Range", self.const(0), self.op("Squeeze", length), self.const(1))
        rows, columns = self.unsqueeze(positions, 1), self.unsqueeze(positions, 0)
        zero, low = self.const(np.float32(0)), self.const(np.float32(-1e9))
        return str(self.op("Where", self.op("Greater", columns, rows), low, zero))

    def attention(self, x: str) -> str:
        q, k, v = (self.op("Transpose", self.heads(x), perm=[0, 2, 1, 3]) for _ in range(3))
        raw = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.op("Add", self.op("Div", raw, self.const(np.float32(8**0.5))), self.mask())
        context = self.op("Transpose", self.op("MatMul", self.op("Softmax", scores, axis=3), v), perm=[0, 2, 1, 3])
        merged = self.op("Reshape", context, self.const([0, 0, HIDDEN]))
        return str(self.op("Add", x, self.op("MatMul", merged, self.normal(HIDDEN, HIDDEN))))

    def save(self, path: Path, x: str, batch: int | str = "batch") -> Path:
        self.nodes.append(helper.make_node("MatMul", [x, self.normal(HIDDEN, VOCAB)], ["logits"]))
        graph = helper.make_graph(
            self.nodes,
            "decoder",
            [helper.make_tensor_value_info("input_ids", TensorProto.INT64, [batch, "t"])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, "t", VOCAB])],
            [numpy_helper.from_array(array, name) for name, array in self.weights.items()],
        )
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8), path)
        return path
