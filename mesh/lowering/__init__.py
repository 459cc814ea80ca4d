"""ONNX -> pure JAX functions: a registry of ops, one function each, and the interpreter that composes them at trace time."""

from __future__ import annotations

from mesh.lowering.lower import Lowered, lower
from mesh.lowering.registry import register
from mesh.lowering.registry import supported as _supported

__all__ = ["Lowered", "lower", "register", "supported"]


def supported(op_type: str, domain: str = "", opset: int = 24) -> bool:
    """Whether `lower` accepts this op in that opset of its domain, directly or as a function of the ONNX standard."""
    return _supported(op_type, domain, opset)
