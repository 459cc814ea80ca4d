"""Remove nodes that only hand their input on: Identity, Dropout, and a Concat, Sum, Max, Min or Mean of one input."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from mesh.importer.graph.decoder import Draft, input_of

__all__ = ["drop_identities", "drop_single_input_nodes"]

OF_ONE_INPUT = ("Concat", "Sum", "Max", "Min", "Mean")


def drop_identities(draft: Draft) -> bool:
    """Remove every Identity with onnx_ir's pass, which gives the logits' name to what was their input.

    That pass raises ValueError if the input and the output have shapes of different rank. Exporters write such shapes into the
    branches of an If, so the shape of the output is forgotten first.
    """
    for node in ir.traversal.RecursiveGraphIterator(draft.model.graph):
        if node.op_type == "Identity" and node.domain == "":
            given, output = input_of(node, 0).shape, node.outputs[0]
            if given is not None and output.shape is not None and len(given) != len(output.shape):
                output.shape = None
    return common.IdentityEliminationPass()(draft.model).modified


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
