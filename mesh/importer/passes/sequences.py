"""Rewrite a tensor that is split into a sequence, whose elements are taken by number, as one Slice for each element.

torch's exporter writes `chunk` and `split` so where it does not optimize.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mesh.importer.graph.decoder import Draft, attribute, constant, input_of
from mesh.importer.graph.edit import insert, new_constant

__all__ = ["rewrite_sequences"]

END = np.iinfo(np.int64).max


def rewrite_sequences(draft: Draft) -> bool:
    """Rewrite every SplitToSequence with constant sizes that only SequenceAt with constant places reads. Others stay as they are."""
    graph, changed = draft.model.graph, False
    for node in list(graph):
        if node.op_type != "SplitToSequence" or node.domain != "" or not attribute(node, "keepdims", 1):
            continue
        sizes = constant(node.inputs[1]) if len(node.inputs) > 1 else None
        takers = [taker for taker, _ in node.outputs[0].uses()]
        places = [constant(taker.inputs[1]) if taker.op_type == "SequenceAt" else None for taker in takers]
        if sizes is None or not takers or any(place is None for place in places):
            continue
        bounds = [_bounds(sizes, int(place)) for place in places if place is not None]
        if any(bound is None for bound in bounds):
            continue
        for taker, bound in zip(takers, bounds, strict=True):
            assert bound is not None
            ends = [new_constant(graph, np.array([number], np.int64)) for number in (*bound, attribute(node, "axis", 0))]
            (part,) = insert(graph, taker, "Slice", input_of(node, 0), *ends)
            ir.convenience.replace_all_uses_with(taker.outputs[0], part, replace_graph_outputs=True)
            graph.remove(taker, safe=True)
        graph.remove(node, safe=True)
        changed = True
    return changed


def _bounds(sizes: np.ndarray, place: int) -> tuple[int, int] | None:
    """Where element `place` begins and ends. None: it is counted from an end that is not known."""
    if sizes.ndim == 1:
        ends = [int(end) for end in np.cumsum(sizes)]
        return (ends[place] - int(sizes[place]), ends[place]) if -len(ends) <= place < len(ends) else None
    size = int(sizes)
    if place < -1:
        return None
    return (-size, END) if place == -1 else (place * size, (place + 1) * size)
