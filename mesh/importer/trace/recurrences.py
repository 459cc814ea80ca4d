"""While a model is traced: what its layers with states compute in a form that a graph can hold.

The mask of padding is left out, because a block is given no padding where it has states.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mesh.importer.trace.library import torch_and_transformers, torch_scan

__all__ = ["recurrences", "selective_states"]


@contextmanager
def recurrences(module: Any) -> Iterator[None]:
    """Within the block, the layers of `module` compute their recurrences in a form that can be traced."""
    homes = {name: sys.modules[name] for name in {type(each).__module__ for each in module.modules()} if name in sys.modules}
    replaced = [(home, name, getattr(home, name)) for home in homes.values() for name in _IN_PLACE_OF if hasattr(home, name)]
    for home, name, _ in replaced:
        setattr(home, name, _IN_PLACE_OF[name])
    try:
        yield
    finally:
        for home, name, own in replaced:
            setattr(home, name, own)


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _gated_delta_rule(
    query: Any,
    key: Any,
    value: Any,
    g: Any,
    beta: Any,
    *_: Any,
    initial_state: Any = None,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> tuple[Any, Any]:
    """query, key [B, T, Hk, Dk], value [B, T, H, Dv], g (logarithms of the decay) and beta [B, T, H], the state before [B, H, Dk, Dv] ->
    the output [B, T, H, Dv] and the state after. One token after the other; Hk divides H."""
    torch, scan = torch_and_transformers()[0], torch_scan()
    rows, heads, width = value.shape[0], value.shape[2], key.shape[3]
    q, k = (_of_each_head(x.float(), heads) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    state = torch.zeros(rows, heads, width, value.shape[3]) if initial_state is None else initial_state.float()

    def step(state: Any, now: Any) -> tuple[Any, Any]:
        q, k, v, decay, beta = now
        state = state * decay[..., None, None]
        new = (v - (state * k[..., None]).sum(dim=-2)) * beta[..., None]
        state = state + k[..., None] * new[..., None, :]
        return state, (state * q[..., None]).sum(dim=-2)

    by_token = [x.transpose(0, 1) for x in (q * width**-0.5, k, value.float(), g.float().exp(), beta.float())]
    state, out = scan(step, state, by_token)
    return out.transpose(0, 1).to(query.dtype), state


def _of_each_head(x: Any, heads: int) -> Any:
    """[B, T, Hk, D] -> [B, T, heads, D]: consecutive heads share one."""
    if x.shape[2] == heads:
        return x
    return x.unsqueeze(3).expand(-1, -1, -1, heads // x.shape[2], -1).flatten(2, 3)


def selective_states(
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    *_: Any,
    D: Any = None,
    dt_bias: Any = None,
    initial_states: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **__: Any,
) -> Any:
    """The recurrence of Mamba 2: x [B, T, H, P], dt [B, T, H], A and D [H], B and C [B, T, G, N], the state before [B, H, P, N] -> the
    output [B, T, H, P], and the state after if asked for. One token after the other; G divides H."""
    torch, scan = torch_and_transformers()[0], torch_scan()
    x = hidden_states.float()
    rows, heads, width = x.shape[0], x.shape[2], x.shape[3]
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = torch.nn.functional.softplus(dt) if dt_softplus else dt
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    b, c = (_of_each_head(each.float(), heads) for each in (B, C))
    state = torch.zeros(rows, heads, width, b.shape[3]) if initial_states is None else initial_states.float()

    def step(state: Any, now: Any) -> tuple[Any, Any]:
        x, decay, b, c = now
        state = state * decay[..., None, None] + x[..., None] * b[..., None, :]
        return state, (state * c[..., None, :]).sum(dim=-1)

    dt = dt.float()
    by_token = [each.transpose(0, 1) for each in (x * dt[..., None], (A.float() * dt).exp(), b, c)]
    state, out = scan(step, state, by_token)
    out = out.transpose(0, 1)
    out = out if D is None else out + x * D[..., None]
    return (out, state) if return_final_states else out


_IN_PLACE_OF = {
    "create_recurrent_attention_mask": _no_mask,
    "torch_chunk_gated_delta_rule": _gated_delta_rule,
    "mamba2_chunk_scan": selective_states,
}
