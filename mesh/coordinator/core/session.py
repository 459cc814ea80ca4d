"""A session: one generation, from the request to the last token, and the states it goes through.

Theory of operation. A session waits in the queue until every layer range has a row for it (`QUEUED`). It then asks one shard of each
range for a row (`OPENING`). When all rows are open, its history runs through them in chunks (`PREFILLING`). After that it takes part in
decode batches, which bring it one token a step (`DECODING`).

The history is the prompt and every token generated so far. Nothing else is needed to start again elsewhere. So whatever goes wrong (a
refused row, a lost shard, a step that never comes back), the answer is the same: the session goes back to `QUEUED`, and on with the
next epoch. The shards that are well keep its rows and what is in them. A lost shard is replaced by its mirror or by another replica.
The history is computed again from the first position that any shard lacks: nothing, where a mirror steps in; everything, where a
replica is new. A token that was delivered is never delivered again, because the first token after that is the first one that the
history lacks.

    state        start      opened      caught_up  token     lost     finish     fail     cancel
    QUEUED       OPENING    -           -          -         -        FINISHED   FAILED   CANCELLED
    OPENING      -          PREFILLING  DECODING   -         QUEUED   FINISHED   FAILED   CANCELLED
    PREFILLING   -          -           -          DECODING  QUEUED   FINISHED   FAILED   CANCELLED
    DECODING     -          -           -          DECODING  QUEUED   FINISHED   FAILED   CANCELLED
    FINISHED, FAILED, CANCELLED: nothing follows

A session that has ended keeps its rows until no frame that names it is out. Until then such a frame may still write to a row, so the
row must not go to another session.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from mesh.coordinator.core.prefixes import Beginning, Chain
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
    """The coordinator has a defect. A request cannot cause this."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What is to be generated. `sampling` is passed on to the last stage unread. A token of `stop_ids` ends the generation and is not
    part of it. `prefix`: generated tokens that are known already; the next one comes after them. `resumed`: another coordinator began
    the generation. `waited_s`: how long it has waited already for layers that no shard serves. `caller`: who is to be treated as one among
    several callers; empty: nobody knows. `salt`: whose rows it may begin with, and who may begin with its own; None: it does neither.
    `embed`: what is wanted is no token but the hidden state after the prompt; it ends with that."""

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Any
    stop_ids: frozenset[int] = frozenset()
    prefix: tuple[int, ...] = ()
    resumed: bool = False
    waited_s: float = 0.0
    caller: str = ""
    salt: str | None = None
    embed: bool = False


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session at one moment, as other parts may see it. route: the shard of each stage, None where it is not known yet. prefilled:
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
    """Times are seconds, the `now` of the events that set them; 0 where that has not happened."""

    request: GenerationRequest
    number: int  # unique in this coordinator; orders sessions by arrival
    submitted_at: float
    state: State = State.QUEUED
    epoch: int = 0  # counts its starts; answers that name an earlier one are ignored
    history: list[int] = field(default_factory=list)  # the prompt, then every generated token
    choices: Choices | None = None  # while rows are open or asked for: the shard of each stage
    route: Route | None = None  # the same once every row is open, so that frames can go along it
    mirrors: dict[int, str] = field(default_factory=dict)  # stage index -> the shard that follows it
    rows: dict[int, int] = field(default_factory=dict)  # stage index -> row, as shards answer
    filled: dict[str, int] = field(default_factory=dict)  # shard -> positions that its row held when it was opened in this epoch
    begins: dict[str, tuple[int, ...] | None] = field(default_factory=dict)  # shard -> where its steps may begin; None: anywhere
    chain: Chain | None = None  # of its history, where rows are reused
    asked: dict[str, Beginning] = field(default_factory=dict)  # shard -> what its row is to begin with in this epoch
    cached: int | None = None  # positions of the prompt that were there when it began; None until then
    done: int = 0  # positions that have been computed
    sent: int = 0  # positions that have been sent to be computed
    in_flight: int = 0  # frames that are out and name it
    turn: float = 0.0  # its place among prefills: see scheduler.py
    trouble_since: float | None = None  # the first loss since the last token
    losses: int = 0  # since the last token
    replay: str = ""  # how the last loss was mended, until the next token: see Pause
    told_at: float = float("-inf")  # when its client was told last that layers are missing
    token_at: float = 0.0  # of the last token
    started_at: float = 0.0
    first_token_at: float = 0.0
    ended_at: float = 0.0
    restarts: int = 0

    def __post_init__(self) -> None:
        if not self.history:
            self.history = [*self.request.prompt, *self.request.prefix]
        if self.request.salt is not None:
            self.chain = Chain(self.request.salt, self.request.prompt)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def caller(self) -> str:
        return self.request.caller

    @property
    def key(self) -> int:
        """The name by which shards know it, for its whole life. The epoch tells late frames and late answers apart."""
        return self.number

    @property
    def shards(self) -> tuple[str, ...]:
        """Those on which it has a row, or has asked for one; mirrors too."""
        return (*(choice.shard for choice in self.choices or () if choice.shard is not None), *self.mirrors.values())

    @property
    def generated(self) -> int:
        """Tokens generated so far."""
        return len(self.history) - len(self.request.prompt)

    @property
    def positions(self) -> int:
        """The most positions that it can take in a row."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def reusable(self) -> int:
        """The most positions that it can begin with: the last token of the prompt is computed in any case."""
        return len(self.request.prompt) - 1

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
            raise IllegalTransition(f"a session that is {self.state.value} cannot {act.value}")
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
