"""One graph of a traced model: token ids and a past in, logits and a present out. torch exports it without any weight's numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import PAST_STATE, PRESENT_STATE
from mesh.importer.trace.complex_numbers import pairs_of_reals
from mesh.importer.trace.latent import caches_of
from mesh.importer.trace.library import quiet, torch_and_transformers
from mesh.importer.trace.model import TracedModel, cache_shapes
from mesh.importer.trace.python_forms import python_forms
from mesh.importer.trace.recurrences import recurrences
from mesh.importer.trace.states import LayerKeeps, cache_argument, states_of
from mesh.importer.trace.weights import ModelParameters

__all__ = ["Reader", "export"]

BATCH, CHUNK, PAST = 2, 3, 4
OPSET = 18
WRAPPER = "model."  # what the wrapper puts before the names of parameters


def export(model: TracedModel, parameters: ModelParameters) -> ir.Model:
    """The graph. Its weights are read from the checkpoint each time they are asked for, and never kept.

    UnsupportedModel: torch cannot trace the model. CorruptModel: the checkpoint lacks a weight that the graph uses.
    """
    torch, _ = torch_and_transformers()
    shapes = cache_shapes(model)
    with torch.device("meta"):
        before = PAST if any(kept.anything for kept in shapes) else 0
        ids, mask = torch.zeros(BATCH, CHUNK, dtype=torch.long), torch.ones(BATCH, before + CHUNK, dtype=torch.long)
        positions = torch.zeros(BATCH, CHUNK, dtype=torch.long)
        attention = [(layer, kept.attention) for layer, kept in enumerate(shapes) if kept.attention is not None]
        past = [(torch.zeros(BATCH, h, PAST, k), torch.zeros(BATCH, h, PAST, v)) for _, (h, k, v) in attention]
        states = [torch.zeros(BATCH, *state.shape) for kept in shapes for state in kept.states]
    dim = torch.export.Dim.DYNAMIC
    two, four = {0: dim, 1: dim}, {0: dim, 2: dim}
    pairs = [f"{layer}.{which}" for layer, _ in attention for which in ("key", "value")]
    carried = [f"{layer}.{number}" for layer, kept in enumerate(shapes) for number in range(len(kept.states))]
    try:
        with (
            torch.no_grad(),
            quiet(),
            _numbers_kept(),
            pairs_of_reals(),
            python_forms(model.module),
            recurrences(model.module),
            caches_of(model.module) as new_cache,
        ):
            program = torch.onnx.export(
                _wrapper(model.module, new_cache, shapes),
                (ids, mask, positions, past, states),
                None,
                dynamo=True,
                optimize=False,
                verbose=False,
                external_data=False,
                opset_version=OPSET,
                dynamic_shapes=(two, two, two, [(four, four) for _ in attention], [{0: dim} for _ in states]),
                input_names=[
                    *("input_ids", "attention_mask", "position_ids"),
                    *(f"past_key_values.{pair}" for pair in pairs),
                    *(f"{PAST_STATE}{each}" for each in carried),
                ],
                output_names=["logits", *(f"present.{pair}" for pair in pairs), *(f"{PRESENT_STATE}{each}" for each in carried)],
            )
    except Exception as error:  # the exporter wraps what goes wrong in classes of its own
        raise UnsupportedModel(f"{model.path}: torch cannot trace {model.kind} ({_cause(error)})") from None
    graph: ir.Model = program.model
    _give_weights(model, graph, parameters)
    return graph


@contextmanager
def _numbers_kept() -> Iterator[None]:
    """A number that becomes a tensor keeps its value, although the device of everything around it holds none."""
    torch, _ = torch_and_transformers()
    tensor = torch.tensor

    def kept(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        alone = isinstance(data, bool | int | float)
        return tensor(data, *args, device=None if alone else device, **kwargs)

    torch.tensor = kept
    try:
        yield
    finally:
        torch.tensor = tensor


def _wrapper(module: Any, new_cache: Callable[..., Any], shapes: Sequence[LayerKeeps]) -> Any:
    torch, _ = torch_and_transformers()
    takes = inspect.signature(module.forward).parameters

    base: Any = torch.nn.Module

    class OneGraph(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past: Any, states: Any) -> Any:
            pairs = [(key, value) for key, value in past]
            cache = new_cache(pairs, states, shapes) if states else new_cache(pairs)
            given = {cache_argument(module): cache} | ({"position_ids": position_ids} if "position_ids" in takes else {})
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=True, **given)
            kept = list(zip(cache.layers, shapes, strict=True))
            keys_and_values = [part for layer, own in kept if own.attention is not None for part in (layer.keys, layer.values)]
            return out.logits, *keys_and_values, *(state for layer, own in kept for state in states_of(layer, own))

    return OneGraph().eval()


def _give_weights(model: TracedModel, graph: ir.Model, parameters: ModelParameters) -> None:
    """Put a reader in place of each weight, and its numbers in place of each buffer."""
    torch, _ = torch_and_transformers()
    own = {name for name, _ in model.module.named_parameters(remove_duplicate=False)}
    buffers = dict(model.real.named_buffers())
    for value in graph.graph.initializers.values():
        name = str(value.name).removeprefix(WRAPPER)
        held = getattr(value.const_value, "raw", None)
        if name in parameters:
            value.const_value = Reader(name, value, parameters)
        elif name in own:
            parameters.read(name)  # says what is missing
        elif name in buffers:
            value.const_value = ir.tensor(_numbers(buffers[name]), name=value.name)
        elif isinstance(held, torch.Tensor) and held.device.type == "meta":
            raise UnsupportedModel(f"{model.path}: {model.kind} makes the constant {value.name} while it runs: it cannot be traced")


def _numbers(tensor: Any) -> np.ndarray[Any, Any]:
    tensor = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
    return np.asarray(tensor.contiguous().numpy())


class Reader(ir.LazyTensor):
    """A weight that is read anew each time. `source`: as the checkpoint has quantized it."""

    def __init__(self, name: str, value: ir.Value, parameters: ModelParameters) -> None:
        assert value.dtype is not None and value.shape is not None
        dtype, label = value.dtype, str(value.name)
        super().__init__(lambda: ir.tensor(parameters.read(name), name=label), dtype=dtype, shape=value.shape, name=label, cache=False)
        self.source = parameters.matrix(name)


def _cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:300]}"
