"""Rewrite com.microsoft operators, as onnxruntime-genai and onnxruntime's optimizer write them, to standard ones.

contrib_norms, contrib_products and contrib_attention have a rule for each operator. An operator without a standard form is an
UnsupportedModel.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import Draft
from mesh.importer.passes.contrib_attention import ATTENTIONS
from mesh.importer.passes.contrib_norms import NORMS
from mesh.importer.passes.contrib_products import PRODUCTS
from mesh.importer.passes.contrib_rewriter import Rewriter, Rule

__all__ = ["rewrite_contrib"]

RULES: Mapping[str, Rule] = {**NORMS, **PRODUCTS, **ATTENTIONS}


def rewrite_contrib(draft: Draft) -> bool:
    """Rewrite every operator that has a rule. UnsupportedModel for any other of a domain that is not ONNX's own.

    Where attentions count positions by themselves, the positions become an input of the draft.
    """
    model, changed = draft.model, False
    rewriter = Rewriter(model, draft.roles)
    for node in list(model.graph):
        rule = RULES.get(node.op_type)
        if rule is not None and (node.domain == "com.microsoft" or node.op_type == "SimplifiedLayerNormalization"):
            replacements = rule(rewriter, node)
            for old, new in zip(node.outputs, replacements, strict=False):
                if new is not None:
                    new.shape = new.shape or old.shape  # a later rule may ask for the size of the last axis
                    if new.dtype is None and old.dtype is not None:
                        new.dtype = old.dtype
                    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            left = [output for output in node.outputs if output.uses()]
            if left:
                raise UnsupportedModel(f"{node.op_type} {node.name}: its output {left[0].name} is used, which is not supported")
            model.graph.remove(node, safe=True)
            changed = True
        elif node.domain not in ("", "ai.onnx"):
            raise UnsupportedModel(
                f"operator {node.domain}.{node.op_type} (node {node.name}) is not known: export with the standard ONNX operators, "
                "or with those of onnxruntime-genai"
            )
    return changed
