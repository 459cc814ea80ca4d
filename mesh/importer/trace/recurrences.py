"""While a model is traced: what its layers with states compute in a form that a graph can hold.

The mask of padding is left out, because a block is given no padding where it has states.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from mesh.importer.trace.library import torch_and_transformers, torch_scan
from mesh.importer.trace.own_states import states_in_the_cache

__all__ = ["delta_rule", "recurrences", "selective_scan", "selective_states"]


@contextmanager
def recurrences(module: Any) -> Iterator[None]:
    """Within the block, the layers of `module` compute their recurrences in a form that can be traced."""
    before: list[Any] = []
    _, transformers = torch_and_transformers()
    in_place_of = {**_IN_PLACE_OF, _SCAN: partial(_scan_after, before), "MiniMaxCache": transformers.DynamicCache}
    homes = {name: sys.modules[name] for name in {type(each).__module__ for each in module.modules()} if name in sys.modules}
    replaced = [(home, name, getattr(home, name)) for home in homes.values() for name in in_place_of if hasattr(home, name)]
    scanning = {home.__name__ for home, name, _ in replaced if name == _SCAN}
    mixers = [each for each in module.modules() if type(each).__module__ in scanning and hasattr(each, "A_log")]
    hooks = [each.register_forward_pre_hook(partial(_note_state, before), with_kwargs=True) for each in mixers]
    for home, name, _ in replaced:
        setattr(home, name, in_place_of[name])
    try:
        with states_in_the_cache(module):
            yield
    finally:
        for home, name, own in replaced:
            setattr(home, name, own)
        for hook in hooks:
            hook.remove()


def _no_mask(*_: Any, **__: Any) -> None:
    return None


def _unmasked(hidden_states: Any, attention_mask: Any) -> Any:
    return hidden_states


def _note_state(before: list[Any], mixer: Any, _: Any, given: dict[str, Any]) -> None:
    """Put the state that a layer of Mamba 1 has before its tokens into `before`: that of each of its scans, in order."""
    cache = given["cache"]
    state = None if cache is None else cache.get_recurrent_state(mixer.layer_idx)
    before[:] = [] if state is None else state.unbind(1) if state.ndim == 4 else [state]


def _scan_after(before: list[Any], *args: Any, **given: Any) -> Any:
    """transformers' function has no argument for the state before its tokens: it begins with zeros."""
    return selective_scan(*args, initial_state=before.pop(0) if before else None, **given)


def delta_rule(
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
    """query, key [B, T, Hk, Dk], value [B, T, H, Dv], beta [B, T, H], g (logarithms of the decay) [B, T, H] or, one for each channel,
    [B, T, H, Dk], the state before [B, H, Dk, Dv] -> the output [B, T, H, Dv] and the state after. One token after the other; Hk divides
    H."""
    torch, scan = torch_and_transformers()[0], torch_scan()
    rows, heads, width = value.shape[0], value.shape[2], key.shape[3]
    q, k = (_of_each_head(x.float(), heads) for x in (query, key))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    decay = g.float().exp() if g.ndim == key.ndim else g.float().exp()[..., None]
    state = torch.zeros(rows, heads, width, value.shape[3]) if initial_state is None else initial_state.float()

    def step(state: Any, now: Any) -> tuple[Any, Any]:
        q, k, v, decay, beta = now
        state = state * decay[..., None]
        new = (v - (state * k[..., None]).sum(dim=-2)) * beta[..., None]
        state = state + k[..., None] * new[..., None, :]
        return state, (state * q[..., None]).sum(dim=-2)

    by_token = [x.transpose(0, 1) for x in (q * width**-0.5, k, value.float(), decay, beta.float())]
    state, out = scan(step, state, by_token)
    return out.transpose(0, 1).to(query.dtype), state


def _of_each_head(x: Any, heads: int) -> Any:
    """[B, T, Hk, D] -> [B, T, heads, D]: consecutive heads share one."""
    if x.shape[2] == heads:
        return x
    return x.unsqueeze(3).expand(-1, -1, -1, heads // x.shape[2], -1).flatten(2, 3)


def _step_sizes(dt: Any, bias: Any, softplus: bool) -> Any:
    torch, _ = torch_and_transformers()
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return torch.nn.functional.softplus(dt) if softplus else dt


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
    dt = _step_sizes(dt, dt_bias, dt_softplus)
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


def selective_scan(
    hidden_states: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    *_: Any,
    D: Any = None,
    z: Any = None,
    delta_bias: Any = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: Any = None,
    **__: Any,
) -> Any:
    """The recurrence of Mamba 1: x, dt and the gate z [B, I, T], A [I, N], D and the bias of dt [I], B and C [B, N, T], the state before
    [B, I, N] -> the output [B, I, T], and the state after if asked for. One token after the other."""
    torch, scan = torch_and_transformers()[0], torch_scan()
    x = hidden_states.float()
    dt = _step_sizes(dt, None if delta_bias is None else delta_bias[..., None], delta_softplus).float()
    state = torch.zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.float().contiguous()

    def step(carried: Any, now: Any) -> tuple[Any, Any]:
        (state, rates), (x, dt, b, c) = carried, now
        state = state * (rates * dt[..., None]).exp() + x[..., None] * b[..., None, :]
        return (state, rates.clone()), (state * c[..., None, :]).sum(dim=-1)

    # The rates are carried too: the loop of a block knows no value of the graph around it, and exp(A * dt) of all tokens would be large.
    (state, _), out = scan(step, (state, A.float()), [each.movedim(-1, 0) for each in (x * dt, dt, B.float(), C.float())])
    out = out.movedim(0, -1)
    out = out if D is None else out + x * D[:, None]
    out = out if z is None else out * torch.nn.functional.silu(z)
    return (out, state) if return_last_state else out


_SCAN = "mamba_selective_scan"
_IN_PLACE_OF = {
    "create_recurrent_attention_mask": _no_mask,
    "apply_mask_to_padding_states": _unmasked,
    "torch_chunk_gated_delta_rule": delta_rule,
    "chunk_kimi_delta_attention": delta_rule,
    "mamba2_chunk_scan": selective_states,
}
