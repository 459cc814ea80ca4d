"""What coordinators and operators ask of a shard, and its answers."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field

from mesh.protocol.failures import ErrorReply
from mesh.protocol.message import Epoch, Line, Message, Natural, Positive, SessionId, Token
from mesh.protocol.sampling import SamplingParams
from mesh.protocol.spans import TraceId
from mesh.types import LayerRange

__all__ = [
    "MOST_CLOSES",
    "MOST_OPENS",
    "Close",
    "Closed",
    "Drain",
    "Drained",
    "HeldPrefix",
    "Load",
    "Loaded",
    "Open",
    "OpenMany",
    "Opened",
    "OpenedMany",
    "Ping",
    "Pong",
    "Prefix",
    "PrefixDigest",
]

MOST_OPENS: Final = 64
"""Sessions in one OpenMany at most."""
MOST_CLOSES: Final = 4096
"""Sessions in one Close at most."""

PrefixDigest = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]


class Prefix(Message):
    """The first `positions` positions of a row. `digest`: of what the row holds, its tokens and whose they are
    (mesh/coordinator/core/prefixes.py). Shards compare digests, and see no tokens in them."""

    digest: PrefixDigest
    positions: Positive


class HeldPrefix(Prefix):
    """What the row of a session holds that is closed."""

    session: SessionId


class Open(Message):
    """Take a row for a session on this range. Idempotent: a session that is already open here keeps its row and the row's cache.

    After an Open with a higher epoch, frames of lower epochs are refused. An Open with a lower epoch is refused too
    (MessageRejected, field epoch). `keep`: how many positions of the row's cache stay valid where the session was open here before.
    These positions were computed from the same tokens. `instance`: the one that is meant; another process of the shard's name opens
    nothing (None: any). `request`, `trace`: the public id of the generation and the id of its trace, for the shard's log.
    `reuse`: the session begins with positions that a row here holds, if it still does; Opened says how many were there. `prompt`: what the
    session's own row holds once its prompt is computed, so that others can begin with that.
    """

    limit_bytes: ClassVar[int] = 1024 * 1024  # a grammar may be in it

    session: SessionId
    epoch: Epoch
    coordinator: Token
    model_hash: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    prompt_length: Natural  # penalties count from here on
    keep: Natural = 0
    sampling: SamplingParams = SamplingParams()  # used by the last stage
    instance: Token | None = None
    request: Token | None = None
    trace: TraceId | None = None
    reuse: Prefix | None = None
    prompt: Prefix | None = None


MOST_BEGINS: Final = 64


class Opened(Message):
    """The replica that opened the session, its row, and the positions its cache already holds: those of the session itself if it was
    here before, or those that it reuses. `begins`: the positions at which a step may begin, where layers carry states; None: any up to
    `filled`.
    `row` goes into the frames' slots as it is: it also says which instance of the shard is meant."""

    session: SessionId
    epoch: Epoch
    shard: Token
    instance: Token
    layers_start: Natural
    layers_end: Natural
    row: Annotated[int, Field(ge=0, lt=2**32)]
    filled: Natural
    begins: Annotated[tuple[Natural, ...], Field(max_length=MOST_BEGINS, fail_fast=True)] | None = None
    context: Positive
    chunk: Positive

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.layers_start, self.layers_end)


class OpenMany(Message):
    """Several sessions that are opened at once; each as if it came alone."""

    limit_bytes: ClassVar[int] = 1024 * 1024

    opens: Annotated[tuple[Open, ...], Field(min_length=1, max_length=MOST_OPENS, fail_fast=True)]


class OpenedMany(Message):
    """An answer for each session of an OpenMany, in its order."""

    limit_bytes: ClassVar[int] = 1024 * 1024

    answers: Annotated[tuple[Opened | ErrorReply, ...], Field(max_length=MOST_OPENS, fail_fast=True)]


class Close(Message):
    """Free the rows of these sessions, or with `all` the rows of every session of this coordinator. Unknown sessions are no error.
    A session that was opened with a later epoch than `epoch` stays open, because this message may be an old one.
    `kept`: what the rows of some of them hold. It stays until the row is needed, so that another session can begin with it."""

    limit_bytes: ClassVar[int] = 1024 * 1024

    coordinator: Token
    sessions: Annotated[tuple[SessionId, ...], Field(max_length=MOST_CLOSES, fail_fast=True)] = ()
    all: bool = False
    epoch: Epoch = 2**32 - 1
    kept: Annotated[tuple[HeldPrefix, ...], Field(max_length=MOST_CLOSES, fail_fast=True)] = ()


class Closed(Message):
    closed: Natural
    free_rows: Natural


class Ping(Message):
    """Ask a shard whether it lives and which steps of this coordinator it has. Its event loop answers, even during a long step.
    `instance`: the one that is asked (None: any)."""

    coordinator: Token
    instance: Token | None = None


class Pong(Message):
    """`pending`: steps of that coordinator which have arrived at the shard and have not left it yet."""

    shard: Token
    instance: Token
    pending: Annotated[tuple[Natural, ...], Field(max_length=65536, fail_fast=True)] = ()


class Drain(Message):
    """Take no new sessions, wait up to `timeout_s` seconds until the open ones are moved or finished, then stop the process if `stop`.
    Refused (BadRequest, field force) where no other shard can take this one's place, unless `force`."""

    timeout_s: Annotated[float, Field(ge=0, le=86400)] = 30.0
    stop: bool = True
    force: bool = False


class Drained(Message):
    """Draining has begun. `sessions`: how many are still open. `gap`: the layers that no shard that is ready serves from now on, as
    `A-B`; empty where others do."""

    shard: Token
    sessions: Natural
    gap: Line = ""


class Load(Message):
    """Serve another range within the layers that the shard holds. Open sessions may run on for `timeout_s` seconds; then they move.
    Refused (BadRequest, field force) where no other shard can take this one's place in its present range, unless `force`."""

    layers_start: Natural
    layers_end: Positive
    timeout_s: Annotated[float, Field(ge=0, le=86400)] = 30.0
    force: bool = False


class Loaded(Message):
    """The new range is served. `sessions`: how many open ones had to move. `took_s`: seconds since the last session left. `gap`: as of
    Drained."""

    shard: Token
    layers_start: Natural
    layers_end: Natural
    sessions: Natural
    took_s: float
    gap: Line = ""
