"""A frame in memory: one step of some rows, on its way through the stages. mesh/protocol/frame_codec.py has its bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING, Final, NamedTuple

from mesh.protocol import subjects
from mesh.protocol.headers import FRAME_HEADER, SERVER_TRACE_HEADER
from mesh.types import LayerRange

if TYPE_CHECKING:  # a client knows that there are frames, makes none, and is installed without numpy
    import numpy as np

__all__ = [
    "EMBEDDED",
    "NOT_ALLOWED",
    "NOT_WANTED",
    "NO_FLAGS",
    "STEPS",
    "WANTED",
    "Flags",
    "Frame",
    "Hop",
    "Kind",
    "Nack",
    "StageTiming",
    "traced_headers",
]


class Kind(IntEnum):
    PREFILL = 1  # consecutive tokens of one session, from `positions[0]` on
    DECODE = 2  # one token for each of several sessions
    TOKENS = 3  # the tokens sampled after `positions`
    ACK = 4  # a prefill chunk that was not the prompt's last went through every stage
    NACK = 5  # these rows were not computed; `reason` says why, `positions` where the stage would go on
    PACKED = 6  # a segment of consecutive tokens for each of several sessions: parts of prompts, and single tokens


STEPS: Final = frozenset((Kind.PREFILL, Kind.DECODE, Kind.PACKED))
"""The kinds that stages compute. The others are answers."""

WANTED: Final = 1 << 31
"""In `Frame.lengths`: a token is to be sampled after the segment."""

NOT_WANTED: Final = -1
"""In place of a token, in the answer to a PACKED frame: the row wanted none."""

NOT_ALLOWED: Final = -2
"""In place of a token: the row's grammar allows none. Its answer so far does not follow it, or the next token takes too much work."""

EMBEDDED: Final = -3
"""In place of a token: the row asked for a hidden state, which is the next row of the frame's last tensor."""


class Flags(IntFlag):
    FINAL = 1  # a prefill's last chunk: answer with a token
    BF16 = 2  # hidden states travel as bfloat16 whatever they are computed in
    ZSTD = 4  # tensors travel compressed
    TRACED = 8  # a W3C trace context is there


NO_FLAGS: Final = Flags(0)


class Nack(IntEnum):
    """Why a stage did not compute rows. A frame of any other kind has NONE."""

    NONE = 0
    UNKNOWN_SESSION = 1  # the session is not open here (any more): open it again and replay
    STALE_EPOCH = 2  # fenced: a later route exists
    HOLE = 3  # positions before this one are missing; the frame's `positions` are where to go on from
    DRAINING = 4
    OVERLOADED = 5  # more frames than the shard's queue holds: the coordinator ignored its credits
    BAD_INPUT = 6  # the stage refused the frame
    FAILED = 7  # the computation failed; the shard is going away
    TOO_LARGE = 8  # the stage's output is larger than a message may be


@dataclass(frozen=True, slots=True)
class Hop:
    """One stage of a route: the shard that serves `layers`."""

    layers: LayerRange
    shard: str


class StageTiming(NamedTuple):
    """One stage's part of a step. Microseconds: waiting for the compute thread, computing, and decoding and encoding the frame.

    arrived_us: when the frame arrived, in microseconds since 1970 by the shard's own clock; 0 where it is not known. bytes: the size of
    the frame that arrived. bucket: the rows or tokens that were computed, padding included. read_us: the part of `codec_us` in which the
    frame was decoded; the rest is what encoding the stage's frame of this kind took at the step before. sample_us: the part of
    `compute_us` in which tokens were drawn, or masks of grammars awaited; 0 where the likeliest ones sufficed.
    """

    queue_us: int = 0
    compute_us: int = 0
    codec_us: int = 0
    arrived_us: int = 0
    bytes: int = 0
    bucket: int = 0
    read_us: int = 0
    sample_us: int = 0


@dataclass(slots=True, eq=False)
class Frame:
    """A frame with n rows and m tokens. A frame is never changed. The class is not frozen, because making a frozen object takes three
    times as long, and three frames are made at every hop.

    sessions [n] uint64; epochs [n] uint32; positions [n] uint32: the position of each row's first token; stage_rows [hops, n] uint32: the
    row of each session on each stage; tokens [m] int32: m == n, except PREFILL (n == 1 <= m), PACKED (n <= m), ACK and NACK (m == 0).
    lengths [n] uint32, only in PACKED: how many of the tokens are each row's, one row after the other, plus WANTED where a token is to be
    sampled after them. In the answer to a PACKED frame, a row without WANTED has the token NOT_WANTED.
    tensors: in PREFILL, DECODE and PACKED the hidden state [m, D], except on the way to the first stage; in TOKENS with log-probabilities
    (chosen [n] float32, ids [n, k] int32, logprobs [n, k] float32; NaN for a row that did not ask), and then, where rows have EMBEDDED in
    place of a token, the hidden states of these rows [e, D] after the final norm. Otherwise there are none.
    hop: the stage that the frame goes to; in an answer, the stage that it came from. batch: the decode batch.
    """

    kind: Kind
    model_hash: str  # 16 hex digits
    coordinator: str
    route: tuple[Hop, ...]
    sessions: np.ndarray
    epochs: np.ndarray
    positions: np.ndarray
    stage_rows: np.ndarray
    tokens: np.ndarray
    batch: int = 0
    step: int = 0
    hop: int = 0
    flags: Flags = NO_FLAGS
    reason: Nack = Nack.NONE
    tensors: tuple[np.ndarray, ...] = ()
    timings: tuple[StageTiming, ...] = ()
    traceparent: str | None = None
    lengths: np.ndarray | None = None
    # the size of the message that the frame was decoded from; not sent
    stored_bytes: int = field(default=0, repr=False)
    # The bytes before the tensors, of this frame and of the frame that `forward` was called on. A frame made by `replace` has neither.
    head: bytes = field(default=b"", init=False, repr=False)
    came_as: bytes = field(default=b"", init=False, repr=False)

    @property
    def rows(self) -> int:
        return len(self.sessions)

    def subject(self, model: str) -> str:
        """The subject that the frame goes to now: that of its hop's shard, or for an answer that of the coordinator."""
        if self.kind in STEPS:
            hop = self.route[self.hop]
            return subjects.frames(model, hop.layers, hop.shard)
        return subjects.tokens(model, self.coordinator)

    def forward(self, hidden: np.ndarray, timing: StageTiming) -> Frame:
        """The same step on its way to the next stage, with hidden state [m, D]."""
        following = Frame(
            self.kind,
            self.model_hash,
            self.coordinator,
            self.route,
            self.sessions,
            self.epochs,
            self.positions,
            self.stage_rows,
            self.tokens,
            self.batch,
            self.step,
            self.hop + 1,
            self.flags,
            self.reason,
            (hidden,),
            (*self.timings, timing),
            self.traceparent,
            self.lengths,
        )
        following.came_as = self.head
        return following

    def answer(self, kind: Kind, timing: StageTiming, *, tokens: np.ndarray | None = None, tensors: tuple[np.ndarray, ...] = ()) -> Frame:
        """The last stage's answer to the coordinator: TOKENS with their positions, or ACK."""
        positions = self.positions
        if self.kind is Kind.PREFILL:
            positions = positions + positions.dtype.type(len(self.tokens) - 1)
        elif self.lengths is not None:
            positions = positions + (self.lengths & (WANTED - 1)) - 1
        sampled = self.tokens[:0] if tokens is None else tokens
        return replace(
            self,
            kind=kind,
            positions=positions,
            tokens=sampled,
            tensors=tensors,
            timings=(*self.timings, timing),
            flags=self.flags & Flags.TRACED,
            lengths=None,
            stored_bytes=0,
        )

    def counts(self) -> list[int]:
        """How many of the tokens are each row's."""
        if self.lengths is not None:
            return [length & (WANTED - 1) for length in self.lengths.tolist()]
        return [len(self.tokens)] if self.kind is Kind.PREFILL else [1] * self.rows

    def wants(self) -> list[bool]:
        """After which rows' tokens another one is to be sampled."""
        if self.lengths is not None:
            return [length >= WANTED for length in self.lengths.tolist()]
        return [self.kind is not Kind.PREFILL or Flags.FINAL in self.flags] * self.rows

    def nack(self, reason: Nack, rows: Sequence[int] | np.ndarray, positions: np.ndarray | None = None) -> Frame:
        """The NACK for these rows (indices). `positions` [len(rows)]: where the stage would go on; None: the positions of this frame."""
        import numpy as np

        chosen = np.asarray(rows, np.intp)
        return replace(
            self,
            kind=Kind.NACK,
            reason=reason,
            sessions=self.sessions[chosen],
            epochs=self.epochs[chosen],
            positions=self.positions[chosen] if positions is None else np.asarray(positions, np.uint32),
            stage_rows=self.stage_rows[:, chosen],
            tokens=np.zeros(0, np.int32),
            tensors=(),
            flags=self.flags & Flags.TRACED,
            lengths=None,
            stored_bytes=0,
        )

    def only(self, rows: np.ndarray) -> Frame:
        """A DECODE or PACKED frame with only these rows (indices, ascending). All rows: this frame itself."""
        if len(rows) == self.rows:
            return self
        tokens = rows if self.lengths is None else self._tokens_of(rows)
        return replace(
            self,
            sessions=self.sessions[rows],
            epochs=self.epochs[rows],
            positions=self.positions[rows],
            stage_rows=self.stage_rows[:, rows],
            tokens=self.tokens[tokens],
            tensors=tuple(tensor[tokens] for tensor in self.tensors),
            lengths=None if self.lengths is None else self.lengths[rows],
        )

    def _tokens_of(self, rows: np.ndarray) -> np.ndarray:
        """The indices of the tokens of these rows."""
        import numpy as np

        counts = np.array(self.counts(), np.intp)
        ends = np.cumsum(counts)
        return np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in rows.tolist()])


def traced_headers(frame: Frame) -> dict[str, str] | None:
    """The NATS headers of a frame on its next way: None, unless its step is traced. nats-server then reports to the coordinator when
    the message came and went. The way is counted from 0, the one to the first stage."""
    if frame.traceparent is None:
        return None
    way = frame.hop if frame.kind in STEPS else frame.hop + 1
    return {SERVER_TRACE_HEADER: subjects.server_traces(frame.coordinator), FRAME_HEADER: f"{frame.step}.{way}"}
