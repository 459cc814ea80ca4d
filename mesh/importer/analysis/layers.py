"""The layers of a decoder: what each keeps of the tokens before, and between which values of the data path it lies.

A layer keeps keys and values (an attention pattern), states of a fixed size, or both. A layer of the source that keeps nothing belongs to
the layer before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.attention import AttentionPattern
from mesh.importer.graph.decoder import DecoderGraph, Role

__all__ = ["CarriedState", "DecoderLayer", "find_layers"]


@dataclass(frozen=True, slots=True)
class CarriedState:
    """One state of a layer [B, ...]: the graph's input before the tokens and its value after them."""

    before: ir.Value
    after: ir.Value


@dataclass(slots=True)
class DecoderLayer:
    """What one layer keeps. `pattern`: its attention, None where it has none."""

    pattern: AttentionPattern | None = None
    states: list[CarriedState] = field(default_factory=list)


def find_layers(graph: DecoderGraph, patterns: Sequence[AttentionPattern]) -> list[DecoderLayer]:
    """The layers in order. UnsupportedModel if a graph with states has not the attention that its past says."""
    states = graph.states
    if not states:
        return [DecoderLayer(pattern) for pattern in patterns]
    names = [str(value.name) for value, role in graph.roles.items() if role is Role.PAST]
    attending = sorted({int(name.split(".")[1]) for name in names})
    if len(attending) != len(patterns):
        raise UnsupportedModel(f"{graph.path}: {len(patterns)} attentions were found in {len(attending)} layers with keys and values")
    layers = {number: DecoderLayer(pattern) for number, pattern in zip(attending, patterns, strict=True)}
    for number, before, after in states:
        layers.setdefault(number, DecoderLayer()).states.append(CarriedState(before, after))
    return [layers[number] for number in sorted(layers)]
