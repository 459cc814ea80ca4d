"""torch and transformers, which only tracing needs."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["INSTALL", "available", "quiet", "torch_and_transformers", "torch_scan", "versions"]

INSTALL = "pip install 'stagemesh[trace]'"


@cache
def available() -> bool:
    """Whether torch and transformers can be imported."""
    try:
        torch_and_transformers()
    except ImportError:
        return False
    return True


def torch_and_transformers() -> tuple[Any, Any]:
    """The two libraries. ImportError where one, or the exporter's onnxscript, is missing."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a directory is all that is read
    with quiet():
        import onnxscript  # noqa: F401 (torch's exporter needs it)
        import torch
        import transformers

    return torch, transformers


def torch_scan() -> Any:
    """torch's loop over an axis, which its exporter writes as a Scan of ONNX."""
    from torch._higher_order_ops.scan import scan

    return scan


def versions() -> dict[str, str]:
    torch, transformers = torch_and_transformers()
    return {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' warnings and notes: what matters is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
