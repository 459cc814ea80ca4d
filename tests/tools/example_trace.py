"""A trace by hand: a prompt of two chunks through three shards, six decode steps, and a failover after the third of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from mesh.protocol.spans import Link, Span, SpanKind

TRACE = "0af7651916cd43dd8448eb211c80319c"
BEGAN_NS = 1_700_000_000 * 10**9
MS = 10**6
US = 10**3
BEFORE = (("shard-1", "0-10"), ("shard-2", "10-20"), ("shard-3", "20-30"))
AFTER = (("shard-1", "0-10"), ("shard-2b", "10-20"), ("shard-3", "20-30"))
COMPUTE_US = {"prefill": (20_000, 40_000, 15_000), "decode": (4_000, 8_000, 3_000)}
WAIT_US = (500, 1_000, 0)
READ_US, WRITE_US, WAY_US, TURN_US, TEXT_US = 200, 300, 1_000, 1_500, 500
OTHER = Link(trace="f" * 32, span="e" * 16)
"""Another session of a decode batch."""


@dataclass
class Builder:
    """Spans, from the first one on. Times are microseconds from the request. skew_ns: instance -> how far its clock is ahead."""

    skew_ns: Mapping[str, int] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    legs: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self,
        name: str,
        start_us: int,
        end_us: int,
        parent: str | None,
        process: tuple[str, str] = ("coordinator", "c1"),
        kind: SpanKind = "internal",
        **attributes: Any,
    ) -> str:
        """The id of the span. Two underscores in the name of an attribute stand for a dot."""
        span = f"{len(self.spans) + 1:016x}"
        skew = self.skew_ns.get(process[1], 0)
        made = Span(
            trace=TRACE,
            span=span,
            parent=parent,
            name=name,
            kind=kind,
            service=process[0],
            instance=process[1],
            start_ns=BEGAN_NS + start_us * US + skew,
            end_ns=BEGAN_NS + end_us * US + skew,
            attributes={key.replace("__", "."): value for key, value in attributes.items()},
            links=(OTHER,) if name == "decode step" else (),
        )
        self.spans.append(made)
        return span

    def step(self, kind: str, start_us: int, root: str, route: Sequence[tuple[str, str]], **attributes: Any) -> int:
        """One step through `route`; when it was over."""
        compute = COMPUTE_US[kind]
        end = start_us + (len(route) + 1) * WAY_US + sum(compute) + sum(WAIT_US) + len(route) * (READ_US + WRITE_US)
        parent = self.add("decode step" if kind == "decode" else "prefill chunk", start_us, end, root, **attributes)
        at, sender = start_us, "c1"
        for (shard, layers), computing, waiting in zip(route, compute, WAIT_US, strict=True):
            way: dict[str, Any] = {
                "mesh__from": sender,
                "mesh__to": shard,
                "mesh__bytes": 4096,
                "messaging__destination__template": "mesh.v1.frames.SHARD",
            }
            process = ("coordinator", "c1") if sender == "c1" else ("shard", sender)
            frame = self.add("frame", at, at + WAY_US, parent, process, "producer", mesh__phase="network", **way)
            if sender == "c1":
                self.add("nats-server", at + 300, at + 400, frame, ("nats-server", "n1"), mesh__phase="server")
            at, sender = at + WAY_US, shard
            process = ("shard", shard)
            inside = READ_US + waiting + computing + WRITE_US
            stage = self.add("stage", at, at + inside, parent, process, "consumer", mesh__shard=shard, mesh__range=layers)
            for name, phase, length in (
                ("read frame", "codec", READ_US),
                ("wait", "queue", waiting),
                ("compute", "compute", computing),
                ("write frame", "codec", WRITE_US),
            ):
                if length:
                    self.add(name, at, at + length, stage, process, mesh__phase=phase)
                at += length
        self.add("frame", at, end, parent, ("shard", sender), "producer", mesh__phase="network", mesh__from=sender, mesh__to="c1")
        self._sum(kind, start_us, end, route)
        return end

    def turn(self, start_us: int, root: str) -> int:
        """The coordinator between two steps; when it was over."""
        self.add("turn", start_us, start_us + TURN_US, root, mesh__phase="coordinator")
        self.add("detokenize", start_us, start_us + TEXT_US, root)
        return start_us + TURN_US

    def _sum(self, kind: str, start_us: int, end_us: int, route: Sequence[tuple[str, str]]) -> None:
        stages = [{"shard": shard, "layers": layers} for shard, layers in route]
        if not self.legs or self.legs[-1]["stages"] != stages:
            empty = {"queue_s": 0.0, "compute_s": 0.0, "codec_s": 0.0}
            sums = {
                each: {"steps": 0, "wall_s": 0.0, "stages": [dict(empty) for _ in route], "hops_s": 0.0, "hops": [0.0] * (len(route) + 1)}
                for each in ("prefill", "decode")
            }
            self.legs.append({"at_s": start_us / 1e6, "stages": stages, **sums})
        total = self.legs[-1][kind]
        total["steps"] += 1
        total["wall_s"] += (end_us - start_us) / 1e6
        total["hops_s"] += (len(route) + 1) * WAY_US / 1e6
        total["hops"] = [seconds + WAY_US / 1e6 for seconds in total["hops"]]
        for stage, computing, waiting in zip(total["stages"], COMPUTE_US[kind], WAIT_US, strict=True):
            stage["queue_s"] += waiting / 1e6
            stage["compute_s"] += computing / 1e6
            stage["codec_s"] += (READ_US + WRITE_US) / 1e6


def build(*, skew_ns: Mapping[str, int] | None = None) -> Builder:
    """The example, with the spans of some processes on clocks that are ahead."""
    made = Builder(skew_ns or {})
    end = 518_000
    http = made.add("POST /v1/chat/completions", 0, end, "00f067aa0ba902b7", ("gateway", "g1"), "server", http__response__status_code=200)
    root = made.add("chat tiny", 1_000, end - 1_000, http, kind="server", mesh__restarts=1, gen_ai__request__model="tiny")
    made.add("prepare prompt", 1_000, 5_000, root, mesh__phase="coordinator")
    made.add("queue", 5_000, 25_000, root, mesh__phase="queue")
    opening = made.add("open rows", 25_000, 29_000, root, mesh__phase="open")
    for shard, layers in BEFORE:
        made.add("open row", 25_000, 29_000, opening, kind="client", mesh__shard=shard, mesh__range=layers)
    at = 29_000
    for chunk in range(2):
        at = made.step("prefill", at, root, BEFORE, mesh__tokens=256, mesh__position=256 * chunk)
    for step in range(3):
        at = made.step("decode", made.turn(at, root), root, BEFORE, mesh__step=step, mesh__rows=2)
    lost, at = at, at + 100_000
    how: dict[str, Any] = {"mesh__from": "shard-2", "mesh__to": "shard-2b", "mesh__replay": "replay"}
    failover = made.add("failover", lost, at, root, mesh__phase="failover", **how)
    opening = made.add("open rows", at - 4_000, at, failover, mesh__phase="open")
    made.add("open row", at - 4_000, at, opening, kind="client", mesh__shard="shard-2b", mesh__range="10-20")
    at = made.step("prefill", at, root, AFTER, mesh__tokens=514, mesh__position=0)
    for step in range(3, 6):
        at = made.step("decode", made.turn(at, root), root, AFTER, mesh__step=step, mesh__rows=2)
    assert at + 2_000 == end
    return made


def spans(*, skew_ns: Mapping[str, int] | None = None) -> list[Span]:
    return build(skew_ns=skew_ns).spans


def document(*, skew_ns: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The trace document of it, as a coordinator answers."""
    made = build(skew_ns=skew_ns)
    return {
        "request": "9f2c6b1d4e8a7c3f5b0d1e2a",
        "trace": TRACE,
        "coordinator": "c1",
        "model": "tiny",
        "state": "length",
        "route": [shard for shard, _ in AFTER],
        "prompt_tokens": 512,
        "max_tokens": 7,
        "tokens": 7,
        "prefilled": 0,
        "queue_s": 0.024,
        "first_token_s": 0.192,
        "total_s": 0.516,
        "restarts": 1,
        "began_unix_s": BEGAN_NS / 1e9 + 0.001,
        "error": None,
        "legs": made.legs,
        "spans": [orjson.loads(span.to_bytes()) for span in made.spans],
    }
