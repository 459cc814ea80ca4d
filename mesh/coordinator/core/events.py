"""What happens to the core and what it wants done. Plain values; `now` comes beside an event, in seconds of any one clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mesh.coordinator.core.routing import Replica, Route
from mesh.coordinator.core.session import GenerationRequest
from mesh.errors import MeshError
from mesh.types import LayerRange

__all__ = [
    "Admitted",
    "Announcement",
    "CancelSession",
    "CloseRow",
    "Connection",
    "Effect",
    "Emit",
    "Ended",
    "Event",
    "FinishSession",
    "FrameKind",
    "FrameLost",
    "FrameOut",
    "FrameRow",
    "OpenRefused",
    "OpenRow",
    "Opened",
    "Probe",
    "ProbeAnswered",
    "Rejected",
    "ReplicaGone",
    "ReplicaSeen",
    "Result",
    "ResultRow",
    "Submit",
    "Suspicion",
    "Tick",
]

FrameKind = Literal["prefill", "decode"]

# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class CancelSession:
    """The client wants no more, or (`gone`) does not listen any more: if it does after all, it may ask again."""

    session: str
    gone: bool = False


@dataclass(frozen=True, slots=True)
class FinishSession:
    """What was generated is enough (a stop text was met): as CancelSession, but counted as finished."""

    session: str


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    replica: Replica


@dataclass(frozen=True, slots=True)
class ReplicaGone:
    """Its lease ended, or nobody listens on its subject."""

    shard: str


@dataclass(frozen=True, slots=True)
class Opened:
    """`shard` gave row `row` to epoch `epoch` of session key `key`, as stage `stage` of its route or as that stage's mirror.
    `filled`: the positions its cache holds already."""

    key: int
    epoch: int
    stage: int
    shard: str
    row: int
    filled: int = 0


@dataclass(frozen=True, slots=True)
class OpenRefused:
    """No row for `key` at `stage`, by `shard` (None: the queue group); `full` for want of rows, `permanent` where no retry can
    help (then `error` says why)."""

    key: int
    epoch: int
    stage: int
    shard: str | None
    full: bool
    error: MeshError
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class ResultRow:
    """The last stage's answer for one row: `token` (anything with an `id`), sampled from the input at `position`."""

    key: int
    position: int
    token: Any


@dataclass(frozen=True, slots=True)
class Result:
    """A frame came back. `rows` is empty for a prefill chunk that was not the last of its history. waited_s: how long it lay behind
    other work on its way."""

    frame: int
    rows: tuple[ResultRow, ...] = ()
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FrameLost:
    """A frame, or of its rows those of `keys`, was not computed: a stage refused it, or nobody took it. Its sessions go another
    way, or fail with `error` where no other way can help. `shard`: who is to be avoided."""

    frame: int
    keys: frozenset[int] | None = None
    shard: str | None = None
    error: MeshError | None = None


@dataclass(frozen=True, slots=True)
class ProbeAnswered:
    """`shard` lives, as the question of `asked_at` found; of our steps it has `pending` in hand."""

    shard: str
    asked_at: float
    pending: frozenset[int]


@dataclass(frozen=True, slots=True)
class Suspicion:
    """Some connection to the server has ended: it may have been a shard's."""


@dataclass(frozen=True, slots=True)
class Connection:
    """This coordinator's own connection was lost, or is back. Meanwhile nothing can be known of anybody."""

    online: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


Event = (
    Submit
    | CancelSession
    | FinishSession
    | ReplicaSeen
    | ReplicaGone
    | Opened
    | OpenRefused
    | Result
    | FrameLost
    | ProbeAnswered
    | Suspicion
    | Connection
    | Tick
)

# -- effects -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRow:
    """Ask `shard` (None: the queue group of `layers`) for a row; answer with Opened or OpenRefused. `keep`: the positions that a
    shard where the session was before may keep. `mirror`: it is to follow the frames of the stage."""

    key: int
    epoch: int
    stage: int
    layers: LayerRange
    shard: str | None
    request: GenerationRequest
    keep: int = 0
    mirror: bool = False


@dataclass(frozen=True, slots=True)
class CloseRow:
    """Give the row back, unless a later epoch than `epoch` has it."""

    key: int
    epoch: int
    shard: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Find out whether `shard` lives and which steps it has: Answered with `asked_at`, ReplicaGone if nobody listens, or nothing."""

    shard: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class Announcement:
    """For people and monitors: an Event of the mesh."""

    kind: Literal["suspected", "failed_over"]
    who: str
    detail: str


@dataclass(frozen=True, slots=True)
class FrameRow:
    """rows: the row at each stage of the route. start: the position of the first of `tokens`."""

    key: int
    epoch: int
    rows: tuple[int, ...]
    start: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class FrameOut:
    """Send a frame along `route` (every shard named). A prefill has one row; `last`: a token is wanted after its last position.
    A decode has one token a row."""

    frame: int
    kind: FrameKind
    route: Route
    rows: tuple[FrameRow, ...]
    last: bool = True


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that will be generated, now or when there is a row."""

    session: str


@dataclass(frozen=True, slots=True)
class Emit:
    """The token number `index` (from 0) of `session`."""

    session: str
    index: int
    token: Any


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that was not admitted."""

    session: str
    error: MeshError


@dataclass(frozen=True, slots=True)
class Ended:
    """The last word on a session. `reason`: stop, length, cancelled or error (then `error` is set). Seconds: from submission to
    the start of prefill, to the first token, to the end."""

    session: str
    reason: Literal["stop", "length", "cancelled", "error"]
    tokens: int
    queue_s: float
    first_token_s: float | None
    total_s: float
    restarts: int
    error: MeshError | None = None


Effect = OpenRow | CloseRow | FrameOut | Probe | Announcement | Admitted | Emit | Rejected | Ended
