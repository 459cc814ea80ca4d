"""The parameters of a traced model from a GGUF file: which tensors make each, by the gguf package's own table of names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.importer.trace.gguf_table import TURNED_EXPERTS, Architecture, Change, halves
from mesh.importer.trace.library import torch_and_transformers
from mesh.importer.trace.model import TracedModel
from mesh.importer.trace.weights import ModelParameters, NamedTensors
from mesh.importer.write.kept import SourceMatrix, joined_experts, one_form

__all__ = ["GgufParameters", "divide_frequencies"]

Array = npt.NDArray[Any]

FREQUENCY_FACTORS = "rope_freqs.weight"
KEPT_ELSEWHERE = re.compile(r"\.attn_(k|v|k_norm)\.weight$")
"""What a layer that reads the keys and values of an earlier one has no use for, although files have it."""
LAYER = re.compile(r"\.(\d+)\.")
HALVED = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")


class GgufTensors(NamedTensors, Protocol):
    path: Any
    metadata: dict[str, Any]

    def __contains__(self, name: str) -> bool: ...
    def read(self, name: str) -> Array: ...


class GgufParameters(ModelParameters):
    """`name` of the file's architecture, `architecture` what it means."""

    def __init__(self, model: TracedModel, checkpoint: GgufTensors, name: str, architecture: Architecture) -> None:
        super().__init__(model)
        self._checkpoint, self._architecture, self._config = checkpoint, architecture, model.text
        self._tensors: dict[str, tuple[str, ...]] = {}
        self._numbers: dict[str, str] = {}
        names = _names(name, model.text.num_hidden_layers)
        for parameter in self._state:
            key = next((key for end, key in architecture.numbers.items() if parameter.endswith(end)), None)
            if key is not None:
                self._numbers[parameter] = key
            elif found := self._find(parameter, names):
                self._tensors[parameter] = found
        used = {tensor for tensors in self._tensors.values() for tensor in tensors} | {FREQUENCY_FACTORS}
        self.unused = [tensor for tensor in checkpoint if tensor not in used]
        ahead = [tensor for tensor in self.unused if _layer(tensor) >= model.text.num_hidden_layers]
        own = model.text.num_hidden_layers - (getattr(model.text, "num_kv_shared_layers", None) or 0)
        shared = [tensor for tensor in self.unused if _layer(tensor) >= own and KEPT_ELSEWHERE.search(tensor)]
        lost = next((tensor for tensor in self.unused if tensor not in (*ahead, *shared)), None)
        self.note = "the layers that guess tokens ahead are left out" if ahead else None
        if lost is not None:
            raise UnsupportedModel(
                f"{checkpoint.path}: {architecture.kind} of transformers has no use for the tensor {lost}: this is a "
                f"variant of {name} that is not supported"
            )

    def _find(self, parameter: str, names: Callable[[str], str | None]) -> tuple[str, ...]:
        """The tensors of a parameter; none where the file has not all of them."""
        for tensors in _candidates(parameter, names, self._architecture):
            if tensors and all(tensor in self._checkpoint for tensor in tensors):
                return tuple(tensors)
        return ()

    def _has(self, name: str) -> bool:
        return name in self._tensors or name in self._numbers

    def _made(self, name: str) -> Array:
        if name in self._numbers:
            return self._number(name)
        parts = [np.asarray(self._checkpoint.read(tensor)).astype(np.float32, copy=False) for tensor in self._tensors[name]]
        change = self._change(name)
        array = change(parts, self._config) if change is not None else parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
        if self._architecture.norm_plus_one and change is None and name.endswith("norm.weight"):
            array = array - 1
        return np.ascontiguousarray(array).reshape(self._shape_of(name, array))

    def _number(self, name: str) -> Array:
        """The number of a layer, which the file has among its metadata. CorruptModel: it has none."""
        key, layer = self._numbers[name], LAYER.search(name)
        said = self._checkpoint.metadata.get(key)
        try:
            number = float(said[int(layer[1])]) if layer is not None and isinstance(said, list) else float(said)  # type: ignore[arg-type]
        except (TypeError, ValueError, IndexError):
            raise CorruptModel(f"{self._checkpoint.path}: {key} has no number for {name}") from None
        return np.full(tuple(self._state[name].shape), number, np.float32)

    def _shape_of(self, name: str, array: Array) -> tuple[int, ...]:
        """The parameter's own shape where only sides of 1 differ, which a file leaves out."""
        wanted = tuple(self._state[name].shape)
        same = [side for side in wanted if side > 1] == [side for side in array.shape if side > 1]
        return wanted if same else array.shape

    def _change(self, name: str) -> Change | None:
        """What makes a parameter of its tensors: the table's, or rotary pairs put back to halves."""
        known = {**self._architecture.changes, **self._architecture.moves}
        own = next((change for end, change in known.items() if name.endswith(end)), None)
        return halves if own is None and self._architecture.pairs and name.endswith(HALVED) else own

    def _matrix(self, name: str) -> SourceMatrix | None:
        if name in self._numbers:
            return None
        tensors, change = self._tensors[name], self._change(name)
        if len(self._state[name].shape) == 3:
            return self._experts(name)
        form, same = self._checkpoint.form(tensors[0]), self._checkpoint.shape(tensors[0]) == tuple(self._state[name].shape)
        moved = change in (None, halves, *self._architecture.moves.values())
        if form is None or not same or len(tensors) > 1 or not moved:
            return None

        def rows(array: Array) -> Array:
            return array if change is None else change([array], self._config)

        return SourceMatrix(lambda: self.read(name), form, lambda: self._checkpoint.kept(tensors[0]).rows(rows))

    def _experts(self, name: str) -> SourceMatrix | None:
        """Weights of experts, of one tensor [experts, out, in] or several that a change brings together without turning their rows."""
        tensors, change, wanted = self._tensors[name], self._change(name), tuple(self._state[name].shape)
        shapes = [self._checkpoint.shape(tensor) for tensor in tensors]
        turned = change in TURNED_EXPERTS
        form = one_form([self._checkpoint.form(tensor) for tensor in tensors], shapes)
        experts, out, depth = shapes[0][0], sum(shape[1] for shape in shapes if len(shape) == 3), shapes[0][-1]
        if form is None or (change is not None and not turned) or wanted != ((experts, depth, out) if turned else (experts, out, depth)):
            return None

        def join(parts: Sequence[Array]) -> Array:
            return np.concatenate(parts, axis=1) if change is None else change(parts, self._config).swapaxes(1, 2)

        return SourceMatrix(
            lambda: self.read(name).swapaxes(1, 2) if turned else self.read(name),
            form,
            lambda: joined_experts([self._checkpoint.kept(tensor) for tensor in tensors], experts, join),
            (experts, out, depth),
            turned,
        )


def _names(architecture: str, layers: int) -> Callable[[str], str | None]:
    """The tensor that the gguf package's table names for a part of a Hugging Face model."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    table = get_tensor_name_map(next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture), layers)

    def of(part: str) -> str | None:
        inner = part.partition(".")[2]  # some are named without what holds the layers, or by another name of it
        return table.get_name(part) or table.get_name(inner) or table.get_name(f"backbone.{inner}")

    return of


def _layer(tensor: str) -> int:
    found = re.match(r"blk\.(\d+)\.", tensor)
    return int(found[1]) if found else -1


def _candidates(parameter: str, names: Callable[[str], str | None], architecture: Architecture) -> Iterator[tuple[str, ...]]:
    """Tensors that together may be `parameter`, the likeliest first."""
    own = next((tensors for end, tensors in architecture.tensors.items() if parameter.endswith(end)), None)
    if own is not None:
        layer = LAYER.search(parameter)
        yield tuple(tensor.format(layer[1] if layer else "") for tensor in own)
        return
    part, _, kind = parameter.rpartition(".")
    if kind in ("weight", "bias"):
        yield (f"{names(part)}.{kind}",)
        return
    if kind == "gate_up_proj":  # of all experts
        yield (f"{names(parameter)}.weight",)
        yield f"{names(f'{part}.gate_proj')}.weight", f"{names(f'{part}.up_proj')}.weight"
    bias = names(parameter.removesuffix("_bias")) or names(f"{part}.gate.e_score_correction")
    yield from ((f"{names(parameter)}{end}",) for end in ("", ".weight", ".bias"))
    yield (f"{bias}.bias",)


def divide_frequencies(checkpoint: GgufTensors, module: Any) -> None:
    """Divide the rotary frequencies of `module` by the factors that the file has for them."""
    if FREQUENCY_FACTORS not in checkpoint:
        return
    torch, _ = torch_and_transformers()
    factors = np.array(checkpoint.read(FREQUENCY_FACTORS), np.float32)
    buffers = [each for name, each in module.named_buffers() if name.endswith("inv_freq") and "sliding_attention" not in name]
    if not buffers or any(tuple(each.shape) != factors.shape for each in buffers):
        raise CorruptModel(f"{checkpoint.path}: {FREQUENCY_FACTORS} has {factors.size} entries, which the rotary positions do not need")
    for each in buffers:
        each.div_(torch.from_numpy(factors))
