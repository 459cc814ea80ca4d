"""Cuts of decoders whose layers share more than one value: keys and values of earlier layers, embeddings for each layer, several streams.

Where no single value crosses from one layer to the next, all that do are put side by side: the hidden state of such a model is as wide as
they are together, filled with zeros where fewer cross. A layer that reads the keys and values of an earlier one gets those of the new
tokens so, and writes them into a cache of its own, so that any two layers may be on different shards.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.cut import Crossing, Cut, DataPath, find_marks
from mesh.importer.analysis.layers import DecoderLayer
from mesh.importer.graph.decoder import Role
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import GraphProbe

__all__ = ["find_wide_cuts"]


def find_wide_cuts(path: DataPath, layers: Sequence[DecoderLayer], probes: Sequence[GraphProbe]) -> Cut:
    """What crosses from the embedding to the first layer, from each layer to the next, and from the last to the logits: at each place the
    narrowest cut, of several the last. `probes` differ in batch and tokens. UnsupportedModel where something crosses that has no numbers
    for each token."""
    order = path.between([path.graph.logits], [])
    crossing = _crossing(path, order)
    known: dict[ir.Value, Crossing | None] = {}
    places = [path.place(value) for value in order]
    marks = find_marks(path, order, layers)
    spans = [(bisect_left(places, first), bisect_right(places, last)) for first, last in marks]
    cuts = []
    for number, ((_, start), (stop, _)) in enumerate(pairwise([(0, 0), *spans, (len(order) - 1, 0)])):
        best: tuple[Crossing, ...] | None = None
        for values in crossing[start:stop]:
            found = _handed_on(values, probes, known)
            if found and (best is None or sum(each.width for each in found) <= sum(each.width for each in best)):
                best = found
        if best is None:
            where = "the first layer takes" if number == 0 else f"layer {number - 1} hands on"
            raise UnsupportedModel(f"{where} more than numbers for each token: such a graph cannot be cut there")
        cuts.append(best)
    return Cut(tuple(cuts), max(sum(each.width for each in cut) for cut in cuts))


def _crossing(path: DataPath, order: Sequence[ir.Value]) -> list[list[ir.Value]]:
    """For each place of `order`, what is computed of the tokens up to there and used later, in order."""
    last_use = {used: place for place, value in enumerate(order) for used in path.inputs(value)}
    source = path.graph.input(Role.TOKENS)
    of_tokens: set[ir.Value] = set()
    crossing: list[list[ir.Value]] = []
    alive: list[ir.Value] = []
    for place, value in enumerate(order):
        if value is source or any(each in of_tokens for each in path.inputs(value)):
            of_tokens.add(value)
            alive = [*alive, value]
        alive = [each for each in alive if last_use.get(each, -1) > place]
        crossing.append(alive)
    return crossing


def _handed_on(
    values: Sequence[ir.Value], probes: Sequence[GraphProbe], known: dict[ir.Value, Crossing | None]
) -> tuple[Crossing, ...] | None:
    """The values as numbers for each token; None where one of them is not that."""
    found = []
    for value in values:
        if value not in known:
            known[value] = _of_tokens(value, probes)
        each = known[value]
        if each is None:
            return None
        found.append(each)
    return tuple(found)


def _of_tokens(value: ir.Value, probes: Sequence[GraphProbe]) -> Crossing | None:
    """`value` as numbers for each token of each row, if it is that."""
    try:
        shapes = np.array([probe.shape(value) for probe in probes])  # [probes, axes]
        if probes[0].dtype(value).kind not in "fV":  # numpy knows bfloat16 as V
            return None
    except (NotConcrete, ValueError):  # ValueError: of different rank
        return None
    sizes = np.array([(probe.batch, probe.chunk) for probe in probes])
    if shapes.ndim != 2:
        return None
    batch = [axis for axis in range(shapes.shape[1]) if np.array_equal(shapes[:, axis], sizes[:, 0])]
    tokens = [axis for axis in range(shapes.shape[1]) if np.array_equal(shapes[:, axis], sizes[:, 1])]
    if len(batch) != 1 or len(tokens) != 1:
        return None
    others = [axis for axis in range(shapes.shape[1]) if axis not in (*batch, *tokens)]
    if any((shapes[:, axis] != shapes[0, axis]).any() for axis in others):
        return None
    return Crossing(value, (*batch, *tokens, *others), tuple(int(shapes[0, axis]) for axis in others))
