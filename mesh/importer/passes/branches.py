"""Replace an If by the branch that is always taken, so that the analysis meets no control flow."""

from __future__ import annotations

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import Draft, input_of
from mesh.importer.graph.edit import inline_branch
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import GraphProbe
from mesh.importer.passes.inputs import CACHE_BRANCH

__all__ = ["inline_one_branch", "take_cache_branch"]


def take_cache_branch(draft: Draft) -> bool:
    """A merged decoder of optimum is one If on `use_cache_branch`: replace it by its branch with a past."""
    changed = False
    for node in list(draft.model.graph):
        condition = node.inputs[0] if node.op_type == "If" and node.domain == "" else None
        if condition is not None and condition.name == CACHE_BRANCH and condition.producer() is None:
            inline_branch(draft.model, node, True)
            changed = True
    return changed


def inline_one_branch(draft: Draft) -> bool:
    """Replace the first If of the main graph. UnsupportedModel if its condition is not the same at all sizes.

    Sizes are those of several new tokens after several cached ones. Where an exporter has a branch of its own for a single
    token or an empty cache, the general branch gives the same result.
    """
    graph = draft.analysed()
    branches = [node for node in graph.nodes if node.op_type == "If" and node.domain == ""]
    past = (4, 7, 9) if graph.has_past else (0, 0, 0)
    probes = [GraphProbe(graph, rows, chunk, before) for (rows, chunk), before in zip(((2, 3), (3, 5), (1, 4)), past, strict=True)]
    for node in branches:
        try:
            taken = {bool(probe.value(input_of(node, 0)).reshape(-1)[0]) for probe in probes}
        except NotConcrete:
            raise UnsupportedModel(f"node {node.name} (If) chooses by the tokens: export without control flow") from None
        if len(taken) > 1:
            raise UnsupportedModel(f"node {node.name} (If) chooses by the number of rows or tokens: export without control flow")
        inline_branch(graph.model, node, taken.pop())
        return True  # the next If may depend on what this branch holds
    return False
