"""Inputs of products that a block rounds to bfloat16: Cast(x, bfloat16), and Cast back to float32. Kernels round them on the way."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mesh.lowering.op_helpers import numpy_type
from mesh.lowering.prepare import GraphNode

__all__ = ["before_rounding"]


def before_rounding(made_by: Mapping[str, GraphNode], name: str) -> str | None:
    """The value that was rounded to make this one, which is float32 again; None if it was not made so. `made_by`: nodes by name."""
    wide = _cast(made_by, name)
    narrow = None if wide is None else _cast(made_by, wide.inputs[0])
    if wide is None or narrow is None or numpy_type(wide.attributes["to"]) != np.float32:
        return None
    return narrow.inputs[0] if numpy_type(narrow.attributes["to"]).name == "bfloat16" else None


def _cast(made_by: Mapping[str, GraphNode], name: str) -> GraphNode | None:
    node = made_by.get(name)
    return node if node is not None and (node.op.domain, node.op.op_type) == ("", "Cast") else None
