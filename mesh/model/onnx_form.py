"""The form of ONNX that the blocks of a model directory have. docs/model-format.md describes the blocks."""

from __future__ import annotations

from typing import Final

__all__ = ["IR_VERSION", "OPSET"]

OPSET: Final = 24
"""The opset of the default domain. Blocks use no other domain, and exported graphs are brought to this one at import."""

IR_VERSION: Final = 12
"""The version of the ONNX file format that goes with the opset."""
