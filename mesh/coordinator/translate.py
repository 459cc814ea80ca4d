"""Between the core's values and what travels: frames to shards and back, leases to replicas."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

from mesh.coordinator.core.events import FrameLost, FrameOut, Result, ResultRow
from mesh.coordinator.core.routing import Replica
from mesh.errors import FrameRejected
from mesh.protocol import frame_codec
from mesh.protocol.frame import EMBEDDED, NOT_WANTED, WANTED
from mesh.protocol.frame_codec import Flags, Frame, Kind, Nack
from mesh.protocol.status import ShardLease
from mesh.protocol.stream import Token

__all__ = ["HiddenState", "event_of", "frame_of", "replica_of"]


class HiddenState(NamedTuple):
    """What a session gets in place of a token that asked for a hidden state: `values` [D] float32."""

    values: np.ndarray
    id: int = EMBEDDED

    @property
    def finite(self) -> bool:
        """Whether every one of them is a number."""
        return bool(np.isfinite(self.values).all())


_KINDS: Final = {"prefill": Kind.PREFILL, "decode": Kind.DECODE, "packed": Kind.PACKED}

_HOPELESS: Final = {Nack.BAD_INPUT: "input", Nack.TOO_LARGE: "too_large"}
"""Refusals that no other route can help."""


def frame_of(out: FrameOut, *, model_hash: str, coordinator: str, flags: Flags, traceparent: str | None = None) -> Frame:
    sessions = np.array([row.key for row in out.rows], np.uint64)
    if out.kind == "prefill" and out.rows[0].wants:
        flags |= Flags.FINAL
    return Frame(
        kind=_KINDS[out.kind],
        model_hash=model_hash,
        coordinator=coordinator,
        route=out.route,
        sessions=sessions,
        epochs=np.array([row.epoch for row in out.rows], np.uint32),
        positions=np.array([row.start for row in out.rows], np.uint32),
        stage_rows=np.array([row.rows for row in out.rows], np.uint32).T,
        tokens=np.array([token for row in out.rows for token in row.tokens], np.int32),
        step=out.frame,
        flags=flags,
        traceparent=traceparent,
        lengths=_lengths(out) if out.kind == "packed" else None,
    )


def _lengths(out: FrameOut) -> np.ndarray:
    return np.array([len(row.tokens) | (WANTED if row.wants else 0) for row in out.rows], np.uint32)


def event_of(frame: Frame) -> Result | FrameLost | None:
    """What an answer means to the core; None for a frame that is not an answer."""
    match frame.kind:
        case Kind.ACK:
            return Result(frame.step, waited_s=_waited_s(frame))
        case Kind.TOKENS:
            keys, positions, ids = frame.sessions.tolist(), frame.positions.tolist(), frame.tokens.tolist()
            tokens = _tokens(ids, frame.tensors)
            wanted = [None if token.id == NOT_WANTED else token for token in tokens]
            return Result(frame.step, tuple(map(ResultRow, keys, positions, wanted)), _waited_s(frame))
        case Kind.NACK:
            shard = frame.route[frame.hop].shard
            reason = _HOPELESS.get(frame.reason)
            error = None
            if reason is not None:
                error = FrameRejected(
                    f"shard {shard} refused a step of this request ({frame.reason.name.lower()}): see its log", reason=reason
                )
            blamed = shard if frame.reason in (Nack.DRAINING, Nack.FAILED, Nack.OVERLOADED) else None
            return FrameLost(frame.step, frozenset(frame.sessions.tolist()), blamed, error)
    return None


def replica_of(lease: ShardLease) -> Replica:
    return Replica(
        shard=lease.shard,
        layers=lease.layers,
        rows=lease.rows,
        free_rows=lease.free_rows,
        context=lease.context,
        chunk=_chunk(lease),
        instance=lease.instance,
        draining=lease.state != "ready",
        mirrors=lease.mirrors,
        packs=lease.packs,
        processor=lease.processor,
    )


def _chunk(lease: ShardLease) -> int:
    """The most tokens of a frame with which the hidden state that the shard passes on still fits in one message, whatever number of
    sessions they belong to."""
    room = lease.max_frame_bytes - frame_codec.overhead_bytes(lease.chunk, lease.chunk, frame_codec.MAX_HOPS)
    return max(1, min(lease.chunk, room // (lease.hidden_size * lease.hidden_itemsize)))


def _waited_s(frame: Frame) -> float:
    return sum(timing.queue_us for timing in frame.timings) / 1e6


def _tokens(ids: list[int], tensors: tuple[np.ndarray, ...]) -> list[Token | HiddenState]:
    tokens: list[Token | HiddenState] = [*(_with_logprobs(ids, *tensors[:3]) if len(tensors) >= 3 else map(Token, ids))]
    embedded = [index for index, id in enumerate(ids) if id == EMBEDDED]
    states = tensors[-1] if len(tensors) in (1, 4) else None
    if states is not None and (states.ndim != 2 or not np.issubdtype(states.dtype, np.floating)):
        raise FrameRejected(f"frame rejected: hidden states of {states.dtype} {states.shape}", reason="tensor")
    if (0 if states is None else len(states)) != len(embedded):
        raise FrameRejected(f"frame rejected: {len(embedded)} rows have a hidden state, and another number came", reason="tensor")
    if states is not None:
        for index, values in zip(embedded, states, strict=True):
            tokens[index] = HiddenState(values)
    return tokens


def _with_logprobs(ids: list[int], chosen: np.ndarray, top: np.ndarray, logprobs: np.ndarray) -> list[Token]:
    tokens = []
    for index, id in enumerate(ids):
        if np.isnan(chosen[index]):
            tokens.append(Token(id))
            continue
        pairs = zip(top[index].tolist(), logprobs[index].tolist(), strict=True)
        tokens.append(Token(id, float(chosen[index]), tuple((i, p) for i, p in pairs if np.isfinite(p))))
    return tokens
