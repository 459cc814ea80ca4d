"""A model's own logits by transformers: the outside truth that an import of a Hugging Face directory is compared with.

A small model is held whole. A larger one has the weights of one module in memory at a time: they are read when the module is called
and dropped when it returns, so that any model can be run, slowly, in the memory of its largest module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mesh.importer.trace.indexers import positions_chosen
from mesh.importer.trace.latent import caches_of
from mesh.importer.trace.library import quiet, torch_and_transformers
from mesh.importer.trace.model import TracedModel, compute_experts
from mesh.importer.trace.states import cache_argument, has_states
from mesh.importer.trace.weights import ModelParameters

__all__ = ["TransformersReference"]

Array = npt.NDArray[Any]


class TransformersReference:
    """`whole`: keep all weights in memory. `name` says which engine it is."""

    def __init__(self, model: TracedModel, parameters: ModelParameters, *, whole: bool) -> None:
        _, transformers = torch_and_transformers()
        self.name = f"transformers {transformers.__version__}"
        self._model = model.real
        compute_experts(self._model.config, "eager")  # one expert at a time, where the traced form copies those of every token
        self._takes = inspect.signature(self._model.forward).parameters
        self._loader = _Loader(self._model, parameters)
        if whole:
            self._loader.load_all()
        else:
            self._loader.hook()

    def logits(self, tokens: Array) -> Array:
        """The whole sequence at once: tokens [T] -> [T, V] float32."""
        return self._run(tokens, None, 0)

    def late(self, tokens: Array, past: Past) -> Array:
        """tokens [T] after `past.start` positions whose keys and values are made up -> [T, V] float32."""
        with caches_of(self._model) as new_cache:
            cache = new_cache(())
            cache.layers = [_late_layer(past, index) for index in range(past.held)]
            return self._run(tokens, cache, past.start)

    def _run(self, tokens: Array, cache: Any, start: int) -> Array:
        torch, transformers = torch_and_transformers()
        ids = torch.from_numpy(np.asarray(tokens, np.int64)[None])
        given: dict[str, Any] = {"position_ids": torch.arange(start, start + len(tokens))[None]} if "position_ids" in self._takes else {}
        if cache is None and not has_states(self._model.config):
            # One without a configuration keeps every position; an indexer's has a place for more.
            chooses = positions_chosen(self._model) is not None
            cache = transformers.DynamicCache(config=self._model.config if chooses else None)
        given |= {"use_cache": cache is not None, cache_argument(self._model): cache}
        with torch.no_grad(), quiet():
            mask = torch.ones(1, start + len(tokens), dtype=torch.long)
            out = self._model(input_ids=ids, attention_mask=mask, **given)
        return np.asarray(out.logits[0].float().numpy())


class Past(Protocol):
    """Keys and values [heads, start, width] of each layer, computed when they are asked for."""

    @property
    def start(self) -> int: ...
    @property
    def held(self) -> int: ...
    def layer(self, index: int) -> tuple[Array, Array]: ...


def _late_layer(past: Past, index: int) -> Any:
    """A layer of transformers' cache that has `past` in front, and keeps nothing."""
    torch, transformers = torch_and_transformers()

    base: Any = transformers.cache_utils.DynamicLayer

    class Late(base):  # type: ignore[misc]
        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> tuple[Any, Any]:
            key, value = (torch.from_numpy(each)[None] for each in past.layer(index))
            return torch.cat([key, key_states], -2), torch.cat([value, value_states], -2)

        def get_seq_length(self) -> int:
            return past.start

    return Late()


@dataclass(frozen=True)
class _DirectUse:
    """What transformers calls before and after a layer uses the weights of a module in it without calling that module: convolutions whose
    last inputs are a state. It looks for it under the name that accelerate's hooks have."""

    load: Callable[[Any], None]
    drop: Callable[[Any], None]

    def pre_forward(self, module: Any, *_: Any, **__: Any) -> None:
        self.load(module)

    def post_forward(self, module: Any, output: Any) -> Any:
        self.drop(module)
        return output


class _Loader:
    """Puts weights into a module that was built without any."""

    def __init__(self, module: Any, parameters: ModelParameters) -> None:
        self._module, self._parameters = module, parameters
        self._own: dict[Any, list[tuple[str, str]]] = {}
        for prefix, each in module.named_modules(remove_duplicate=True):
            names = [name for name, _ in each.named_parameters(recurse=False)]
            names += [name for name, _ in each.named_buffers(recurse=False) if f"{prefix}.{name}".lstrip(".") in parameters]
            if names:
                self._own[each] = [(name, f"{prefix}.{name}".lstrip(".")) for name in names]

    def load_all(self) -> None:
        for module in self._own:
            self._load(module)

    def hook(self) -> None:
        for module in self._own:
            module.register_forward_pre_hook(lambda each, _: self._load(each))
            module.register_forward_hook(lambda each, _, out: self._drop(each))
            module._hf_hook = _DirectUse(self._load, self._drop)

    def _load(self, module: Any) -> None:
        torch, _ = torch_and_transformers()
        for name, full in self._own[module]:
            if full not in self._parameters:
                continue  # a part that text never reaches: it fails by itself where it is used
            tensor = torch.from_numpy(np.require(self._parameters.read(full), requirements=("C", "W")))
            if name in module._buffers:
                module._buffers[name] = tensor
            else:
                module._parameters[name] = torch.nn.Parameter(tensor, requires_grad=False)

    def _drop(self, module: Any) -> None:
        for name, _ in self._own[module]:
            held = module._buffers if name in module._buffers else module._parameters
            held[name] = held[name].to("meta")
