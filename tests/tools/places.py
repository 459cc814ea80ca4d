"""The paths in the repository that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "mesh"
DOCS = ROOT / "docs"
NATS = ROOT / "nats"
BENCH = ROOT / "bench"
DEPLOY = ROOT / "deploy"
EXPORTS = ROOT / "tests" / "fixtures" / "onnx"
