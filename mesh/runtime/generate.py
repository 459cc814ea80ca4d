"""Generation in one process through N stages, without a network: the reference for the mesh's answers and speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mesh.errors import BadRequest, PromptTooLong
from mesh.model.manifest import Manifest
from mesh.runtime.engine import SampledToken
from mesh.runtime.programs import Compiled
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import Progress, even_ranges, no_progress

__all__ = ["Generation", "Pipeline"]


@dataclass
class Generation:
    """What one request produced, and how long it took in seconds; `step_s` has one entry for each decode step."""

    tokens: list[SampledToken] = field(default_factory=list)
    finish_reason: str = "length"
    prefill_s: float = 0.0
    step_s: list[float] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


class Pipeline:
    """All stages of a model, called one after the other."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)
        self.manifest: Manifest = self.stages[0].manifest
        self.context = min(stage.context for stage in stages)

    @classmethod
    def load(
        cls,
        directory: Path,
        *,
        shards: int = 1,
        rows: int = 1,
        context: int | None = None,
        chunk: int = 256,
        max_memory_bytes: int | None = None,
        compiled: Compiled | None = None,
        progress: Progress = no_progress,
    ) -> Pipeline:
        """Cut the model evenly over `shards` stages. `max_memory_bytes` is for each stage; `compiled` as for Stage.load."""
        manifest = Manifest.load(directory)
        stages = []
        compiled = {} if compiled is None else compiled
        for layers in even_ranges(manifest.layers, shards):
            config = StageConfig(layers, rows=rows, context=context, chunk=chunk, max_memory_bytes=max_memory_bytes)
            stages.append(Stage.load(directory, config, compiled=compiled, progress=progress))
        return cls(stages)

    def warm_up(self, progress: Progress = no_progress) -> None:
        for stage in self.stages:
            stage.warm_up(progress)

    def compile_for(self, prompt_length: int, max_tokens: int, progress: Progress = no_progress) -> None:
        """Compile only what one request of this size runs."""
        for index, stage in enumerate(self.stages):
            progress(f"compile stage {index}", index, len(self.stages))
            stage.compile_for(prompt_length, max_tokens)

    def prefill(self, row: int, start: int, tokens: np.ndarray) -> SampledToken:
        """One chunk of one row through every stage; the token sampled after it."""
        hidden: np.ndarray | None = None
        for stage in self.stages[:-1]:
            hidden = stage.prefill(row, start, tokens, hidden)  # type: ignore[assignment]
        result = self.stages[-1].prefill(row, start, tokens, hidden)
        assert isinstance(result, SampledToken)
        return result

    def decode(self, rows: np.ndarray, positions: np.ndarray, tokens: np.ndarray) -> list[SampledToken]:
        """One step of a decode batch through every stage."""
        hidden: np.ndarray | None = None
        for stage in self.stages[:-1]:
            hidden = stage.decode(rows, positions, tokens, hidden)  # type: ignore[assignment]
        result = self.stages[-1].decode(rows, positions, tokens, hidden)
        assert isinstance(result, list)
        return result

    def start(self, row: int, prompt: Sequence[int], params: SamplingParams, *, max_tokens: int) -> SampledToken:
        """Check a request, open its row and prefill it. Returns the first token."""
        check_request(prompt, max_tokens, vocab_size=self.manifest.vocab_size, context=self.context)
        self.stages[-1].open(row, params, prompt_length=len(prompt))
        chunk = self.stages[0].buckets.chunks[-1]
        tokens = np.asarray(prompt, np.int32)
        token: SampledToken | None = None
        for start in range(0, len(tokens), chunk):
            token = self.prefill(row, start, tokens[start : start + chunk])
        assert token is not None
        return token

    def generate(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        row: int = 0,
        into: Generation | None = None,
    ) -> Iterator[SampledToken]:
        """The tokens of one request as they come; `into` is filled in meanwhile. A stop token ends it and is not yielded."""
        generation = Generation() if into is None else into
        began = time.perf_counter()
        token = self.start(row, prompt, params, max_tokens=max_tokens)
        generation.prefill_s = time.perf_counter() - began
        rows = np.array([row], np.int32)
        for position in range(len(prompt), len(prompt) + max_tokens):
            if token.id in stop_ids:
                generation.finish_reason = "stop"
                return
            generation.tokens.append(token)
            yield token
            if len(generation.tokens) == max_tokens:
                return
            began = time.perf_counter()
            token = self.decode(rows, np.array([position]), np.array([token.id]))[0]
            generation.step_s.append(time.perf_counter() - began)

    def complete(self, prompt: Sequence[int], params: SamplingParams, *, max_tokens: int, stop_ids: Sequence[int] = ()) -> Generation:
        """Run `generate` to its end."""
        generation = Generation()
        for _ in self.generate(prompt, params, max_tokens=max_tokens, stop_ids=stop_ids, into=generation):
            pass
        return generation


def check_request(prompt: Sequence[int], max_tokens: int, *, vocab_size: int, context: int) -> None:
    """BadRequest or PromptTooLong, with the name of the field, if a request cannot be served."""
    if not len(prompt):
        raise BadRequest("the prompt is empty: give at least one token", field="prompt")
    if max_tokens < 1:
        raise BadRequest(f"max_tokens is {max_tokens}: give at least 1", field="max_tokens")
    bad = next((token for token in prompt if not 0 <= token < vocab_size), None)
    if bad is not None:
        raise BadRequest(f"token {bad} is not in the vocabulary: ids are 0 to {vocab_size - 1}", field="tokens")
    if len(prompt) + max_tokens > context:
        limit = context - max_tokens
        advice = f"at most {limit} with max_tokens {max_tokens}" if limit > 0 else f"max_tokens must be under {context}"
        raise PromptTooLong(
            f"the prompt has {len(prompt)} tokens and {max_tokens} more are asked for, but the context is {context}: {advice}",
            tokens=len(prompt),
            limit=max(limit, 0),
        )
