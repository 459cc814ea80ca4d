"""A request's spans, through real shards: they explain the time, they join the sender's trace, and nats-server's own hop is among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from running import Run
from serving import LONG, coordinator, shards
from waiting import until

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.generation import Generate
from mesh.protocol.spans import Span, SpanBatch
from mesh.types import even_ranges

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"
REPORTS = "nats-server reports a frame after it has passed it on"
SENT = "the spans travel by themselves"


def inside(spans: list[dict[str, Any]]) -> None:
    """Every child lies in its parent."""
    by_id = {span["span"]: span for span in spans}
    for span in spans:
        parent = by_id.get(span.get("parent"))
        assert parent is None or parent["start_ns"] <= span["start_ns"] <= span["end_ns"] <= parent["end_ns"], (
            span["name"],
            parent["name"],
        )


def test_the_spans_of_a_step_explain_its_time(server: NatsServer, model: Path, run: Run) -> None:
    async def ask() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 3)) as running,
            coordinator(server.url, model),
            AsyncMeshClient(server.url) as client,
        ):
            answer = await client.generate(**LONG)
            trace = await client.trace(answer.session)
            assert trace is not None
            spans = trace["spans"]
            inside(spans)
            steps = [span for span in spans if span["name"] == "decode step"]
            told = {span["span"]: [child for child in spans if child.get("parent") == span["span"]] for span in steps}
            detailed = [span for span in steps if told[span["span"]]]
            assert len(detailed) >= 16
            for span in detailed:
                parts = told[span["span"]]
                assert [part["name"] for part in parts] == ["frame", "stage", "frame", "stage", "frame", "stage", "frame"]
                wall = span["end_ns"] - span["start_ns"]
                assert sum(part["end_ns"] - part["start_ns"] for part in parts) >= 0.95 * wall
                stages = {part["span"] for part in parts if part["name"] == "stage"}
                leaves = [leaf for leaf in spans if leaf.get("parent") in stages] + [part for part in parts if part["name"] == "frame"]
                assert sum(leaf["end_ns"] - leaf["start_ns"] for leaf in leaves) >= 0.95 * wall
            assert {span["instance"] for span in spans if span["service"] == "shard"} == {shard.options.name for shard in running}
            listed = [await client.inspect(answer.request), await client.inspect(trace["trace"])]
            assert [one and one["request"] for one in listed] == [answer.request] * 2, "operators find it by either id"

    run(ask())


def test_a_request_joins_its_senders_trace_and_the_server_reports_its_frames(server: NatsServer, model: Path, run: Run) -> None:
    async def ask() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2)),
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url) as client,
            await Bus.connect(BusOptions((server.url,)), name="test") as bus,
        ):
            message = Generate.model_validate({**LONG, "session": "a" * 32}, strict=False)
            subject = topics.GENERATE.at(serving.manifest.name).subject
            await bus.ask(subject, message.to_bytes(), timeout_s=30, headers={"traceparent": SAMPLED})

            record = serving.tracing.traces.of("a" * 32)
            assert record is not None
            await until(lambda: len(record.server_hops) >= 6, because=REPORTS)
            above = Span(trace=TRACE, span=PARENT, name="POST /v1/x", service="gateway", start_ns=1, end_ns=2**62)
            await bus.send(topics.SPANS.at(), SpanBatch(spans=(above,)))
            await until(lambda: serving.tracing.store.of(TRACE), because=SENT)
            trace = await client.trace("a" * 32)
            assert trace is not None
            assert trace["spans"][0]["name"] == "POST /v1/x" and trace["spans"][0]["span"] == PARENT
            found = trace["spans"][1:]
            assert found[0]["trace"] == TRACE and found[0]["parent"] == PARENT
            assert found[0]["attributes"]["mesh.kept_because"] == "parent"
            inside(found)
            servers = [span for span in found if span["service"] == "nats-server"]
            frames = {span["span"]: span for span in found if span["name"] == "frame"}
            assert len(servers) >= 6 and {frames[span["parent"]]["attributes"]["mesh.to"] for span in servers} > {serving.name}

    run(ask())
