"""Which models the mesh serves, as its coordinators last said. Asking them takes a fraction of a second. So they are asked only about a
name that is not known yet, at most once a second, and all requests that wait share one question.

A model whose last coordinator was lost is remembered for REMEMBERED_S: a request for it waits and is sent again, as after any loss. Only
then is there no such model."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from mesh.client import AsyncMeshClient, CoordinatorStatus
from mesh.errors import BadRequest, ModelNotFound, Unavailable

__all__ = ["KnownModel", "KnownModels"]

_FRESH_S = 1.0
_LIST_S = 5.0
REMEMBERED_S = 600.0


@dataclass(frozen=True, slots=True)
class KnownModel:
    """context: the most positions that a session may have now. None: some layer range has no shard. max_prompt_characters: a longer prompt
    does not fit. None: not known."""

    name: str
    context: int | None
    max_prompt_characters: int | None
    first_seen_unix_s: float


class KnownModels:
    """`default`: the model of a request without a model's name; None: the only model that is served."""

    def __init__(self, client: AsyncMeshClient, default: str | None = None) -> None:
        self._client = client
        self._default = default
        self._known: dict[str, KnownModel] = {}
        self._lost: dict[str, float] = {}  # until when it is remembered
        self._asked = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def resolve(self, name: str | None) -> str:
        """The model that `name` means. ModelNotFound: no coordinator serves it, nor did so of late. Unavailable: no coordinator serves any
        model."""
        wanted = name or self._default
        if wanted is not None and (wanted in self._known or self._remembers(wanted) or (name is None and wanted == self._default)):
            return wanted
        if wanted is None and len(self._known) == 1:
            return next(iter(self._known))
        await self._refresh(_FRESH_S)
        if wanted is None:
            if len(self._known) == 1:
                return next(iter(self._known))
            if self._known:
                raise BadRequest(f"there are several models, {', '.join(sorted(self._known))}: say which with `model`", field="model")
            raise Unavailable("no coordinator answers: start one, or see `mesh status`")
        if wanted not in self._known:
            there = ", ".join(sorted(self._known)) or "none"
            raise ModelNotFound(f"no coordinator serves a model {wanted!r}: there is {there}")
        return wanted

    def _remembers(self, name: str) -> bool:
        return time.monotonic() < self._lost.get(name, float("-inf"))

    async def context(self, name: str) -> int | None:
        """The most positions a session of this model may have."""
        await self._refresh(_LIST_S)
        known = self._known.get(name)
        return None if known is None else known.context

    def max_prompt_characters(self, name: str) -> int | None:
        """A longer prompt does not fit, as the coordinators said last; None: not known."""
        known = self._known.get(name)
        return None if known is None else known.max_prompt_characters

    async def all(self) -> list[KnownModel]:
        await self._refresh(_LIST_S)
        return sorted(self._known.values(), key=lambda model: model.name)

    def take(self, coordinators: tuple[CoordinatorStatus, ...]) -> None:
        """Take what the coordinators say now."""
        now = time.time()
        known: dict[str, KnownModel] = {}
        for coordinator in coordinators:
            name, context, characters = coordinator.model, coordinator.stats.context, coordinator.stats.max_prompt_characters
            before = known.get(name)
            if before is not None and before.context is not None:
                context = max(before.context, context or 0)
            if before is not None:
                both = (before.max_prompt_characters, characters)
                characters = None if None in both else max(each for each in both if each is not None)
            first = self._known[name].first_seen_unix_s if name in self._known else now
            known[name] = KnownModel(name, context, characters, first)
        self._asked = time.monotonic()
        self._lost |= dict.fromkeys(self._known.keys() - known.keys(), self._asked + REMEMBERED_S)
        self._lost = {name: until for name, until in self._lost.items() if name not in known and self._asked < until}
        self._known = known

    async def _refresh(self, fresh_s: float) -> None:
        if time.monotonic() - self._asked < fresh_s:
            return
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask())
            self._asking.add_done_callback(self._asked_now)
        await asyncio.shield(self._asking)

    async def _ask(self) -> None:
        self.take(await self._client.coordinators())

    def _asked_now(self, task: asyncio.Task[None]) -> None:
        self._asking = None
        if not task.cancelled():
            task.exception()  # the requests that wait get the error, if there are any
