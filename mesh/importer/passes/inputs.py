"""Name what a decoder takes and gives: each graph input gets its role, and the logits become the only output.

The states after a step stay outputs beside them. Inputs that only choose how the graph runs become constants.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import PAST_STATE, PRESENT_STATE, Draft, Role, constant, input_of

__all__ = ["CACHE_BRANCH", "name_inputs"]

CACHE_BRANCH = "use_cache_branch"
"""The boolean input of optimum's merged decoders: whether a past is given."""


def name_inputs(draft: Draft) -> bool:
    """Find the roles of `draft`. UnsupportedModel if there are no logits, no token ids, or an input that no decoder has."""
    logits = _logits(draft.path, draft.model)
    _refuse_windowed_cache(draft.path, draft.model)
    states = [value for value in draft.model.graph.outputs if str(value.name).startswith(PRESENT_STATE)]
    del draft.model.graph.outputs[:]
    draft.model.graph.outputs.extend([logits, *states])
    draft.roles, draft.source_logits = _roles(draft.path, draft.model), str(logits.name)
    return True


def _refuse_windowed_cache(path: Path, model: ir.Model) -> None:
    """UnsupportedModel for a graph whose present is the last positions alone: what it computes for a longer past cannot be asked."""
    for value in model.graph.outputs:
        node = value.producer()
        if node is None or node.op_type != "Slice" or (data := input_of(node, 0).producer()) is None or data.op_type != "Concat":
            continue
        start = constant(node.inputs[1])
        if start is not None and start.size == 1 and int(start.reshape(())) < 0:
            raise UnsupportedModel(
                f"{path}: the output {value.name} keeps the last {-int(start.reshape(()))} positions only (a cache with a sliding window): "
                "export with a cache that keeps all (of transformers a DynamicCache() without a config), or import the Hugging Face files"
            )


def _logits(path: Path, model: ir.Model) -> ir.Value:
    outputs = list(model.graph.outputs)
    named = [value for value in outputs if value.name and value.name.split(".")[-1] == "logits"]
    if named:
        return named[0]
    floats = [v for v in outputs if v.dtype is not None and v.dtype.is_floating_point() and (v.shape is None or len(v.shape) == 3)]
    if len(floats) == 1 and len(outputs) == 1:
        return floats[0]
    names = ", ".join(str(value.name) for value in outputs[:4])
    raise UnsupportedModel(f"{path}: no output is named 'logits' (there are {names}): export a causal language model with its lm head")


def _roles(path: Path, model: ir.Model) -> dict[ir.Value, Role]:
    roles: dict[ir.Value, Role] = {}
    tokens: list[ir.Value] = []
    for value in list(model.graph.inputs):
        name = (value.name or "").lower()
        if name == CACHE_BRANCH:
            _bind(model, value, np.array(True))
        elif name.endswith("logits_to_keep"):  # 0 keeps those of every position
            _bind(model, value, np.zeros(_static(value), np.int64))
        elif name.startswith(PAST_STATE):
            roles[value] = Role.STATE
        elif value.dtype is not None and value.dtype.is_floating_point():
            if value.shape is not None and len(value.shape) >= 4:
                roles[value] = Role.PAST
            elif any(True for _ in value.uses()):
                raise UnsupportedModel(f"{path}: input {value.name} is floating point and no key/value cache: export with input_ids")
        elif "mask" in name:
            roles[value] = Role.MASK
        elif "cache_position" in name:
            roles[value] = Role.CACHE_POSITION
        elif "position" in name:
            roles[value] = Role.POSITIONS
        elif "token_type" in name or "segment" in name:
            roles[value] = Role.SEGMENTS
        else:
            tokens.append(value)
    if len(tokens) > 1:
        tokens = [value for value in tokens if "ids" in (value.name or "").lower()] or tokens
    if len(tokens) != 1:
        seen = ", ".join(str(value.name) for value in model.graph.inputs)
        raise UnsupportedModel(
            f"{path}: one integer input of token ids is needed; the inputs are {seen}: export a decoder-only language model"
        )
    if tokens[0].shape is not None:
        if len(tokens[0].shape) != 2:
            raise UnsupportedModel(f"{path}: input {tokens[0].name} has shape {tokens[0].shape} where [batch, tokens] is needed")
        if isinstance(tokens[0].shape[1], int):
            raise UnsupportedModel(f"{path}: exported for exactly {tokens[0].shape[1]} tokens: export it with a dynamic sequence length")
    roles[tokens[0]] = Role.TOKENS
    return roles


def _static(value: ir.Value) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else 1 for dim in value.shape or ())


def _bind(model: ir.Model, value: ir.Value, array: np.ndarray) -> None:
    """Turn a graph input into a constant."""
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(array, name=value.name)
    model.graph.register_initializer(value)
