"""One sentence: what bounds a request, by how much, and where.

The sums of a trace document (`legs`) cover every step, so they count where they are there; spans may have been given up. Time that
steps spend at once, such as chunks of a prompt that follow each other through the stages, is scaled to the time that has passed, so that
the parts of a request add up to its length.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from mesh.protocol.spans import Span
from mesh.settings.units import format_seconds

__all__ = ["Bound", "bound"]

_WORDS: Final = {
    "compute": "compute",
    "network": "network",
    "queue": "waiting",
    "codec": "reading and writing frames",
    "open": "opening rows",
    "coordinator": "the coordinator",
    "failover": "failover",
}
"""Phase -> its words. `server` is not here: it lies within `network`."""
_SHORT: Final = _WORDS | {"codec": "frames", "coordinator": "coordinator"}
_SHOWN: Final = 0.005
"""The smallest share that is mentioned."""
_AGGREGATED: Final = {"mesh.compute_s": "compute", "mesh.network_s": "network", "mesh.wait_s": "queue", "mesh.codec_s": "codec"}
_FOR_A_ROW: Final = "for a row"


@dataclass(frozen=True, slots=True)
class Bound:
    """Seconds of one request. parts: phase -> seconds; together at most total_s. places: (phase, where) -> seconds of its part: a shard,
    or a way between two. layers: shard -> its layer range."""

    total_s: float
    parts: Mapping[str, float]
    places: Mapping[tuple[str, str], float] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def phase(self) -> str | None:
        """The phase that took the most; None where nothing has been measured."""
        return max(self.parts, key=lambda phase: self.parts[phase]) if any(self.parts.values()) else None

    def document(self) -> dict[str, Any]:
        """As JSON: the sentence, the phase that took the most, and the seconds of each."""
        return {"sentence": self.sentence(), "phase": self.phase, "parts": dict(self.parts)}

    def sentence(self) -> str:
        first = self.phase
        if first is None or self.total_s <= 0:
            return "Nothing has been measured yet."
        said = f"Bound by {_WORDS[first]}: {self._share(first)} of {format_seconds(self.total_s)}{self._where(first)}"
        others = sorted((phase for phase in self.parts if phase != first), key=lambda phase: -self.parts[phase])
        named = [f"{_SHORT[phase]} {self._share(phase)}" for phase in others if self.parts[phase] / self.total_s >= _SHOWN]
        return f"{said}; {', '.join(named)}." if named else f"{said}."

    def _share(self, phase: str) -> str:
        return _percent(self.parts[phase] / self.total_s)

    def _where(self, phase: str) -> str:
        """The place that had most of a phase, where there are several."""
        places = {where: seconds for (of, where), seconds in self.places.items() if of == phase and seconds > 0}
        if not places:
            return ""
        most = max(places, key=lambda where: places[where])
        share = _percent(places[most] / sum(places.values()))
        if most == _FOR_A_ROW:
            return f", of it {share} {_FOR_A_ROW}"
        layers = f" (layers {self.layers[most]})" if most in self.layers else ""
        return f", of it {share} {'from' if phase == 'network' else 'in'} {most}{layers}"


def bound(document: Mapping[str, Any], spans: Sequence[Span] = ()) -> Bound:
    """What bounds the request of a trace document. spans: the document's own."""
    if any(leg[kind]["steps"] for leg in document.get("legs", ()) for kind in ("prefill", "decode")):
        return _of_legs(document, _leaves(spans))
    return _of_spans(document, spans)


def _of_legs(document: Mapping[str, Any], leaves: Mapping[str, float]) -> Bound:
    total, first, queued = document["total_s"], document["first_token_s"], document["queue_s"]
    failover = min(leaves.get("failover", 0.0), total)
    opening = min(leaves.get("open", 0.0), queued)
    until_first = max((total if first is None else first) - queued, 0.0)
    decoding = max(total - queued - until_first, 0.0)
    steps: dict[str, dict[tuple[str, str], float]] = {"prefill": defaultdict(float), "decode": defaultdict(float)}
    layers: dict[str, str] = {}
    for leg in document["legs"]:
        layers |= {stage["shard"]: stage["layers"] for stage in leg["stages"]}
        for kind, sums in steps.items():
            _add(sums, leg[kind], [stage["shard"] for stage in leg["stages"]], document.get("coordinator", "coordinator"))
    if len(document["legs"]) > 1:  # a replay's prefill steps lie between decode steps
        scale = _scale([*steps["prefill"].values(), *steps["decode"].values()], total - queued - failover)
        scales = {"prefill": scale, "decode": scale}
    else:
        scales = {"prefill": _scale(steps["prefill"].values(), until_first), "decode": _scale(steps["decode"].values(), decoding)}
    places: dict[tuple[str, str], float] = defaultdict(float)
    for kind, sums in steps.items():
        for place, seconds in sums.items():
            places[place] += seconds * scales[kind]
    places["queue", _FOR_A_ROW] = queued - opening
    parts: dict[str, float] = defaultdict(float)
    for (phase, _), seconds in places.items():
        parts[phase] += seconds
    parts |= {"open": opening, "failover": failover}
    parts["coordinator"] = max(total - sum(parts.values()), 0.0)
    return Bound(total, dict(parts), dict(places), layers)


def _scale(parts: Iterable[float], room_s: float) -> float:
    """The factor that brings `parts` into `room_s` seconds; 1 where they are in it."""
    together = sum(parts)
    return 1.0 if together <= room_s else max(room_s, 0.0) / together


def _add(sums: dict[tuple[str, str], float], steps: Mapping[str, Any], shards: Sequence[str], coordinator: str) -> None:
    """Add the steps of one kind over one route: (phase, where) -> seconds."""
    for shard, stage in zip(shards, steps["stages"], strict=False):
        for phase in ("compute", "queue", "codec"):
            sums[phase, shard] += stage[f"{phase}_s"]
    ends = [coordinator, *shards, coordinator]
    for sender, receiver, seconds in zip(ends, ends[1:], steps.get("hops", ()), strict=False):
        sums["network", f"{sender} to {receiver}"] += seconds
    rest = steps["hops_s"] - sum(steps.get("hops", ()))
    if rest > 0 and steps["steps"]:
        sums["network", "no known way"] += rest


def _leaves(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by phase."""
    found: dict[str, float] = defaultdict(float)
    for span, phase in _timed(spans):
        found[phase] += span.duration_ns / 1e9
    return found


def _timed(spans: Sequence[Span]) -> list[tuple[Span, str]]:
    """The spans whose time belongs to a phase. What lies within such a span belongs to it: a server within the network, the opening of
    rows within a failover."""
    phases = {(span.trace, span.span): phase for span in spans if (phase := span.attributes.get("mesh.phase")) in _WORDS}
    return [
        (span, str(phases[span.trace, span.span]))
        for span in spans
        if (span.trace, span.span) in phases and (span.trace, span.parent) not in phases
    ]


def _of_spans(document: Mapping[str, Any], spans: Sequence[Span]) -> Bound:
    total = float(document.get("total_s", 0.0)) or _length_s(spans)
    places: dict[tuple[str, str], float] = defaultdict(float)
    parts: dict[str, float] = defaultdict(float)
    layers = {
        str(s.attributes["mesh.shard"]): str(s.attributes["mesh.range"]) for s in spans if {"mesh.shard", "mesh.range"} <= {*s.attributes}
    }
    for span, phase in _timed(spans):
        seconds = span.duration_ns / 1e9
        parts[phase] += seconds
        if phase == "network":
            places[phase, f"{span.attributes.get('mesh.from')} to {span.attributes.get('mesh.to')}"] += seconds
        elif span.service == "shard":
            places[phase, span.instance] += seconds
        elif phase == "queue":
            places[phase, _FOR_A_ROW] += seconds
    for span in spans:
        for name, of in _AGGREGATED.items():
            value = span.attributes.get(name)
            if isinstance(value, float | int):
                parts[of] += value
    scale = _scale(parts.values(), total)
    return Bound(total, {phase: seconds * scale for phase, seconds in parts.items()}, dict(places), layers)


def _length_s(spans: Sequence[Span]) -> float:
    return (max(span.end_ns for span in spans) - min(span.start_ns for span in spans)) / 1e9 if spans else 0.0


def _percent(share: float) -> str:
    return f"{round(share * 100)} %"
