"""The cache of a traced step where some layers keep a state of fixed size and not, or not only, a list of positions.

transformers writes such states in place and begins without any. A block takes the states before its tokens and gives those after them, and
the state before position 0 is zeros. So the layers of the cache here have states from the start, and hold new tensors in place of the old.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from mesh.importer.trace.library import torch_and_transformers

__all__ = ["LayerKeeps", "StateKept", "cache_argument", "filled_layers", "fresh_layers", "has_states", "kept_by", "states_of"]

Shape = tuple[int, ...]
_HELD_IN: Final = ("conv_states", "recurrent_states")


class StateKept(NamedTuple):
    """One state of a layer: in which of the layer's dicts it is, under which number, and its shape without the batch."""

    held_in: str
    number: int
    shape: Shape


@dataclass(frozen=True, slots=True)
class LayerKeeps:
    """What one layer of transformers keeps of a row. attention: heads, key width and value width; None: no keys and values."""

    attention: tuple[int, int, int] | None
    states: tuple[StateKept, ...] = ()

    @property
    def anything(self) -> bool:
        return self.attention is not None or bool(self.states)


def cache_argument(module: Any) -> str:
    """What `module` calls the cache that it is given."""
    return "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"


def fresh_layers(config: Any) -> list[Any] | None:
    """Empty layers of a cache for the model that `config` describes, which keep every position; None where all of them are attention."""
    _, transformers = torch_and_transformers()
    library = transformers.cache_utils
    try:
        own = transformers.DynamicCache(config=config).layers
    except (AttributeError, KeyError, TypeError, ValueError):  # a configuration whose layers the library has no cache for
        return None
    if not any(isinstance(layer, library.LinearAttentionCacheLayerMixin) for layer in own):
        return None
    return [_whole(library, layer) for layer in own]


def _whole(library: Any, layer: Any) -> Any:
    """A layer like `layer` that keeps every position, where that keeps the last ones only."""
    if not isinstance(layer, library.CacheLayerMixin):
        return layer
    if isinstance(layer, library.LinearAttentionCacheLayerMixin):
        return library.LinearAttentionAndFullAttentionLayer(number_of_states=layer.number_of_states)
    return library.DynamicLayer() if type(layer) is library.DynamicSlidingWindowLayer else layer


def has_states(config: Any) -> bool:
    """Whether some layer of the model keeps a state."""
    return fresh_layers(config) is not None


def states_of(layer: Any, kept: LayerKeeps) -> list[Any]:
    """The states that a layer of a cache has by now."""
    return [getattr(layer, each.held_in)[each.number] for each in kept.states]


def kept_by(layer: Any) -> LayerKeeps:
    """What `layer` keeps after a step."""
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    attention = None if keys is None or values is None else (keys.shape[1], keys.shape[3], values.shape[3])
    states = [
        StateKept(held_in, number, tuple(map(int, state.shape[1:])))
        for held_in in _HELD_IN
        for number, state in getattr(layer, held_in, {}).items()
        if state is not None
    ]
    return LayerKeeps(attention, tuple(states))


def filled_layers(config: Any, past: Iterable[Any], states: Iterable[Any], kept: Sequence[LayerKeeps]) -> list[Any]:
    """The layers of the cache for one step of a model whose layers keep `kept`: `past` has the key and the value of each that attends,
    `states` the states of all."""
    fresh = fresh_layers(config)
    assert fresh is not None
    pairs, tensors = iter(past), iter(states)
    layers = []
    for layer, own in zip(fresh, kept, strict=True):
        if own.states:
            layer = _carrying(layer, own, tensors)
        if own.attention is not None:
            layer.update(*next(pairs))
        layers.append(layer)
    return layers


def _carrying(layer: Any, kept: LayerKeeps, states: Iterator[Any]) -> Any:
    """A layer like `layer` with the next of `states` before the step."""
    torch, _ = torch_and_transformers()
    base: Any = type(layer)

    class Carrying(base):  # type: ignore[misc]
        def update_conv_state(self, conv_states: Any, state_idx: int = 0, **_: Any) -> Any:
            before = self.conv_states[state_idx]
            whole = torch.cat([before, conv_states], dim=-1)
            self.conv_states[state_idx] = whole[..., -before.shape[-1] :]
            return whole

        def update_recurrent_state(self, recurrent_states: Any, state_idx: int = 0, **_: Any) -> Any:
            self.recurrent_states[state_idx] = recurrent_states
            return recurrent_states

    own = Carrying(number_of_states=layer.number_of_states)
    for each in kept.states:
        getattr(own, each.held_in)[each.number] = next(states)
        getattr(own, f"is_{each.held_in}_initialized")[each.number] = True
        if each.held_in == "conv_states":
            own.conv_kernel_size[each.number] = each.shape[-1]
    own.has_previous_state = dict.fromkeys(range(layer.number_of_states), True)
    return own
