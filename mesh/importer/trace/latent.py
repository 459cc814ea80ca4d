"""Multi-head latent attention, traced so that its cache is a list of keys and values.

transformers keeps what the keys and values of these layers are made of (their latents), and makes all keys and values anew in each step. A
block of ours has a cache of keys and values. So while a model is traced, the latents of the new tokens alone are expanded, and what they
expand to is joined to the cache. The numbers are the same; the cache is larger.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mesh.importer.trace.attention_forms import attention_forms
from mesh.importer.trace.indexers import every_position
from mesh.importer.trace.library import torch_and_transformers
from mesh.importer.trace.states import LayerKeeps, filled_layers, fresh_layers

__all__ = ["caches_of"]

_EXPAND = "expand_kv"
"""The method that makes keys and values of latents, in every such attention of transformers."""


@contextmanager
def caches_of(module: Any) -> Iterator[Callable[..., Any]]:
    """What makes the cache for a step of `module` from (key, value) of each layer's past; nothing for an empty one. Where layers have
    states, it takes these too, and what each layer keeps (states.py). A cache is used for one step, and only within the block."""
    with every_position(module), attention_forms(module), _caches_of(module) as new_cache:
        yield new_cache


@contextmanager
def _caches_of(module: Any) -> Iterator[Callable[..., Any]]:
    _, transformers = torch_and_transformers()
    latent = {each.layer_idx: each for each in module.modules() if callable(getattr(each, _EXPAND, None))}
    base: Any = transformers.DynamicCache

    class Expanded(base):  # type: ignore[misc]
        """Latents pass; what they expand to is kept."""

        def update(self, keys: Any, values: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            return (keys, values) if layer_idx in latent else super().update(keys, values, layer_idx, *args, **kwargs)

        def join(self, keys: Any, values: Any, layer_idx: int) -> Any:
            return super().update(keys, values, layer_idx)

    of_this_step: list[Expanded] = []

    def make(past: Iterable[Any], states: Iterable[Any] = (), kept: Sequence[LayerKeeps] | None = None) -> Any:
        layers = fresh_layers(module.config) if kept is None else filled_layers(module.config, past, states, kept)
        cache = Expanded(ddp_cache_data=None if layers else list(past) or None)
        if layers:
            cache.layers = layers
        of_this_step[:] = [cache]
        return cache

    for index, attention in latent.items():
        setattr(attention, _EXPAND, _joined(getattr(attention, _EXPAND), index, of_this_step))
    try:
        yield make
    finally:
        for attention in latent.values():
            delattr(attention, _EXPAND)


def _joined(expand: Callable[..., Any], layer_idx: int, of_this_step: list[Any]) -> Callable[..., Any]:
    return lambda *latents: of_this_step[0].join(*expand(*latents), layer_idx)
