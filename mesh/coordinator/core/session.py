"""A session: one generation, from the request to the last token, and the states it goes through.

Theory of operation. A session waits in the queue until every layer range has a row for it (`QUEUED`), is given a row on one
replica of each range (`OPENING`), has its history run through these rows in chunks (`PREFILLING`), and then takes part in
waves of one token a step (`DECODING`). Its history is the prompt and every token it was given; nothing else is needed to start
again elsewhere. So whatever goes wrong, a row refused, a replica lost, a step that never comes back, has one answer: back to
`QUEUED`, and on with the next epoch. Stages that are well keep their row and what is in it, a lost one is replaced by its mirror
or by another replica, and the history is replayed from the first position that any of them lacks: none, where a mirror steps
in; all, where a replica is new. What a client was told is never told again, because the first token after a replay is the first
one the history lacks.

    state        start      opened      caught_up  token     lost     finish     fail     cancel
    QUEUED       OPENING    -           -          -         -        FINISHED   FAILED   CANCELLED
    OPENING      -          PREFILLING  DECODING   -         QUEUED   FINISHED   FAILED   CANCELLED
    PREFILLING   -          -           -          DECODING  QUEUED   FINISHED   FAILED   CANCELLED
    DECODING     -          -           -          DECODING  QUEUED   FINISHED   FAILED   CANCELLED
    FINISHED, FAILED, CANCELLED: nothing follows

A session that has ended keeps its rows until its frames in flight are back or given up: a row is not lent again while a
frame that writes to it may be on its way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from mesh.coordinator.core.routing import Choices, Route, complete

__all__ = ["TERMINAL", "TRANSITIONS", "Act", "GenerationRequest", "IllegalTransition", "Session", "SessionView", "State"]


class State(Enum):
    QUEUED = "queued"
    OPENING = "opening"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Act(Enum):
    START = "start"
    OPENED = "opened"
    CAUGHT_UP = "caught_up"
    TOKEN = "token"
    LOST = "lost"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"


TERMINAL: Final = frozenset({State.FINISHED, State.FAILED, State.CANCELLED})

_END: Final = {Act.FINISH: State.FINISHED, Act.FAIL: State.FAILED, Act.CANCEL: State.CANCELLED}

TRANSITIONS: Final[dict[State, dict[Act, State]]] = {
    State.QUEUED: {Act.START: State.OPENING, **_END},
    State.OPENING: {Act.OPENED: State.PREFILLING, Act.CAUGHT_UP: State.DECODING, Act.LOST: State.QUEUED, **_END},
    State.PREFILLING: {Act.TOKEN: State.DECODING, Act.LOST: State.QUEUED, **_END},
    State.DECODING: {Act.TOKEN: State.DECODING, Act.LOST: State.QUEUED, **_END},
    State.FINISHED: {},
    State.FAILED: {},
    State.CANCELLED: {},
}


class IllegalTransition(RuntimeError):
    """A defect of the coordinator, never of a request."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is to be generated. `sampling` is passed on to the last stage unread. A token of `stop_ids` ends it and is not given.
    `given`: tokens of it that are known already; the first one drawn comes after them. `resumed`: another coordinator began it."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Any
    stop_ids: frozenset[int] = frozenset()
    prefix: tuple[int, ...] = ()
    resumed: bool = False


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session at one moment, for those who may only look. route: the shard of each stage, None where it is not known yet. prefilled:
    positions of the prompt that have been computed. Seconds since the request came: in the queue, to the first token, in all."""

    id: str
    state: str
    route: tuple[str | None, ...]
    generated: int
    prefilled: int
    queue_s: float
    first_token_s: float | None
    total_s: float
    restarts: int


@dataclass(slots=True)
class Session:
    """Times are the `now` of the events that set them, seconds; 0 where that has not happened."""

    request: GenerationRequest
    number: int  # unique in this coordinator; orders sessions by arrival
    submitted_at: float
    state: State = State.QUEUED
    epoch: int = 0  # of the route; results of an earlier one are not its own
    history: list[int] = field(default_factory=list)  # prompt, then every token given
    choices: Choices | None = None  # while rows are open or asked for: the shard of each stage
    route: Route | None = None  # the same once every row is open, so that frames can go along it
    mirrors: dict[int, str] = field(default_factory=dict)  # stage index -> the shard that follows it
    rows: dict[int, int] = field(default_factory=dict)  # stage index -> row, as replicas answer
    filled: dict[str, int] = field(default_factory=dict)  # shard -> positions it said it holds, in this epoch
    done: int = 0  # positions whose prefill has come back
    sent: int = 0  # positions whose prefill has been sent
    in_flight: int = 0  # frames that name it
    turn: float = 0.0  # prefill order: see scheduler
    trouble_since: float | None = None  # the first loss since the last token
    losses: int = 0  # since the last token
    replay: str = ""  # how the last loss is mended, until the next token: see Pause
    token_at: float = 0.0  # of the last token
    started_at: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    restarts: int = 0

    def __post_init__(self) -> None:
        if not self.history:
            self.history = [*self.request.prompt, *self.request.prefix]

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def key(self) -> int:
        """What replicas know it by, the same for its whole life; the epoch tells late frames and late answers apart."""
        return self.number

    @property
    def shards(self) -> tuple[str, ...]:
        """Those it has a row on, or is being given one, mirrors included."""
        return (*(choice.shard for choice in self.choices or () if choice.shard is not None), *self.mirrors.values())

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.history) - len(self.request.prompt)

    @property
    def positions(self) -> int:
        """The most positions it can come to take in a row."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def ended(self) -> bool:
        return self.state in TERMINAL

    def view(self, now: float) -> SessionView:
        since, first = self.submitted_at, self.first_token_at
        return SessionView(
            self.id,
            self.state.value,
            tuple(choice.shard for choice in self.choices or ()),
            self.generated,
            self.done if self.state is State.PREFILLING else len(self.request.prompt),
            (self.started_at or now) - since,
            first - since if first else None,
            now - since,
            self.restarts,
        )

    def act(self, act: Act) -> None:
        """Go to the next state; the only place where `state` changes."""
        following = TRANSITIONS[self.state].get(act)
        if following is None:
            raise IllegalTransition(f"session {self.id} is {self.state.value} and cannot {act.value}")
        self.state = following

    def check(self) -> None:
        """Raise AssertionError if what is held does not fit the state."""
        prompt = self.request.prompt
        assert tuple(self.history[: len(prompt)]) == prompt, "the history no longer begins with the prompt"
        assert self.generated <= self.request.max_tokens
        assert 0 <= self.done <= self.sent <= len(self.history)
        assert self.in_flight >= 0
        if self.state is State.QUEUED:
            assert (
                self.choices is None and self.route is None and not self.rows and not self.mirrors and not self.in_flight and not self.sent
            )
        if self.state is State.OPENING:
            assert self.choices is not None and self.route is None and not self.in_flight and not self.sent
        if self.state in (State.PREFILLING, State.DECODING):
            assert self.choices is not None and self.route is not None and self.route == complete(self.choices)
            assert sorted(self.rows) == list(range(len(self.route)))
        if self.state is State.DECODING:
            assert self.in_flight <= 1 and self.generated >= 1
