"""ONNX -> pure JAX functions: a registry of ops, one function each, and the interpreter that composes them at trace time."""

from __future__ import annotations

from mesh.lowering import ops, registry
from mesh.lowering.lower import Lowered, lower
from mesh.lowering.registry import register

__all__ = ["Lowered", "lower", "register", "supported"]


def supported(op_type: str, domain: str = "", opset: int = 24) -> bool:
    """Whether an op has a lowering in that opset of its domain.

    Standard ops defined as functions need none (`lower` expands them), and attributes are checked by `lower`.
    """
    ops.load()
    return registry.find(op_type, domain, opset) is not None
