"""Rewrite com.microsoft operators, as onnxruntime-genai and onnxruntime's optimizer write them, to standard ones."""

from __future__ import annotations

import onnx_ir as ir

from mesh.model.graph import Role

__all__ = ["rewrite_contrib"]


def rewrite_contrib(model: ir.Model, roles: dict[ir.Value, Role]) -> None:
    """In place."""
