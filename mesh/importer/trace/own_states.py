"""Families of transformers that keep states in their modules, or in a cache of their own: while they are traced, they use the one cache
that states.py makes.

    recurrent_gemma    each recurrent block holds the last inputs of its convolution, and the state of its recurrence
    minimax            each lightning attention has a matrix of keys and values in a cache that no other family has
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from mesh.importer.trace.library import torch_and_transformers, torch_scan

__all__ = ["lightning_attention", "linear_recurrence", "states_in_the_cache"]


@contextmanager
def states_in_the_cache(module: Any) -> Iterator[None]:
    """Within the block, every layer of `module` reads its states from the cache that it is given, and writes them there."""
    own = list(_forwards(module))
    for part, name, function in own:
        setattr(part, name, function)
    try:
        yield
    finally:
        for part, name, _ in own:
            delattr(part, name)


def _forwards(module: Any) -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """What is put in place of which method of which part of `module`."""
    for path, part in module.named_modules():
        kind = type(part).__name__
        if kind == "RecurrentGemmaRecurrentBlock":
            layer = next(int(name) for name in path.split(".") if name.isdigit())
            yield part, "forward", partial(_recurrent_block, part, layer)
        elif kind == "RecurrentGemmaRglru":
            yield part, "_rnn_scan", _rnn_scan
        elif kind == "MiniMaxLightningAttention":
            yield part, "forward", partial(_lightning_layer, part)


def _recurrent_block(
    block: Any, layer: int, input_states: Any, position_ids: Any, attention_mask: Any, *_: Any, cache: Any, **__: Any
) -> tuple[Any, None]:
    """Hidden states [B, T, D] -> [B, T, D], as RecurrentGemmaRecurrentBlock.forward computes them."""
    count, lru = input_states.shape[1], block.rg_lru
    x = cache.update_conv_state(block.linear_x(input_states).transpose(1, 2), layer, conv_kernel_size=block.conv1d_width - 1)
    x = block.conv_1d(x)[..., : x.shape[-1]][..., -count:]
    lru.recurrent_states = cache.get_recurrent_state(layer)
    x = lru(x.transpose(1, 2), position_ids)
    cache.update_recurrent_state(lru.recurrent_states, layer)
    lru.recurrent_states = None
    return block.linear_out(x * block.act_fn(block.linear_y(input_states))), None


def _rnn_scan(hidden_states: Any, recurrent_gate: Any, reset: Any, recurrent_states: Any, **_: Any) -> tuple[Any, Any]:
    return linear_recurrence(hidden_states, recurrent_gate * ~reset, recurrent_states)


def linear_recurrence(x: Any, gate: Any, state: Any = None) -> tuple[Any, Any]:
    """x and gate [B, T, D], the state before [B, D] -> the state after each token [B, T, D], and that after all."""
    torch, scan = torch_and_transformers()[0], torch_scan()
    state = torch.zeros(x.shape[0], x.shape[2]) if state is None else state.float()

    def step(state: Any, now: Any) -> tuple[Any, Any]:
        x, gate = now
        state = gate * state + x
        return state, state[..., None].clone()  # a loop of ONNX hands on two values: the same one twice has one name

    state, out = scan(step, state, [each.float().transpose(0, 1) for each in (x, gate)])
    return out.squeeze(-1).transpose(0, 1).to(x.dtype), state


def _lightning_layer(
    attention: Any, hidden_states: Any, position_embeddings: Any, attention_mask: Any, cache: Any = None, **_: Any
) -> tuple[Any, Any]:
    """Hidden states [B, T, D] -> [B, T, D], as MiniMaxLightningAttention.forward computes them."""
    torch, _ = torch_and_transformers()
    rows, count, _ = hidden_states.shape
    heads, width = attention.num_attention_heads, attention.head_dim
    qkv = attention.act_fn(attention.qkv_proj(hidden_states)).reshape(rows, count, heads, 3 * width)
    q, k, v = torch.split(qkv, width, dim=3)
    decay = torch.exp(-attention.slope_rate).reshape(heads)
    out, state = lightning_attention(q, k, v, decay, cache.get_recurrent_state(attention.layer_idx))
    cache.update_recurrent_state(state, attention.layer_idx)
    out = attention.norm(out.reshape(rows, count, heads * width))
    return attention.out_proj(torch.sigmoid(attention.output_gate(hidden_states)) * out), state


def lightning_attention(q: Any, k: Any, v: Any, decay: Any, state: Any = None) -> tuple[Any, Any]:
    """q, k [B, T, H, Dk], v [B, T, H, Dv], decay [H], the state before [B, H, Dk, Dv] -> the output [B, T, H, Dv] and the state after."""
    torch, scan = torch_and_transformers()[0], torch_scan()
    rows, _, heads, width = k.shape
    state = torch.zeros(rows, heads, width, v.shape[3]) if state is None else state.float()

    def step(carried: Any, now: Any) -> tuple[Any, Any]:
        (state, decay), (q, k, v) = carried, now
        state = state * decay[..., None, None] + k[..., None] * v[..., None, :]
        return (state, decay.clone()), (state * q[..., None]).sum(dim=-2)

    # The decay is carried too: the loop of a block knows no value of the graph around it.
    (state, _), out = scan(step, (state, decay.float()), [each.float().transpose(0, 1) for each in (q, k, v)])
    return out.transpose(0, 1).to(v.dtype), state
