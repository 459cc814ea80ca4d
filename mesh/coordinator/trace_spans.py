"""The record of a request as spans (mesh/telemetry/conventions.py has their names). Pure functions.

All times are by the coordinator's clock: those of a stage follow from the ways of its step (clocks.py), so that every child lies inside
its parent whatever the shard's own clock says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from mesh.coordinator.clocks import Clocks
from mesh.coordinator.trace import Leg, Trace
from mesh.coordinator.trace_steps import FIRST, KeptStep, Run, Step
from mesh.errors import short
from mesh.protocol import topics
from mesh.protocol.message import MAX_LINE
from mesh.protocol.spans import MAX_LINKS, Link, Span, SpanKind, Value

__all__ = ["spans_of"]

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MASK: Final = 2**64 - 1
_DETAILED_PREFILLS: Final = 8
_DETAILED_LAST: Final = 12
"""Of the decode steps that are kept as they were, the first ones, the last ones and the slowest are shown with their stages."""
_MOST_NS: Final = 2**63 - 1

ContextOf = Callable[[str], tuple[str, str] | None]
"""The (trace, span) of a session that is known."""


def spans_of(trace: Trace, *, coordinator: str, model: str, now: float, clocks: Clocks, context_of: ContextOf) -> list[Span]:
    """The spans of a request, the request's own first. now: time.perf_counter; a request that runs is shown up to it."""
    return _Writer(trace, coordinator, model, now, clocks, context_of).spans()


class _Writer:
    def __init__(self, trace: Trace, coordinator: str, model: str, now: float, clocks: Clocks, context_of: ContextOf) -> None:
        self._trace = trace
        self._coordinator = coordinator
        self._model = model
        self._end = trace.ended_at if trace.ended is not None else now
        self._clocks = clocks
        self._context_of = context_of
        self._zero_s = trace.began_unix_s - trace.began
        self._root = int(trace.span, 16)
        self._count = 0
        self._spans: list[Span] = []
        self._extents: dict[str, tuple[int, int]] = {}  # of each span: its start and its end

    def spans(self) -> list[Span]:
        trace, ended = self._trace, self._trace.ended
        operation = trace.attributes.get("gen_ai.operation.name", "text_completion")
        attributes: dict[str, Value] = {**trace.attributes, "mesh.epoch": trace.legs[-1].epoch if trace.legs else 0}
        error = ""
        if ended is None:
            attributes["mesh.unfinished"] = True
        else:
            attributes["gen_ai.usage.output_tokens"] = ended.tokens
            attributes["gen_ai.response.finish_reasons"] = (ended.reason,)
            attributes["mesh.restarts"] = ended.restarts
            if ended.first_token_s is not None:
                attributes["gen_ai.response.time_to_first_chunk"] = ended.first_token_s
            if ended.error is not None:
                attributes["error.type"] = type(ended.error).__name__
                error = short(str(ended.error), MAX_LINE)
        if trace.kept is not None:
            attributes["mesh.kept_because"] = trace.kept
        self._put(
            trace.span, trace.context.span, f"{operation} {self._model}", trace.began, self._end, attributes, kind="server", error=error
        )
        self._waits()
        self._routes()
        for at, seconds in trace.texts:
            self._add(trace.span, "detokenize", at, at + seconds)
        return self._spans

    # -- before the first step -----------------------------------------------------------------------------------------

    def _waits(self) -> None:
        trace = self._trace
        self._add(trace.span, "prepare prompt", trace.began, trace.prepared, {"gen_ai.usage.input_tokens": trace.prompt_tokens})
        first = trace.opens[0].at if trace.opens else self._end
        if trace.ended is not None:  # the exact time, where opens are no longer kept
            first = min(first, trace.prepared + trace.ended.queue_s) if not trace.opens else first
        self._add(trace.span, "queue", trace.prepared, first, {"mesh.phase": "queue"})

    def _opens(self, parent: str, epoch: int) -> float | None:
        """Asking for the rows of a route. Returns when the last answer came."""
        tries = [tried for tried in self._trace.opens if tried.epoch == epoch]
        if not tries:
            return None
        begin, end = min(tried.at for tried in tries), max(tried.end for tried in tries)
        rows = self._add(parent, "open rows", begin, end, {"mesh.phase": "open", "mesh.epoch": epoch})
        for tried in tries:
            attributes: dict[str, Value] = {"mesh.range": str(tried.layers), "mesh.shard": tried.shard or "any"}
            self._add(rows, "open row", tried.at, tried.end, attributes, kind="client", error=tried.error)
        return end

    # -- routes and steps ----------------------------------------------------------------------------------------------

    def _routes(self) -> None:
        trace = self._trace
        known = [leg.epoch for leg in trace.legs]
        entries = sorted([*trace.steps.prefills, *trace.steps.kept()], key=lambda entry: entry.step.at)
        prefills = {id(entry) for entry in trace.steps.prefills}
        before: Leg | None = None
        for number, leg in enumerate(trace.legs, trace.moves):
            mine = [entry for entry in entries if entry.leg == number]
            parent = trace.span if before is None else self._failover(before, leg, mine, prefills)
            self._opens(parent, leg.epoch)
            self._leg(leg, mine, [run for run in trace.steps.runs if run.leg == number], prefills)
            before = leg
        for epoch in sorted({tried.epoch for tried in trace.opens} - set(known)):  # routes along which no step came back
            self._opens(trace.span, epoch)

    def _failover(self, before: Leg, leg: Leg, entries: Sequence[KeptStep], prefills: set[int]) -> str:
        """The time between two routes. What is opened for the second one lies in it."""
        trace = self._trace
        old, new = [hop.shard for hop in before.route], [hop.shard for hop in leg.route]
        lost = [shard for shard in old if shard not in new]
        gained = [shard for shard in new if shard not in old]
        replayed = any(id(entry) in prefills for entry in entries)
        how = "replay" if replayed else "mirror" if gained else "resend"
        steps = [*trace.steps.prefills, *trace.steps.kept()]
        ends = [entry.step.end for entry in steps if entry.step.at < leg.at and entry.step.end <= leg.at]
        ends += [run.end for run in trace.steps.runs if run.end <= leg.at]
        opens = [tried.at for tried in trace.opens if tried.epoch == leg.epoch]
        began = min([max(ends, default=before.at), *opens])
        attributes: dict[str, Value] = {"mesh.phase": "failover", "mesh.epoch": leg.epoch, "mesh.replay": how}
        if lost:
            attributes["mesh.from"] = ",".join(lost)[:256]
        if gained:
            attributes["mesh.to"] = ",".join(gained)[:256]
        return self._add(trace.span, "failover", began, leg.at, attributes)

    def _leg(self, leg: Leg, entries: Sequence[KeptStep], runs: Sequence[Run], prefills: set[int]) -> None:
        shown = 0
        previous: KeptStep | None = None
        decoded = self._trace.steps.decoded
        for entry in entries:
            prefill = id(entry) in prefills
            following = previous is not None and (entry.place == previous.place + 1 or (not prefill and entry.place == 0))
            if following and previous is not None and entry.step.at > previous.step.end:
                self._add(self._trace.span, "turn", previous.step.end, entry.step.at, {"mesh.phase": "coordinator"})
            shown += prefill
            detailed = shown <= _DETAILED_PREFILLS if prefill else entry.place < FIRST or entry.place >= decoded - _DETAILED_LAST
            self._step(self._trace.span, leg, entry, prefill=prefill, detailed=detailed)
            previous = entry
        for run in runs:
            span = self._run(leg, run)
            for entry in self._trace.steps.slowest:
                if entry.leg == run.leg and run.first <= entry.place < run.first + run.sum.steps:
                    self._step(span, leg, entry, prefill=False, detailed=True)

    def _run(self, leg: Leg, run: Run) -> str:
        sums = _sums([sum(stage[index] for stage in run.sum.stages) for index in range(3)], run.sum.ways_us)
        attributes: dict[str, Value] = {
            "mesh.epoch": leg.epoch,
            "mesh.steps": run.sum.steps,
            "mesh.step": run.first,
            "mesh.tokens": run.tokens,
            **sums,
        }
        return self._add(self._trace.span, "decode steps", run.at, run.end, attributes)

    def _step(self, parent: str, leg: Leg, entry: KeptStep, *, prefill: bool, detailed: bool) -> None:
        step = entry.step
        own = [sum(timing[index] for timing in step.timings) for index in range(3)]
        attributes: dict[str, Value] = {"mesh.epoch": leg.epoch, "mesh.step": entry.place, **_sums(own, step.ways_us)}
        links: tuple[Link, ...] = ()
        if prefill:
            attributes |= {"mesh.tokens": step.tokens, "mesh.position": step.start}
            if entry.leg:
                attributes["mesh.replay"] = "replay"
        else:
            attributes["mesh.rows"] = step.tokens
            contexts = [self._context_of(session) for session in step.sessions[: MAX_LINKS + 1] if session != self._trace.id]
            links = tuple([Link.model_construct(trace=one[0], span=one[1]) for one in contexts if one is not None][:MAX_LINKS])
        span = self._add(parent, "prefill chunk" if prefill else "decode step", step.at, step.end, attributes, links=links)
        if detailed and len(step.ways_us) == len(step.timings) + 1 and len(leg.route) == len(step.timings):
            self._stages(span, leg, step)

    def _stages(self, parent: str, leg: Leg, step: Step) -> None:
        at, sender = step.at, self._coordinator
        for way, (hop, timing) in enumerate(zip(leg.route, step.timings, strict=True)):
            at = self._frame(parent, step, way, sender, hop.shard, at, topics.FRAMES.template, timing.bytes)
            clock = self._clocks[hop.shard]
            where: dict[str, Value] = {"mesh.shard": hop.shard, "mesh.range": str(hop.layers), "mesh.bucket": timing.bucket}
            if clock is not None and timing.arrived_us:
                where |= {"mesh.clock_offset_s": clock.offset_us / 1e6, "mesh.clock_error_s": clock.error_us / 1e6}
            end = at + (timing.queue_us + timing.compute_us + timing.codec_us) / 1e6
            stage = self._add(parent, "stage", at, end, where, service="shard", instance=hop.shard, kind="consumer")
            write_us = max(timing.codec_us - timing.read_us, 0)
            for name, phase, us in (
                ("read frame", "codec", timing.read_us),
                ("wait", "queue", timing.queue_us),
                ("compute", "compute", max(timing.compute_us - timing.sample_us, 0)),
                ("sampling", "compute", min(timing.sample_us, timing.compute_us)),
                ("write frame", "codec", write_us),
            ):
                if name == "sampling" and not us:
                    continue
                part: dict[str, Value] = {"mesh.phase": phase, "mesh.shard": hop.shard}
                if name == "write frame":
                    part["mesh.estimated"] = True
                self._add(stage, name, at, at + us / 1e6, part, service="shard", instance=hop.shard)
                at += us / 1e6
            at, sender = end, hop.shard
        self._frame(parent, step, len(leg.route), sender, self._coordinator, at, topics.TOKENS.template, 0)

    def _frame(self, parent: str, step: Step, way: int, sender: str, receiver: str, at: float, template: str, size: int) -> float:
        """A frame on its way. Returns when it arrives."""
        end = at + step.ways_us[way] / 1e6
        attributes: dict[str, Value] = {
            "mesh.phase": "network",
            "mesh.from": sender,
            "mesh.to": receiver,
            "messaging.system": "nats",
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
            "messaging.destination.template": template,
        }
        if size:
            attributes |= {"mesh.bytes": size, "messaging.message.body.size": size}
        service = "coordinator" if way == 0 else "shard"
        span = self._add(parent, "frame", at, end, attributes, service=service, instance=sender, kind="producer")
        hop = self._trace.server_hops.get((step.number, way))
        if hop is not None:
            self._server(span, at, end, hop.server, hop.in_ns, hop.out_ns)
        return end

    def _server(self, parent: str, begin: float, end: float, server: str, in_ns: int, out_ns: int) -> None:
        """The frame inside nats-server, whose clock may differ: then its time is put in the middle of the way."""
        spent = min(max(out_ns - in_ns, 0) / 1e9, end - begin)
        at = in_ns / 1e9 - self._zero_s
        attributes: dict[str, Value] = {"mesh.phase": "server"}
        if not begin <= at <= end - spent:
            placed = begin + (end - begin - spent) / 2
            attributes["mesh.clock_offset_s"] = at - placed
            at = placed
        self._add(parent, "nats-server", at, at + spent, attributes, service="nats-server", instance=server)

    # -- spans ---------------------------------------------------------------------------------------------------------

    def _add(self, parent: str, name: str, start: float, end: float, attributes: dict[str, Value] | None = None, **fields: Any) -> str:
        self._count += 1
        span = f"{(self._root + self._count * _GOLDEN) & _MASK or 1:016x}"
        self._put(span, parent, name, start, end, attributes or {}, **fields)
        return span

    def _put(
        self,
        span: str,
        parent: str | None,
        name: str,
        start: float,
        end: float,
        attributes: dict[str, Value],
        *,
        kind: SpanKind = "internal",
        service: str = "coordinator",
        instance: str = "",
        links: tuple[Link, ...] = (),
        error: str = "",
    ) -> None:
        start_ns, end_ns = self._ns(start), self._ns(end)
        within = self._extents.get(parent or "")
        if within is not None:  # sums of microseconds differ in their last bits
            start_ns, end_ns = (min(max(ns, within[0]), within[1]) for ns in (start_ns, end_ns))
        end_ns = max(end_ns, start_ns)
        self._extents[span] = start_ns, end_ns
        made = Span.model_construct(  # the values are this program's own
            trace=self._trace.context.trace,
            span=span,
            parent=parent,
            name=name,
            kind=kind,
            service=service,
            instance=instance or self._coordinator,
            start_ns=start_ns,
            end_ns=end_ns,
            attributes=attributes,
            links=links,
            events=(),
            error=error,
        )
        self._spans.append(made)

    def _ns(self, at: float) -> int:
        return min(max(int((self._zero_s + at) * 1e9), 0), _MOST_NS)


def _sums(stages_us: Sequence[int], ways_us: Sequence[float]) -> dict[str, Value]:
    """What a step or several took. stages_us: waiting, computing, and reading and writing frames, of all stages."""
    wait_us, compute_us, codec_us = stages_us
    return {
        "mesh.compute_s": compute_us / 1e6,
        "mesh.wait_s": wait_us / 1e6,
        "mesh.codec_s": codec_us / 1e6,
        "mesh.network_s": sum(ways_us) / 1e6,
    }
