"""Remove nodes that only hand their input on: Dropout, and a Concat, Sum, Max, Min or Mean of one input.

onnx_ir's IdentityEliminationPass removes Identity itself.
"""

from __future__ import annotations

import onnx_ir as ir

from mesh.importer.graph.decoder import Draft, input_of

__all__ = ["drop_single_input_nodes"]

OF_ONE_INPUT = ("Concat", "Sum", "Max", "Min", "Mean")


def drop_single_input_nodes(draft: Draft) -> bool:
    """Replace the outputs of such nodes by their inputs. A Dropout whose mask is used stays."""
    graph, changed = draft.model.graph, False
    for node in list(graph):
        single = node.op_type in OF_ONE_INPUT and len(node.inputs) == 1
        if node.domain != "" or not (single or node.op_type == "Dropout"):
            continue
        if len(node.outputs) > 1 and node.outputs[1].uses():
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], input_of(node, 0), replace_graph_outputs=True)
        graph.remove(node, safe=True)
        changed = True
    return changed
