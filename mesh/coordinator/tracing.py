"""The traces of a coordinator: requests are recorded (trace.py), questions about them answered, and spans sent on and taken in.

a request is accepted, a row opened, a text made     noted in the request's record
a question for a trace     answered to its owner by the session; to operators by the public id or the trace's id
spans of other processes   kept (span_store.py), and shown with the requests of their traces
a server's report          noted in the records of the step's sessions
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from mesh.bus import Bus, Received, Subscription
from mesh.coordinator.clocks import Clocks
from mesh.coordinator.core.events import Ended
from mesh.coordinator.core.machine import Core
from mesh.coordinator.measure import StepMeter
from mesh.coordinator.replies import Job
from mesh.coordinator.span_store import SpanStore
from mesh.coordinator.trace import OpenTry, Trace, Traces
from mesh.coordinator.trace_spans import spans_of
from mesh.errors import MeshError, short
from mesh.protocol import generation, subjects, topics
from mesh.protocol.spans import Span, Value
from mesh.protocol.status import TraceList
from mesh.telemetry.context import TraceSampling, chosen, new_span_id
from mesh.telemetry.export import SpanExport

__all__ = ["Tracing"]

_MOST_SPANS = 1200
"""In one answer."""
_MOST_TEXT = 1024


class Tracing:
    """`name` is the coordinator's, `instance` its process. `export`: where spans of the requests that are kept for others go; None:
    nowhere. `job_of`: the request of a session, if it is still held. `meter`: measures the steps."""

    def __init__(
        self,
        bus: Bus,
        sampling: TraceSampling,
        export: SpanExport | None,
        *,
        name: str,
        instance: str,
        model: str,
        core: Core,
        job_of: Callable[[str], Job | None],
    ) -> None:
        self.traces = Traces(sampling, None if export is None else lambda trace: export.put(lambda: self._spans(trace)))
        self.clocks = Clocks()
        self.store = SpanStore()
        self.meter = StepMeter(self.traces, self.clocks, job_of, lambda frame: core.flight(frame))
        self._bus = bus
        self._sampling = sampling
        self._export = export
        self._name = name
        self._instance = instance
        self._model = model
        self._core = core
        self._subscriptions: list[Subscription] = []

    async def start(self) -> None:
        self._subscriptions = [
            await self._bus.subscribe(topics.TRACE.at(self._model, self._name), self._on_trace),
            await self._bus.subscribe(topics.INSPECT.at(self._model, self._name), self._on_inspect),
            await self._bus.subscribe(topics.TRACES.at(self._model, self._name), self._on_list),
            await self._bus.subscribe(topics.SPANS.at(), self._on_spans),
            await self._bus.subscribe(subjects.server_traces(self._instance), self._on_report),
        ]

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.stop()

    @property
    def counters(self) -> dict[str, int]:
        """Spans sent, failed, full (see SpanExport) and not_kept: those of other processes that found no place."""
        return {**(Counter() if self._export is None else self._export.counters), "not_kept": self.store.dropped}

    # -- what happens to a request -------------------------------------------------------------------------------------

    def begin(self, job: Job) -> None:
        """A request is accepted. Where its sender has not decided whether its trace is kept, the ratio does."""
        context, request = job.context, job.request
        if not self._sampling.enabled:
            context = replace(context, sampled=False)
        elif context.sampled is None:
            context = replace(context, sampled=chosen(context.trace, self._sampling.ratio))
        unix_s = time.time() - (time.perf_counter() - job.arrived)
        trace = Trace(
            request.id,
            context,
            new_span_id(),
            job.arrived,
            unix_s,
            job.began,
            len(request.prompt),
            request.max_tokens,
            self._attributes(job),
        )
        self.traces.begin(trace)
        if self._sampling.enabled:
            job.trace = trace

    def opened(self, session: str, tried: OpenTry) -> None:
        self.traces.opened(session, tried)

    def end(self, ended: Ended, job: Job | None) -> None:
        if self._sampling.content and job is not None and job.trace is not None:
            job.trace.attributes["gen_ai.output.messages"] = short("".join(job.pieces), _MOST_TEXT)
        self.traces.end(ended, time.perf_counter())

    def _attributes(self, job: Job) -> dict[str, Value]:
        message = job.message
        attributes: dict[str, Value] = {
            "gen_ai.operation.name": message.operation,
            "gen_ai.provider.name": "mesh",
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.response.id": job.id,
            "gen_ai.request.max_tokens": message.max_tokens,
            "gen_ai.request.temperature": float(message.temperature),
            "gen_ai.request.stream": message.stream,
            "gen_ai.usage.input_tokens": len(job.request.prompt),
        }
        if message.top_p != 1:
            attributes["gen_ai.request.top_p"] = float(message.top_p)
        if message.top_k:
            attributes["gen_ai.request.top_k"] = message.top_k
        if message.seed is not None:
            attributes["gen_ai.request.seed"] = message.seed
        if self._sampling.content:
            messages = message.messages
            text = message.prompt or "" if messages is None else json.dumps([part.model_dump() for part in messages], ensure_ascii=False)
            attributes["gen_ai.input.messages"] = short(text, _MOST_TEXT)
        return attributes

    # -- questions -----------------------------------------------------------------------------------------------------

    async def _on_trace(self, received: Received) -> None:
        """Answer the owner of a session with its trace."""
        await self._answer(received, lambda name: self._document(self.traces.of(name)))

    async def _on_inspect(self, received: Received) -> None:
        """Answer an operator, who knows the public id or the trace's id alone."""
        await self._answer(received, lambda name: self._document(self.traces.find(name)) or self._only_spans(name))

    async def _answer(self, received: Received, document_of: Callable[[str], dict[str, Any] | None]) -> None:
        """Answer with a request's trace, or with none: another coordinator may have it, so that is not an error."""
        if not received.reply:
            return
        try:
            document = document_of(topics.TRACE.parse(received.data).request)
        except MeshError as error:
            await self._bus.respond_error(received, error)
            return
        reply = generation.TraceReply(trace=document)
        data = await asyncio.to_thread(reply.to_bytes)
        await self._bus.publish(received.reply, data)

    def _only_spans(self, trace: str) -> dict[str, Any] | None:
        """A trace without a generation, such as that of a shard's start."""
        spans = self.store.of(trace)
        if not spans:
            return None
        return {"request": "", "trace": trace, "legs": [], "coordinator": self._name, "model": self._model, "spans": [*map(_json, spans)]}

    def _document(self, trace: Trace | None) -> dict[str, Any] | None:
        if trace is None:
            return None
        report = self.traces.report(trace, None if trace.ended is not None else self._core.session(trace.id, time.monotonic()))
        if report is None:
            return None
        mine = self._spans(trace)
        spans = [*self.store.of(trace.context.trace), *mine][:_MOST_SPANS]
        return {
            **report.document(),
            **trace.as_dict(),
            "coordinator": self._name,
            "model": self._model,
            "spans": [*map(_json, spans)],
        }

    async def _on_list(self, received: Received) -> None:
        if not received.reply:
            return
        try:
            query = topics.TRACES.parse(received.data)
        except MeshError as error:
            await self._bus.respond_error(received, error)
            return
        await self._bus.respond(received, TraceList(requests=tuple(self.traces.latest(query.kind, query.limit))))

    # -- spans ---------------------------------------------------------------------------------------------------------

    async def _on_spans(self, received: Received) -> None:
        self.store.add(topics.SPANS.parse(received.data).spans)

    async def _on_report(self, received: Received) -> None:
        self.meter.server_report(received.data)

    def _spans(self, trace: Trace) -> Sequence[Span]:
        return spans_of(
            trace,
            coordinator=self._name,
            model=self._model,
            now=time.perf_counter(),
            clocks=self.clocks,
            context_of=self.traces.context_of,
        )


def _json(span: Span) -> dict[str, Any]:
    """The span as JSON, without what is empty."""
    document = {name: value for name, value in span.__dict__.items() if value not in ((), {}, "", None)}
    if span.links:
        document["links"] = [{"trace": link.trace, "span": link.span} for link in span.links]
    if span.events:
        document["events"] = [event.model_dump() for event in span.events]
    return document
