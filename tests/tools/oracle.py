"""The tokens that one process generates, which a mesh must generate too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams


class Oracle:
    """What one process answers."""

    def __init__(self, model: Path, *, context: int) -> None:
        self._pipeline = Pipeline.load(model, context=context, chunk=256)

    def greedy(self, tokens: list[int], max_tokens: int) -> list[int]:
        return self._pipeline.complete(tokens, SamplingParams(temperature=0.0), max_tokens=max_tokens).ids

    def sampled(self, tokens: list[int], max_tokens: int, **params: Any) -> list[int]:
        return self._pipeline.complete(tokens, SamplingParams(**params), max_tokens=max_tokens).ids
