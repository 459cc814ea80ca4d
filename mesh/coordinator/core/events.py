"""What happens to the core (events), and what it wants done (effects). Plain values. `now` is passed beside an event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mesh.coordinator.core.prefixes import Beginning, Remembered
from mesh.coordinator.core.routing import Replica, Route
from mesh.coordinator.core.session import GenerationRequest
from mesh.errors import MeshError
from mesh.protocol.events import EventKind
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
    "PrefixKept",
    "Probe",
    "ProbeAnswered",
    "Rejected",
    "ReplicaGone",
    "ReplicaSeen",
    "Result",
    "ResultRow",
    "RowOpened",
    "RowsAnswered",
    "Submit",
    "Suspicion",
    "Tick",
    "Waits",
]

FrameKind = Literal["prefill", "decode", "packed"]

# -- events ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Submit:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class CancelSession:
    """The client cancels. `gone`: the client has stopped listening; if it listens after all, it may send the request again."""

    session: str
    gone: bool = False


@dataclass(frozen=True, slots=True)
class FinishSession:
    """A stop text was met, so no more tokens are needed. As CancelSession, but counted as finished."""

    session: str


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    replica: Replica


@dataclass(frozen=True, slots=True)
class ReplicaGone:
    """No process listens on the shard's subject, or neither its lease nor an answer came."""

    shard: str


@dataclass(frozen=True, slots=True)
class RowOpened:
    """`shard` opened row `row` for epoch `epoch` of the session `key`, as stage `stage` of its route or as that stage's mirror. `filled`:
    the positions that the row holds already. `begins`: where a step may begin, None: at any up to `filled`."""

    key: int
    epoch: int
    stage: int
    shard: str
    row: int
    filled: int = 0
    begins: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class OpenRefused:
    """`shard` (None: the queue group) opened no row for `key` at `stage`. `full`: it has no free row. `permanent`: no other try can help;
    `error` says why."""

    key: int
    epoch: int
    stage: int
    shard: str | None
    full: bool
    error: MeshError
    permanent: bool = False


@dataclass(frozen=True, slots=True)
class RowsAnswered:
    """What a shard has answered for several sessions at once. Those that are complete with it go out together."""

    answers: tuple[RowOpened | OpenRefused, ...]


@dataclass(frozen=True, slots=True)
class ResultRow:
    """The last stage's answer for one row: `token` (anything with an `id`), sampled after `position`; None where none was wanted."""

    key: int
    position: int
    token: Any


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to a frame. `rows` is empty for a prefill chunk that was not the last of its history. waited_s: how long the frame waited
    behind other work on its way."""

    frame: int
    rows: tuple[ResultRow, ...] = ()
    waited_s: float = 0.0


@dataclass(frozen=True, slots=True)
class FrameLost:
    """A frame was not computed, or those of its rows that belong to `keys`: a stage refused it, or it could not be sent. Its sessions go
    another way, or fail with `error` where no other way can help. `shard`: the shard to be avoided."""

    frame: int
    keys: frozenset[int] | None = None
    shard: str | None = None
    error: MeshError | None = None


@dataclass(frozen=True, slots=True)
class ProbeAnswered:
    """`shard` lives: it has answered the probe of `asked_at`. `pending`: the steps of this coordinator that it has in hand."""

    shard: str
    asked_at: float
    pending: frozenset[int]


@dataclass(frozen=True, slots=True)
class PrefixKept:
    """These shards keep a row that holds `held`. As an event: of a session of another coordinator; as an effect: of one of this one."""

    shards: tuple[str, ...]
    held: Remembered


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A connection to the NATS server has ended. It may have been a shard's."""


@dataclass(frozen=True, slots=True)
class Connection:
    """This coordinator's own connection was lost, or is back. Without it, silence says nothing about shards or other coordinators."""

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
    | RowOpened
    | OpenRefused
    | RowsAnswered
    | Result
    | FrameLost
    | ProbeAnswered
    | PrefixKept
    | Suspicion
    | Connection
    | Tick
)

# -- effects -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenRow:
    """Ask `shard` (None: the queue group of `layers`) for a row. What follows is a RowOpened or an OpenRefused. `keep`: a shard
    that has a row of the session already may keep so many positions of it. `mirror`: the shard is to follow the frames of the stage.
    `reuse`: what a new row is to begin with. `prompt`: what the row will hold once the prompt is computed."""

    key: int
    epoch: int
    stage: int
    layers: LayerRange
    shard: str | None
    request: GenerationRequest
    keep: int = 0
    mirror: bool = False
    reuse: Beginning | None = None
    prompt: Beginning | None = None


@dataclass(frozen=True, slots=True)
class CloseRow:
    """Close the row, unless a later epoch than `epoch` has it. `kept`: what it holds, which is kept until the row is needed."""

    key: int
    epoch: int
    shard: str
    kept: Beginning | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """Find out whether `shard` lives and which steps it has. What follows is a ProbeAnswered with the same `asked_at`, a ReplicaGone if
    no process listens there, or nothing."""

    shard: str
    asked_at: float


@dataclass(frozen=True, slots=True)
class Announcement:
    """An event of the mesh (mesh/protocol/events.py), for people and monitors. who: the shard that it is about."""

    kind: EventKind
    who: str
    detail: str


@dataclass(frozen=True, slots=True)
class FrameRow:
    """rows: the row at each stage of the route. start: the position of the first of `tokens`. wants: a token is to be sampled after the
    last one."""

    key: int
    epoch: int
    rows: tuple[int, ...]
    start: int
    tokens: tuple[int, ...]
    wants: bool = True

    @property
    def decodes(self) -> bool:
        """Whether it is a decode step of its session: one token, and another one wanted."""
        return self.wants and len(self.tokens) == 1


@dataclass(frozen=True, slots=True)
class FrameOut:
    """Send a frame along `route`. A prefill has one row. A decode has one token a row. A packed one has any number of each row."""

    frame: int
    kind: FrameKind
    route: Route
    rows: tuple[FrameRow, ...]


@dataclass(frozen=True, slots=True)
class Admitted:
    """The request is accepted: it is generated now, or when there is a row."""

    session: str


@dataclass(frozen=True, slots=True)
class Emit:
    """The token number `index` (from 0) of `session`, or the hidden state that it asked for."""

    session: str
    index: int
    token: Any


@dataclass(frozen=True, slots=True)
class Rejected:
    """The request is not accepted."""

    session: str
    error: MeshError


@dataclass(frozen=True, slots=True)
class Ended:
    """A session has ended. `error` is set where the reason is error or cancelled. Seconds since it was submitted: to its first start, to
    the first token, to the end. cached: tokens of its prompt that were not computed, because a row held them."""

    session: str
    reason: Literal["stop", "length", "cancelled", "error"]
    tokens: int
    queue_s: float
    first_token_s: float | None
    total_s: float
    restarts: int
    error: MeshError | None = None
    cached: int = 0


@dataclass(frozen=True, slots=True)
class Waits:
    """A session waits because no shard serves the layers `missing`: for `waited_s` seconds now, and it fails after `patience_s`. `place`:
    so many sessions come before it."""

    session: str
    place: int
    missing: tuple[LayerRange, ...]
    waited_s: float
    patience_s: float


Effect = OpenRow | CloseRow | FrameOut | Probe | PrefixKept | Announcement | Admitted | Emit | Rejected | Ended | Waits
