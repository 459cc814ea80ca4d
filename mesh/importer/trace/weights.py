"""The parameters of a traced model from its checkpoint, read and converted one at a time. gguf_weights.py does it for GGUF files.

Checkpoints name and divide tensors in their own ways (one tensor an expert, fused projections). transformers has a list of conversions
for each model; they are applied here to one parameter at a time, so that no more than it is in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mesh.errors import CorruptModel
from mesh.importer.trace.library import quiet, torch_and_transformers
from mesh.importer.trace.model import TracedModel
from mesh.importer.write.kept import Kept, KeptForm, SourceMatrix, joined, one_form

__all__ = ["ModelParameters", "Parameters"]

Array = npt.NDArray[Any]
INSIDE = "language_model."
"""Where models of images or sounds have their language model."""


class NamedTensors(Protocol):
    """Tensors by name; `form` and `kept`: as a block can hold a quantized one, see mesh/importer/families/tensors.py."""

    def __iter__(self) -> Iterator[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def form(self, name: str) -> KeptForm | None: ...
    def kept(self, name: str) -> Kept: ...


class WideTensors(NamedTensors, Protocol):
    """Those of a directory."""

    def read_wide(self, name: str) -> Array:
        """A tensor as float32."""
        ...


@dataclass(slots=True)
class _Recipe:
    """What one conversion makes from which tensors. `first`: the parameter that it is named by."""

    first: str
    converter: Any
    tensors: list[tuple[str, str]] = field(default_factory=list)  # pattern, name in the checkpoint


class ModelParameters(ABC):
    """Parameters and saved buffers of `model` by their names in it. `unused`: tensors of the checkpoint that it has no place for."""

    def __init__(self, model: TracedModel) -> None:
        self._model = model.module
        self._state: Mapping[str, Any] = self._model.state_dict()
        self._same = _tied(self._model)
        self.unused: list[str] = []

    def check_complete(self) -> None:
        """CorruptModel where a parameter of the model has no tensor."""
        for name, _ in self._model.named_parameters():
            if name not in self:
                self.read(name)

    def __contains__(self, name: str) -> bool:
        return self._source(name) is not None

    def read(self, name: str) -> Array:
        """The parameter `name` as float32 or its own integer type. CorruptModel: the checkpoint lacks it, or it has another shape."""
        source = self._source(name)
        if source is None:
            raise CorruptModel(f"the checkpoint has no tensor for the parameter {name}: its weights are not those of its configuration")
        array = self._made(source)
        wanted = tuple(self._state[source].shape)
        if array.shape != wanted:
            raise CorruptModel(f"the tensor for {name} has shape {list(array.shape)} where the configuration needs {list(wanted)}")
        return array

    def matrix(self, name: str) -> SourceMatrix | None:
        """The parameter `name` as the checkpoint has quantized it, if it is one tensor of it that a block can hold so."""
        source = self._source(name)
        return None if source is None else self._matrix(source)

    def _source(self, name: str) -> str | None:
        """The name under which the checkpoint's tensors make a parameter."""
        return next((each for each in (name, *self._same.get(name, ())) if self._has(each)), None)

    @abstractmethod
    def _has(self, name: str) -> bool: ...
    @abstractmethod
    def _made(self, name: str) -> Array: ...
    @abstractmethod
    def _matrix(self, name: str) -> SourceMatrix | None: ...


class Parameters(ModelParameters):
    """Those of a directory with safetensors files."""

    def __init__(self, model: TracedModel, checkpoint: WideTensors) -> None:
        super().__init__(model)
        self._checkpoint = checkpoint
        self._recipes: dict[str, _Recipe] = {}
        with quiet():
            self._plan(checkpoint)

    def _plan(self, names: Iterable[str]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self._model)
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        prefix = self._model.base_model_prefix
        first: dict[str, _Recipe] = {}
        for name in sorted(names, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self._state)
            if target not in self._state and name in self._state:
                target, pattern = name, None
            if target not in self._state and INSIDE in name:  # the language model of this checkpoint was built alone
                target, pattern = rename_source_key(name.replace(INSIDE, "", 1), renamings, converters, prefix, self._state)
            if target not in self._state:
                self.unused.append(name)
                continue
            if pattern is None:
                self._recipes[target] = _Recipe(target, None, [("", name)])
                continue
            recipe = first.setdefault(target, _Recipe(target, by_pattern[pattern]))
            recipe.tensors.append((pattern, name))
        for recipe in first.values():
            for target in self._targets(recipe):
                self._recipes[target] = recipe

    def _targets(self, recipe: _Recipe) -> list[str]:
        """All parameters that one conversion makes."""
        own = recipe.converter.target_patterns
        begin = next((each for each in own if each in recipe.first), None)
        if begin is None:
            return [recipe.first]
        return [name for each in own if (name := recipe.first.replace(begin, each, 1)) in self._state]

    def _has(self, name: str) -> bool:
        return name in self._recipes

    def _matrix(self, name: str) -> SourceMatrix | None:
        recipe, wanted = self._recipes[name], tuple(self._state[name].shape)
        tensors = [tensor for _, tensor in recipe.tensors]
        forms = [self._checkpoint.form(tensor) for tensor in tensors]
        form = forms[0]
        if form is None or any(each != form for each in forms):
            return None
        if recipe.converter is not None and len(wanted) == 3:
            return self._experts(name, recipe, form)
        if recipe.converter is not None:
            plain = len(wanted) == 2 and not form.scaled
            return SourceMatrix(lambda: self.read(name), form, lambda: self._narrowed(name, form)) if plain else None
        if self._checkpoint.shape(tensors[0]) != wanted:
            return None  # reading it says what is wrong
        if len(wanted) == 2:
            return SourceMatrix(lambda: self.read(name), form, lambda: self._checkpoint.kept(tensors[0]))
        experts, depth, out = wanted
        return SourceMatrix(
            lambda: self.read(name).swapaxes(1, 2), form, lambda: self._checkpoint.kept(tensors[0]), (experts, out, depth), turned=True
        )

    def _experts(self, name: str, recipe: _Recipe, form: KeptForm) -> SourceMatrix | None:
        """The weights of experts [experts, out, in] that a conversion only stacks: a tensor for each expert, or several (a gate and what it
        opens), whose outputs come one after the other."""
        from transformers.core_model_loading import Concatenate, MergeModulelist

        kinds = [(type(each), getattr(each, "dim", None)) for each in recipe.converter.operations]
        if kinds not in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)]):
            return None
        by_pattern = ([tensor for own, tensor in recipe.tensors if own == pattern] for pattern in recipe.converter.source_patterns)
        of_each = [names for names in by_pattern if names]
        experts, out, depth = self._state[name].shape
        if any(len(names) != experts for names in of_each) or (len(kinds) == 1 and len(of_each) > 1):
            return None
        tensors = [tensor for group in zip(*of_each, strict=True) for tensor in group]
        shapes = [self._checkpoint.shape(tensor) for tensor in tensors]
        if one_form([form], shapes) is None or shapes[0] != (out // len(of_each), depth):
            return None
        return SourceMatrix(
            lambda: self.read(name), form, lambda: joined([self._checkpoint.kept(tensor) for tensor in tensors]), (experts, out, depth)
        )

    def _narrowed(self, name: str, form: KeptForm) -> Kept:
        """What a conversion makes of tensors of 16 bits, in 16 bits again if these are the same numbers."""
        wide = self.read(name)
        narrow = wide.astype(form.codes)
        return Kept(form, narrow if (narrow.astype(np.float32) == wide).all() else wide)

    def _made(self, name: str) -> Array:
        torch, _ = torch_and_transformers()
        recipe = self._recipes[name]
        if recipe.converter is None:
            return self._checkpoint.read_wide(recipe.tensors[0][1])
        converter = deepcopy(recipe.converter)
        for pattern, tensor in recipe.tensors:
            converter.add_tensor(
                recipe.first, tensor, pattern, lambda tensor=tensor: torch.from_numpy(self._checkpoint.read_wide(tensor).copy())
            )
        with quiet(), torch.no_grad():
            made = converter.convert(recipe.first, model=self._model, config=self._model.config)
        found = made.get(name)
        if found is None:
            raise CorruptModel(f"the tensors {', '.join(n for _, n in recipe.tensors[:3])} make no parameter {name}")
        found = found[0] if isinstance(found, list) else found
        return np.asarray(found.contiguous().numpy())


def _tied(module: Any) -> dict[str, tuple[str, ...]]:
    """For each parameter the other names of the same one."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(other for other in group if other != name) for group in names.values() for name in group if len(group) > 1}
