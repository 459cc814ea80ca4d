"""The compute thread, and one step: a frame in, through the engine, a frame out. The thread knows neither NATS nor asyncio; results go
back to the event loop through one function that it is given."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from mesh.protocol.frame import NOT_WANTED
from mesh.protocol.frame_codec import Flags, Frame, Kind, StageTiming
from mesh.runtime.engine import Engine, SampledToken, Segments
from mesh.runtime.sampling import MAX_LOGPROBS
from mesh.shard.state import ROW_MASK

__all__ = ["ComputeThread", "run_step"]

log = logging.getLogger("mesh.shard")

_NO_TOKEN = SampledToken(NOT_WANTED)

Deliver = Callable[..., object]
"""Calls a function with arguments in the event loop's thread, as loop.call_soon_threadsafe does."""


class ComputeThread:
    """Runs work in the order in which it is submitted, one item at a time. The caller limits how much is queued (ShardState.queued)."""

    def __init__(self, deliver: Deliver, name: str = "compute") -> None:
        self._deliver = deliver
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Callable[[Any, BaseException | None], None]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.busy_s = 0.0  # the event loop reads it; assigning a float is atomic
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, work: Callable[[], Any], done: Callable[[Any, BaseException | None], None]) -> None:
        """Run `work` in the thread, then done(result, None) or done(None, error) in the loop."""
        self._work.put((work, done))

    def stop(self, timeout_s: float = 5.0) -> bool:
        """Finish the submitted work and end. False if that takes longer than `timeout_s`; the thread then ends with the process."""
        self._work.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            work, done = item
            began = time.perf_counter()
            result, error = None, None
            try:
                result = work()
            except BaseException as caught:
                error = caught
            self.busy_s += time.perf_counter() - began
            try:
                self._deliver(done, result, error)
            except RuntimeError:  # the loop is closed: nothing waits for the result
                return
            del item, work, done, result, error  # hold no arrays while waiting


def run_step(stage: Engine, frame: Frame, timing: Callable[[float], StageTiming]) -> Frame:
    """Compute `frame` on `stage`. Returns the frame for the next stage, with the hidden state; on the last stage the answer, with the
    sampled tokens (or an ACK for a prefill chunk that is not the prompt's last). `timing(compute_s)` makes the record that the stage
    adds to the frame; the engine's `bucket` is that of this step then."""
    rows = frame.stage_rows[frame.hop] & ROW_MASK
    hidden = frame.tensors[0] if frame.tensors else None
    began = time.perf_counter()
    result: Any
    if frame.kind is Kind.PREFILL:
        result = stage.prefill(int(rows[0]), int(frame.positions[0]), frame.tokens, hidden)
    elif frame.kind is Kind.PACKED:
        result = stage.packed(Segments(rows.tolist(), frame.positions.tolist(), frame.counts(), frame.wants()), frame.tokens, hidden)
    else:
        result = stage.decode(rows, frame.positions, frame.tokens, hidden)
    record = timing(time.perf_counter() - began)
    if not stage.last:
        return frame.forward(result, record)
    if frame.kind is Kind.PREFILL and Flags.FINAL not in frame.flags:
        return frame.answer(Kind.ACK, record)
    tokens: list[SampledToken] = [result] if isinstance(result, SampledToken) else [token or _NO_TOKEN for token in result]
    ids = np.fromiter((token.id for token in tokens), np.int32, len(tokens))
    return frame.answer(Kind.TOKENS, record, tokens=ids, tensors=(*_logprobs(tokens), *_states(tokens)))


def _states(tokens: list[SampledToken]) -> tuple[np.ndarray, ...]:
    """The hidden states [e, D] of the rows that asked for them, where there are any."""
    states = [token.state for token in tokens if token.state is not None]
    return (np.stack(states),) if states else ()


def _logprobs(tokens: list[SampledToken]) -> tuple[np.ndarray, ...]:
    """(chosen [n], ids [n, k], logprobs [n, k]) of n rows. NaN where a row asked for none; empty where no row asked."""
    if all(token.logprob is None for token in tokens):
        return ()
    width = min(MAX_LOGPROBS, max(len(token.top) for token in tokens))
    chosen = np.full(len(tokens), np.nan, np.float32)
    ids = np.zeros((len(tokens), width), np.int32)
    values = np.full((len(tokens), width), np.nan, np.float32)
    for row, token in enumerate(tokens):
        if token.logprob is not None:
            chosen[row] = token.logprob
            for column, (candidate, logprob) in enumerate(token.top[:width]):
                ids[row, column], values[row, column] = candidate, logprob
    return chosen, ids, values
