"""Attention of single families in the form of softmax(q @ k.T) @ v over one list of keys and values.

    doge         adds to each score a number that is made of the position's values: the key has it as one more element, the query a 1 there
    diffllama    attends twice with the same scores, once for each half of the heads' values: the values of two heads are one

The numbers are the same; the cache is larger. Both forms are those of what a layer keeps, so the model's own logits after made-up keys and
values (reference.py) are computed with them too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from mesh.importer.trace.library import torch_and_transformers

__all__ = ["attention_forms", "positions_kept"]

_KEEPS: Final = "keep_window_size"


def positions_kept(module: Any) -> int | None:
    """Up to how many positions the attention of `module` reads all of them, where it hides those with the lowest scores beyond."""
    return min((getattr(each, _KEEPS) for each in module.modules() if isinstance(getattr(each, _KEEPS, None), int)), default=None)


@contextmanager
def attention_forms(module: Any) -> Iterator[None]:
    """Within the block, the attention layers of `module` compute and keep what they do in the form above."""
    found = [(each, _FORWARD[kind]) for each in module.modules() if (kind := type(each).__name__) in _FORWARD]
    for each, forward in found:
        each.forward = forward.__get__(each)
    try:
        yield
    finally:
        for each, _ in found:
            del each.forward


def _heads(attention: Any, x: Any) -> Any:
    """[B, T, H D] -> [B, T, H, D]"""
    return x.view(*x.shape[:-1], -1, attention.head_dim)


def _attend(attention: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """query [B, H, T, Dk], key [B, Hk, S, Dk], value [B, Hk, S, Dv] -> [B, T, H, Dv], by the family's own function."""
    own = sys.modules[type(attention).__module__].eager_attention_forward
    return own(attention, query, key, value, mask, dropout=0.0, scaling=attention.scaling)[0]


def _rotated(attention: Any, query: Any, key: Any, positions: Any) -> Any:
    return sys.modules[type(attention).__module__].apply_rotary_pos_emb(query, key, *positions)


def _doge(
    self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, cache: Any = None, **_: Any
) -> tuple[Any, None]:
    """Hidden states [B, T, D] -> [B, T, D], as DogeAttention.forward computes them up to `keep_window_size` positions."""
    torch, _ = torch_and_transformers()
    query = self.q_norm(_heads(self, self.q_proj(hidden_states))).transpose(1, 2)
    key = self.k_norm(_heads(self, self.k_proj(hidden_states))).transpose(1, 2)
    values = self.v_proj(hidden_states)
    query, key = _rotated(self, query, key, position_embeddings)
    added = torch.exp(self.A * torch.nn.functional.softplus(self.dt_proj(values))).transpose(1, 2)[..., None] / self.scaling
    query, key = torch.cat([query, torch.ones_like(query[..., :1])], dim=-1), torch.cat([key, added], dim=-1)
    value = _heads(self, values).transpose(1, 2)
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    out = _attend(self, query, key, value, attention_mask)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def _diffllama(
    self: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any = None, cache: Any = None, **_: Any
) -> tuple[Any, None]:
    """Hidden states [B, T, D] -> [B, T, D], as DiffLlamaAttention.forward computes them."""
    torch, _ = torch_and_transformers()
    query, key, value = (_heads(self, each(hidden_states)).transpose(1, 2) for each in (self.q_proj, self.k_proj, self.v_proj))
    query, key = _rotated(self, query, key, position_embeddings)
    value = torch.cat(value.chunk(2, dim=1), dim=-1).repeat(1, 2, 1, 1)  # key head n and key head n + Hk/2 have the values of both
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    first, second = _attend(self, query, key, value, attention_mask).chunk(2, dim=2)
    factors = ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
    plus, minus = (torch.exp((q * k).sum(dim=-1, dtype=torch.float32)).to(query.dtype) for q, k in factors)
    out = (1 - self.lambda_init) * self.groupnorm(first - (plus - minus + self.lambda_init) * second)
    return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


_FORWARD: Mapping[str, Callable[..., Any]] = {"DogeAttention": _doge, "DiffLlamaAttention": _diffllama}
"""The forward of a class, by its name."""
