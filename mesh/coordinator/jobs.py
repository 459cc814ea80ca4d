"""The requests that this coordinator holds, from admission to the last document, and the answers of the last ones that ended.

Sessions of other coordinators come in here (`resume`), and sessions that another coordinator took leave here (`lose`): see continuity.py.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

import orjson

from mesh.bus import Bus
from mesh.coordinator.core.events import CancelSession, FinishSession, Submit
from mesh.coordinator.core.session import GenerationRequest
from mesh.coordinator.driver import CoreDriver
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.records import SessionRecord
from mesh.coordinator.replies import Job
from mesh.coordinator.requests import Requests
from mesh.errors import Busy, MeshError, PayloadTooLarge
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.protocol import generation, topics
from mesh.protocol.headers import SESSION_HEADER
from mesh.protocol.stream import Accepted, Token, TokenDocument, answer_of, dump
from mesh.settings.units import format_bytes

__all__ = ["EndedAnswer", "Jobs"]

_TOKEN_BYTES = 256
"""What a held request may take for each token: its id, its text, its time, and the documents for a client that asks again."""
_REMEMBERED = 256
"""Answers kept for clients that ask again because the first answer was lost on the way."""


@dataclass(frozen=True, slots=True)
class EndedAnswer:
    """digest: of its request. last: the last document. job: kept where that lacks parts. cuts: characters that each token made readable."""

    digest: str
    last: bytes
    job: Job | None
    cuts: array[int]

    @classmethod
    def of(cls, job: Job, last: bytes, *, whole: bool) -> EndedAnswer:
        return cls(job.digest, last, None if whole else job, array("I", [len(piece) for piece in job.pieces]))

    def documents(self, start: int, *, model: str, cancel: str) -> Iterator[bytes]:
        """The documents before the last one, made once more from that, for a client that has the text up to the token `start`."""
        document = orjson.loads(self.last)
        answer, epoch, id = answer_of(document), document["epoch"], document["id"]
        yield dump(Accepted(answer.request, cancel, model, start, epoch, id, tool_format=answer.tool_format))
        at, text = sum(self.cuts[:start]), answer.text or ""
        for index in range(start, len(answer.tokens)):
            token = Token(answer.tokens[index]) if answer.logprobs is None else answer.logprobs[index]
            piece, at = text[at : at + self.cuts[index]], at + self.cuts[index]
            yield dump(TokenDocument(index, token, piece, epoch, id, detailed=answer.logprobs is not None))


class Jobs:
    """`table`: the requests that are held, by session. `pool_bytes`: what all of them together may take; None: no limit."""

    def __init__(
        self,
        bus: Bus,
        table: dict[str, Job],
        driver: CoreDriver,
        outbox: Outbox,
        *,
        manifest: Manifest,
        tokenizer: Tokenizer | None,
        requests: Requests,
        pool_bytes: int | None,
    ) -> None:
        self.table = table
        self._bus = bus
        self._driver = driver
        self._outbox = outbox
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._requests = requests
        self._pool_bytes = pool_bytes
        self._answers: OrderedDict[str, EndedAnswer] = OrderedDict()

    def has(self, session: str) -> bool:
        return session in self.table

    def session_of(self, id: str) -> str | None:
        """The session of the public id, of a request that is held."""
        return next((session for session, job in self.table.items() if job.id == id), None)

    def answer(self, session: str) -> EndedAnswer | None:
        """What is kept of a request that ended not long ago."""
        return self._answers.get(session)

    def remember(self, job: Job, answer: bytes, *, whole: bool) -> None:
        """Keep the last document of a request that has ended. `whole`: it has all parts."""
        self._answers[job.request.id] = EndedAnswer.of(job, answer, whole=whole)
        while len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)

    def require_room(self, request: GenerationRequest) -> None:
        """Busy where this request and those that are held would take more than the pool."""
        pool = self._pool_bytes
        if pool is None:
            return
        tokens = sum(len(each.prompt) + each.max_tokens for each in (request, *(job.request for job in self.table.values())))
        if tokens * _TOKEN_BYTES > pool:
            raise Busy(
                f"the requests that are held take all of {format_bytes(pool)} (memory.max_pool_size_gb): try again in 1 s",
                retry_after_s=1.0,
            )

    async def begin(self, job: Job) -> None:
        """Have a request generated."""
        self.table[job.request.id] = job
        await self._driver.handle(Submit(job.request))
        if job.stopped:  # by the tokens that came with the request
            await self._driver.handle(FinishSession(job.request.id))

    async def drop(self, session: str) -> None:
        """End a session here without telling its client."""
        self.table.pop(session, None)
        await self._driver.handle(CancelSession(session))

    async def resume(self, record: SessionRecord, revision: int, asked: generation.Generate | None, reply: str) -> None:
        """Go on with a session that another coordinator began and that belongs to this one now. `asked`, `reply`: where its client has
        asked again, with what, and where the answer goes."""
        if record.session in self.table:
            return
        message, given, start = record.message, record.given, record.told
        if asked is not None:
            waited_s = max(message.waited_s, asked.waited_s)
            message, start = message.model_copy(update={"stream": asked.stream, "waited_s": waited_s}), len(asked.given)
            if given[:start] != asked.given:
                given = asked.given
        message = message.model_copy(update={"given": given})
        try:
            request = await self._requests.prepare(message, record.session, reply)
        except MeshError as error:
            self._outbox.error(reply, error, record.epoch, generation.public_id(record.session))
            await self._outbox.send()
            return
        if record.session in self.table:  # its client asked again meanwhile, and that request is generated already
            return
        request = replace(request, resumed=True)
        job = Job.of(message, request, reply, self._tokenizer, digest=record.digest, epoch=record.epoch)
        job.start, job.delivered, job.revision = start, start, revision
        await self.begin(job)

    async def lose(self, session: str, record: SessionRecord) -> None:
        """Drop a session that another coordinator has now. That coordinator answers the client; if the client has meanwhile asked this
        one again, its request is passed on."""
        job = self.table.get(session)
        if job is None:
            return
        await self.drop(session)
        if record.answer is not None:
            await self._bus.publish(job.reply, record.answer.encode())
        elif record.owner is not None and record.reply != job.reply:
            asked = job.message.model_copy(update={"session": session, "given": tuple(token.id for token in job.tokens[: job.delivered])})
            headers = {SESSION_HEADER: session}
            to = topics.GENERATE_AT.at(self._manifest.name, record.owner)
            try:
                await self._bus.send(to, asked, reply=job.reply, headers=headers)
            except PayloadTooLarge:  # the tokens come again, and the client knows them by their indexes
                await self._bus.send(to, asked.model_copy(update={"given": ()}), reply=job.reply, headers=headers)
