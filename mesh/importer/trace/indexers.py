"""Attention that an indexer makes sparse: up to as many positions as it chooses, it chooses all of them.

Such a layer keeps a key of its indexer for each position beside those of its attention, and attends to the `index_topk` positions that
these give the highest scores. A block has no place for a third list of positions. So the model is traced without its indexers, and its
context ends where they would begin to leave positions out: up to there the numbers are the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mesh.importer.trace.library import torch_and_transformers

__all__ = ["INDEXED", "every_position", "positions_chosen"]

INDEXED = "indexed_attention"
"""How `layer_types` names such layers."""
_CHOOSES, _POOLS, _MASK = "index_topk", "index_kpool", "attention_mask"  # one that pools chooses groups, of which some may be cut off


def positions_chosen(module: Any) -> int | None:
    """How many positions the indexers of `module` choose; None where it has none of this form."""
    return min((getattr(each, _CHOOSES) for each in _indexers(module)), default=None)


def _indexers(module: Any) -> Iterator[Any]:
    for each in module.modules():
        named = type(each).__name__.endswith("Indexer") and isinstance(getattr(each, _CHOOSES, None), int)
        if named and not hasattr(each, _POOLS) and _MASK in inspect.signature(type(each).forward).parameters:
            yield each


@contextmanager
def every_position(module: Any) -> Iterator[None]:
    """Within the block, the indexers of `module` choose every position, and keep nothing."""
    found = list(_indexers(module))
    for each in found:
        each.forward = _all_of(each)
    try:
        yield
    finally:
        for each in found:
            del each.forward


def _all_of(indexer: Any) -> Callable[..., Any]:
    """What gives all positions for each token, int64 [B, T, S], of a mask [B, T, S]."""
    torch, _ = torch_and_transformers()
    takes = inspect.signature(type(indexer).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = takes.bind(indexer, *args, **kwargs).arguments
        rows, chunk = given["hidden_states"].shape[:2]
        mask = given[_MASK]
        return torch.arange(mask.shape[-1], device=mask.device).expand(rows, chunk, -1)

    return forward
