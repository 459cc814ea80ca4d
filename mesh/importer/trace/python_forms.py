"""While a model is traced: what single families compute by Python's means, or for rows that the tokens choose, so that a graph can hold it.

A list as an index becomes a constant without a number on the device without memory; a comparison of sizes becomes a condition on them; a
loop over the experts that are in use has no fixed shape. Each stands here with what gives the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from mesh.importer.trace.library import torch_and_transformers

__all__ = ["python_forms"]


@contextmanager
def python_forms(module: Any) -> Iterator[None]:
    """Within the block, the parts of `module` compute what they compute in a form that can be traced."""
    with ExitStack() as stack:
        stack.enter_context(_one_as_a_slice())
        for each in module.modules():
            for name, function in _METHODS.get(type(each).__name__, {}).items():
                setattr(each, name, function.__get__(each))
                stack.callback(delattr, each, name)
            if type(each).__name__ == "XmodOutput":
                each.lang_adapter = partial(_adapter, each, str(module.config.default_language))
                stack.callback(delattr, each, "lang_adapter")
        for home in {type(each).__module__ for each in module.modules()}:
            for name, instead in _NAMES.get(home.rpartition(".")[2], {}).items():
                setattr(sys.modules[home], name, instead)
                stack.callback(delattr, sys.modules[home], name)
        yield


def _one_as_a_slice() -> Any:
    """A mode of torch in which x[..., [n], :] is x[..., n : n + 1, :]."""
    torch, _ = torch_and_transformers()
    base: Any = torch.overrides.TorchFunctionMode

    class Slices(base):  # type: ignore[misc]
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.Tensor.__getitem__:
                args = (args[0], _sliced(args[1]))
            return function(*args, **(kwargs or {}))

    return Slices()


def _sliced(index: Any) -> Any:
    parts = index if isinstance(index, tuple) else (index,)
    if not all(_alone(each) or each is None or each is ... or isinstance(each, int | slice) for each in parts):
        return index
    made = tuple(slice(each[0], each[0] + 1 or None) if _alone(each) else each for each in parts)
    return made if isinstance(index, tuple) else made[0]


def _alone(part: Any) -> bool:
    return isinstance(part, list) and len(part) == 1 and type(part[0]) is int


def _largest(*values: Any) -> Any:
    """`max` of a constant and a size without a condition on the size: whichever is larger in the sizes that are traced."""
    hints = [getattr(getattr(each, "node", None), "hint", each) for each in values]
    return values[hints.index(max(hints))]


def _rows_of(experts: Any, *names: str) -> Callable[[Any], Iterator[Any]]:
    """Of matrices that are stored one under the other: those of the experts with these numbers."""
    shape = (-1, experts.ffn_hidden_size, experts.hidden_size)
    return lambda chosen: (getattr(experts.mlp, name).view(shape)[chosen] for name in names)


def _dbrx_experts(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """hidden_states [B, T, D], top_k_index and top_k_weights [B T, k] -> [B, T, D]: each token's own experts, as batched products."""
    torch, _ = torch_and_transformers()
    gate, up, down = _rows_of(self, "w1", "v1", "w2")(top_k_index.reshape(-1))
    rows = hidden_states.reshape(-1, self.hidden_size).repeat_interleave(top_k_index.shape[-1], dim=0)
    inner = self.mlp.activation_fn(torch.bmm(gate, rows[..., None]).squeeze(-1)) * torch.bmm(up, rows[..., None]).squeeze(-1)
    out = torch.bmm(inner[:, None], down).squeeze(1) * top_k_weights.reshape(-1, 1)
    return out.view(*top_k_index.shape, self.hidden_size).sum(dim=1).view(hidden_states.shape)


def _longcat_experts(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any) -> Any:
    """hidden_states [N, D], top_k_index and top_k_weights [N, k] -> [N, D]. Experts from `num_routed_experts` on return their input."""
    torch, _ = torch_and_transformers()
    chosen = top_k_index.reshape(-1)
    real = chosen.clamp(max=self.num_routed_experts - 1)
    rows = hidden_states.repeat_interleave(top_k_index.shape[-1], dim=0)
    gate, up = torch.bmm(self.gate_up_proj[real], rows[..., None]).squeeze(-1).chunk(2, dim=-1)
    out = torch.bmm(self.down_proj[real], (self.act_fn(gate) * up)[..., None]).squeeze(-1)
    out = torch.where((chosen < self.num_routed_experts)[:, None], out, rows) * top_k_weights.reshape(-1, 1)
    return out.view(*top_k_index.shape, -1).sum(dim=1).to(hidden_states.dtype)


def _jetmoe_choice(router: Any, rows: Any) -> tuple[Any, Any]:
    """rows [N, D] -> each row's k experts, as numbers and as weights [N k]."""
    torch, _ = torch_and_transformers()
    logits, chosen = router.layer(rows).float().topk(router.top_k, dim=1)
    return chosen.reshape(-1), torch.softmax(logits, dim=1).type_as(rows).reshape(-1)


def _by_expert(experts: Any, chosen: Any, rows: Any) -> Any:
    """rows [N, D], each by the matrix of its own expert -> [N, O]."""
    torch, _ = torch_and_transformers()
    return torch.bmm(experts.weight[chosen], rows[..., None]).squeeze(-1)


def _jetmoe_experts(self: Any, layer_input: Any) -> Any:
    """[B, T, D] -> [B, T, D]: each token's own experts, as batched products."""
    rows = layer_input.reshape(-1, self.input_size)
    chosen, weights = _jetmoe_choice(self.router, rows)
    gate, up = _by_expert(self.input_linear, chosen, rows.repeat_interleave(self.router.top_k, dim=0)).chunk(2, dim=-1)
    out = _by_expert(self.output_linear, chosen, self.activation(gate) * up) * weights[:, None]
    return out.view(rows.shape[0], self.router.top_k, -1).sum(dim=1).view(layer_input.shape) + self.bias


def _jetmoe_attention(
    self: Any, hidden_states: Any, attention_mask: Any = None, position_embeddings: Any = None, cache: Any = None, **_: Any
) -> tuple[Any, None, None]:
    """[B, T, D] -> [B, T, D]: each token's own experts make its queries and its output. The k queries for one key stand side by side."""
    home, own, top = sys.modules[type(self).__module__], self.experts, self.top_k
    batch, count, _ = hidden_states.shape
    rows = hidden_states.reshape(-1, own.input_size)
    chosen, weights = _jetmoe_choice(own.router, rows)
    query = _by_expert(own.input_linear, chosen, rows.repeat_interleave(top, dim=0))
    query = query.view(batch, count, top, -1, self.head_dim).permute(0, 3, 2, 1, 4).flatten(1, 2)
    key, value = (x.view(batch, count, -1, self.head_dim).transpose(1, 2) for x in self.kv_proj(hidden_states).chunk(2, dim=-1))
    query, key = home.apply_rotary_pos_emb(query, key, *position_embeddings)
    if cache is not None:
        key, value = cache.update(key, value, self.layer_idx)
    key, value = (home.repeat_kv(x, top) for x in (key, value))
    out, _ = home.eager_attention_forward(self, query, key, value, attention_mask, scaling=self.scaling)
    out = out.view(batch, count, -1, top, self.head_dim).transpose(2, 3).reshape(-1, own.hidden_size)
    out = _by_expert(own.output_linear, chosen, out) * weights[:, None]
    return out.view(rows.shape[0], top, -1).sum(dim=1).view(hidden_states.shape) + own.bias, None, None


def _adapter(output: Any, language: str, lang_ids: Any, hidden_states: Any) -> Any:
    """[B, T, D] -> [B, T, D]: where all rows are of one language, its adapter alone."""
    residual = hidden_states
    if output.adapter_layer_norm is not None:
        hidden_states = output.adapter_layer_norm(hidden_states)
    elif output.adapter_reuse_layer_norm:
        hidden_states = output.LayerNorm(hidden_states)
    residual = hidden_states if output.ln_before_adapter else residual
    return output.adapter_modules[language](hidden_states) + residual


_METHODS: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "DbrxExperts": {"forward": _dbrx_experts},
    "JetMoeAttention": {"forward": _jetmoe_attention},
    "JetMoeMoE": {"forward": _jetmoe_experts},
    "LongcatFlashExperts": {"forward": _longcat_experts},
}
"""Methods of a class, by its name."""
_NAMES: Mapping[str, Mapping[str, Any]] = {"modeling_mpt": {"max": _largest}}
"""What a name means in a module of transformers, by the module's name."""
