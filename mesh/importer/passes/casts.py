"""Say the type of a CastLike: of the value that it names by another one, only the type counts."""

from __future__ import annotations

import onnx_ir as ir

from mesh.importer.graph.decoder import Draft, input_of
from mesh.importer.graph.edit import insert

__all__ = ["name_types"]


def name_types(draft: Draft) -> bool:
    """Replace each CastLike by a Cast, where the type of the value that it is like is known."""
    graph, changed = draft.model.graph, False
    for node in list(graph):
        if node.op_type != "CastLike" or node.domain != "" or (dtype := input_of(node, 1).dtype) is None:
            continue
        (made,) = insert(graph, node, "Cast", input_of(node, 0), to=int(dtype))
        made.dtype, made.shape = dtype, node.outputs[0].shape
        ir.convenience.replace_all_uses_with(node.outputs[0], made, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        changed = True
    return changed
