"""Addresses of metrics, as Prometheus wants them."""

from __future__ import annotations

import contextlib
from urllib.parse import urlsplit

__all__ = ["target_of"]


def target_of(url: str) -> str:
    """host:port of a metrics address, as Prometheus' file_sd wants it; empty where it is none."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(url)
        if parts.hostname and parts.port:
            return parts.netloc
    return ""
