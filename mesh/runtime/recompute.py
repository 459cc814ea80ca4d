"""A stage that keeps no keys and values between steps (`enable_kv_cache: false`). It keeps its input instead, and every step computes
the whole row so far again.

For R rows of C tokens it keeps R * C * D numbers of hidden state (the first stage keeps only tokens), and the cache of one row. A full
cache would be R * C * 2 * kv_heads * head_dim numbers for every layer. A token then costs as much as prefilling its row. The tokens are
those of a stage with a cache: the same input goes through the same prefill programs, position by position.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from mesh.errors import BadRequest
from mesh.model.arrivals import Arrivals
from mesh.model.manifest import Manifest
from mesh.model.memory import MemoryNeed
from mesh.runtime.engine import SampledToken, StageCounters
from mesh.runtime.packing import in_turn
from mesh.runtime.programs import Compiled
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.segments import Segments
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange, Progress, no_progress

__all__ = ["RecomputingStage"]


class RecomputingStage:
    """An Engine, as Stage is. Made by `load`."""

    def __init__(self, inner: Stage, rows: int) -> None:
        """`inner` has one row, in which every step is computed."""
        self._inner = inner
        self.rows = rows
        self.context = inner.context
        self.counters = StageCounters()
        self.bucket = 0
        self.sampled_s = 0.0
        self._tokens = np.zeros((rows, inner.context), np.int32)
        self._hidden: np.ndarray | None = None  # [rows, context, D], of a stage that is not the first
        self._params = [(SamplingParams(), 0)] * rows
        self.serve(inner.layers)

    @classmethod
    def load(
        cls,
        directory: Path,
        config: StageConfig,
        *,
        manifest: Manifest | None = None,
        compiled: Compiled | None = None,
        progress: Progress = no_progress,
        arrivals: Arrivals | None = None,
    ) -> RecomputingStage:
        """Arguments and errors as of Stage.load."""
        config, rows = replace(config, rows=1, kept_rows=config.rows), config.rows
        inner = Stage.load(directory, config, manifest=manifest, compiled=compiled, progress=progress, arrivals=arrivals)
        return cls(inner, rows)

    @property
    def manifest(self) -> Manifest:
        return self._inner.manifest

    @property
    def layers(self) -> LayerRange:
        return self._inner.layers

    @property
    def need(self) -> MemoryNeed:
        return self._inner.need

    @property
    def held(self) -> LayerRange:
        return self._inner.held

    @property
    def compiled(self) -> int:
        return self._inner.compiled

    @property
    def first(self) -> bool:
        return self._inner.first

    @property
    def packs(self) -> bool:
        return False

    @property
    def last(self) -> bool:
        return self._inner.last

    @property
    def embeds(self) -> bool:
        return self._inner.embeds

    def serve(self, layers: LayerRange) -> None:
        self._inner.serve(layers)
        shape = (self.rows, self.context, self._inner.manifest.hidden.size)
        self._hidden = None if self.first else np.zeros(shape, self._inner.hidden_dtype)

    def warm_up(self, progress: Progress = no_progress) -> None:
        self._inner.warm_up(progress, decode=False)

    def exercise(self) -> None:
        """Does nothing: each step computes a whole row, so the first run of a program takes no longer than later ones."""

    def open(self, row: int, params: SamplingParams, *, prompt_length: int) -> None:
        self._check_row(row)
        self._params[row] = (params, prompt_length)

    def copy(self, source: int, target: int, positions: int) -> None:
        self._check_row(source)
        self._check_row(target)
        self._tokens[target, :positions] = self._tokens[source, :positions]
        if self._hidden is not None:
            self._hidden[target, :positions] = self._hidden[source, :positions]

    def prefill(self, row: int, start: int, tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray | SampledToken:
        """tokens [T] (and hidden [T, D]) of `row` from position `start` on -> hidden [T, D] or the token sampled after the last."""
        began = time.perf_counter()
        answer = self._run(row, start, np.asarray(tokens, np.int32), hidden)
        self.bucket, self.sampled_s = self._inner.bucket, self._inner.sampled_s
        self.counters.prefill_steps += 1
        self.counters.prefill_tokens += len(tokens)
        self.counters.prefill_s += time.perf_counter() - began
        return answer

    def decode(
        self, rows: np.ndarray, positions: np.ndarray, tokens: np.ndarray, hidden: np.ndarray | None = None
    ) -> np.ndarray | list[SampledToken]:
        """tokens [n] (and hidden [n, D]) of `rows` [n] at `positions` [n] -> hidden [n, D] or n tokens, one row after the other."""
        began = time.perf_counter()
        answers = []
        computed, sampled_s = 0, 0.0
        for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
            one = slice(index, index + 1)
            answers.append(self._run(int(row), int(position), np.asarray(tokens[one], np.int32), None if hidden is None else hidden[one]))
            computed += self._inner.bucket
            sampled_s += self._inner.sampled_s
        self.bucket, self.sampled_s = computed, sampled_s
        self.counters.decode_steps += 1
        self.counters.decode_tokens += len(rows)
        self.counters.decode_s += time.perf_counter() - began
        if self.last:
            return answers  # type: ignore[return-value]  # the last stage's are tokens
        return np.concatenate(answers)  # type: ignore[arg-type]  # the others' are hidden states

    def packed(self, segments: Segments, tokens: np.ndarray, hidden: np.ndarray | None = None) -> np.ndarray | list[SampledToken | None]:
        """Every segment as a step of its own."""
        return in_turn(self, segments, tokens, hidden)

    def _run(self, row: int, start: int, tokens: np.ndarray, hidden: np.ndarray | None) -> np.ndarray | SampledToken:
        """Keep the input, then compute the row from its beginning."""
        self._check_row(row)
        self._inner.check_chunk(start, tokens, hidden)
        stop = start + len(tokens)
        self._tokens[row, start:stop] = tokens
        before = None
        if self._hidden is not None:
            self._hidden[row, start:stop] = hidden
            before = self._hidden[row, :stop]
        if self.last:
            params, prompt_length = self._params[row]
            self._inner.open(0, params, prompt_length=prompt_length)
        answer = self._inner.prefill(0, 0, self._tokens[row, :stop], before)
        return answer if isinstance(answer, SampledToken) else answer[start:]

    def _check_row(self, row: int) -> None:
        if not 0 <= row < self.rows:
            raise BadRequest(f"row {row} is not one of this stage's {self.rows} rows", field="row")
