"""RNN, LSTM and GRU, as ONNX lays them out.

X [T, B, I] (layout 1: [B, T, I]); weights [directions, gates * H, ...]; Y [T, directions, B, H] (layout 1: [B, T, directions, H]).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.errors import UnsupportedModel
from mesh.lowering.op_helpers import Array
from mesh.lowering.registry import register

_Cell = Callable[[Array, list[Array], dict[str, Array], list[Any]], list[Array]]

_ACTIVATIONS: dict[str, Callable[..., Array]] = {
    "Affine": lambda x, alpha=1.0, beta=0.0: alpha * x + beta,
    "Elu": lambda x, alpha=1.0, beta=None: jax.nn.elu(x, alpha),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: jnp.clip(alpha * x + beta, 0, 1),
    "LeakyRelu": lambda x, alpha=0.01, beta=None: jnp.where(x < 0, alpha * x, x),
    "Relu": lambda x, alpha=None, beta=None: jax.nn.relu(x),
    "ScaledTanh": lambda x, alpha=1.0, beta=1.0: alpha * jnp.tanh(beta * x),
    "Sigmoid": lambda x, alpha=None, beta=None: jax.nn.sigmoid(x),
    "Softplus": lambda x, alpha=None, beta=None: jax.nn.softplus(x),
    "Softsign": lambda x, alpha=None, beta=None: jax.nn.soft_sign(x),
    "Tanh": lambda x, alpha=None, beta=None: jnp.tanh(x),
    "ThresholdedRelu": lambda x, alpha=1.0, beta=None: jnp.where(x > alpha, x, 0),
}


def _activations(
    names: Sequence[str] | None, default: Sequence[str], directions: int, alpha: Sequence[float] | None, beta: Sequence[float] | None
) -> list[list[Any]]:
    """For each direction its functions. Alphas and betas are given in order to the functions that take them."""
    chosen = list(names or [*default] * directions)
    alphas, betas = iter(alpha or ()), iter(beta or ())
    functions = []
    for name in chosen:
        function = {key.lower(): value for key, value in _ACTIVATIONS.items()}.get(name.lower())
        if function is None:
            raise UnsupportedModel(f"activation {name} is not known")
        parameters = {}
        if name in ("Affine", "Elu", "HardSigmoid", "LeakyRelu", "ScaledTanh", "ThresholdedRelu") and (a := next(alphas, None)) is not None:
            parameters["alpha"] = a
        if name in ("Affine", "HardSigmoid", "ScaledTanh") and (b := next(betas, None)) is not None:
            parameters["beta"] = b
        functions.append((lambda x, function=function, parameters=parameters: function(x, **parameters)))
    per = len(default)
    return [functions[i * per : (i + 1) * per] for i in range(directions)]


def _run(
    cell: _Cell, X: Array, lens: Array | None, initial: list[Array], weights: dict[str, Array], functions: list[list[Any]], direction: str,
    layout: int, clip: float | None,
) -> tuple[Array, list[Array]]:  # fmt: skip
    """All outputs of the first state, and the last states [directions, B, H], in ONNX's layout."""
    x = jnp.swapaxes(X, 0, 1) if layout else X  # [T, B, I]
    initial = [jnp.swapaxes(state, 0, 1) if layout else state for state in initial]
    steps = np.arange(x.shape[0])
    sequences, finals = [], []
    for d in range(len(functions)):
        backward = direction == "reverse" or d == 1
        own = {name: value[d] for name, value in weights.items()}
        limit = None if lens is None else lens[:, None]

        def step(
            states: list[Array], now: tuple[Array, Array], own: dict[str, Array] = own, d: int = d, limit: Array | None = limit
        ) -> tuple[list[Array], Array]:
            item, index = now
            new = cell(item, states, own, functions[d])
            if limit is None:
                return new, new[0]
            live = index < limit
            return [jnp.where(live, a, b) for a, b in zip(new, states, strict=True)], jnp.where(live, new[0], 0)

        # Backward: padded steps come first and leave the state as it is, so every row starts at its own last item.
        final, y = jax.lax.scan(step, [state[d] for state in initial], (x, steps), reverse=backward)
        sequences.append(y)
        finals.append(final)
    y = jnp.stack(sequences, 1)  # [T, directions, B, H]
    last = [jnp.stack(items) for items in zip(*finals, strict=True)]
    if layout:
        return y.transpose(2, 0, 1, 3), [jnp.swapaxes(state, 0, 1) for state in last]
    return y, last


def _clipped(x: Array, clip: float | None) -> Array:
    return x if clip is None else jnp.clip(x, -clip, clip)


def _prepared(
    X: Array, W: Array, R: Array, B: Array | None, states: list[Array | None], hidden: int, layout: int
) -> tuple[dict[str, Array], list[Array]]:
    directions, rows = W.shape[0], X.shape[0] if layout else X.shape[1]
    size = R.shape[1]
    bias = jnp.zeros((directions, 2 * size), X.dtype) if B is None else B
    shape = (rows, directions, hidden) if layout else (directions, rows, hidden)
    given = [jnp.zeros(shape, X.dtype) if state is None else state for state in states]
    return {"w": W, "r": R, "wb": bias[:, :size], "rb": bias[:, size:]}, given


_DIRECTIONS = {"direction": ("forward", "reverse", "bidirectional")}


@register(since=7, allowed=_DIRECTIONS)
def RNN(
    X: Array, W: Array, R: Array, B: Array | None = None, sequence_lens: Array | None = None, initial_h: Array | None = None,
    *, hidden_size: int | None = None, activation_alpha: Sequence[float] | None = None, activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None, clip: float | None = None, direction: str = "forward", layout: int = 0,
) -> tuple[Array, Array]:  # fmt: skip
    weights, initial = _prepared(X, W, R, B, [initial_h], R.shape[2], layout)
    functions = _activations(activations, ("Tanh",), W.shape[0], activation_alpha, activation_beta)

    def cell(x: Array, states: list[Array], own: dict[str, Array], f: list[Any]) -> list[Array]:
        return [f[0](_clipped(x @ own["w"].T + states[0] @ own["r"].T + own["wb"] + own["rb"], clip))]

    y, (h,) = _run(cell, X, sequence_lens, initial, weights, functions, direction, layout, clip)
    return y, h


@register(since=7, allowed=_DIRECTIONS)
def GRU(
    X: Array, W: Array, R: Array, B: Array | None = None, sequence_lens: Array | None = None, initial_h: Array | None = None,
    *, hidden_size: int | None = None, activation_alpha: Sequence[float] | None = None, activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None, clip: float | None = None, direction: str = "forward", layout: int = 0,
    linear_before_reset: int = 0,
) -> tuple[Array, Array]:  # fmt: skip
    """Gates in the order update, reset, hidden."""
    weights, initial = _prepared(X, W, R, B, [initial_h], R.shape[2], layout)
    functions = _activations(activations, ("Sigmoid", "Tanh"), W.shape[0], activation_alpha, activation_beta)

    def cell(x: Array, states: list[Array], own: dict[str, Array], f: list[Any]) -> list[Array]:
        h = states[0]
        wz, wr, wh = jnp.split(x @ own["w"].T + own["wb"], 3, axis=-1)
        rz, rr, rh = jnp.split(own["r"], 3)
        bz, br, bh = jnp.split(own["rb"], 3)
        z = f[0](_clipped(wz + h @ rz.T + bz, clip))
        r = f[0](_clipped(wr + h @ rr.T + br, clip))
        inner = r * (h @ rh.T + bh) if linear_before_reset else (r * h) @ rh.T + bh
        return [(1 - z) * f[1](_clipped(wh + inner, clip)) + z * h]

    y, (h,) = _run(cell, X, sequence_lens, initial, weights, functions, direction, layout, clip)
    return y, h


@register(since=7, allowed=_DIRECTIONS)
def LSTM(
    X: Array, W: Array, R: Array, B: Array | None = None, sequence_lens: Array | None = None, initial_h: Array | None = None,
    initial_c: Array | None = None, P: Array | None = None, *, hidden_size: int | None = None,
    activation_alpha: Sequence[float] | None = None, activation_beta: Sequence[float] | None = None,
    activations: Sequence[str] | None = None, clip: float | None = None, direction: str = "forward", input_forget: int = 0, layout: int = 0,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Gates in the order input, output, forget, cell; peepholes P [directions, 3 * H] in the order input, output, forget."""
    weights, initial = _prepared(X, W, R, B, [initial_h, initial_c], R.shape[2], layout)
    weights["p"] = jnp.zeros((W.shape[0], 3 * R.shape[2]), X.dtype) if P is None else P
    functions = _activations(activations, ("Sigmoid", "Tanh", "Tanh"), W.shape[0], activation_alpha, activation_beta)

    def cell(x: Array, states: list[Array], own: dict[str, Array], f: list[Any]) -> list[Array]:
        h, c = states
        i, o, forget, new = jnp.split(x @ own["w"].T + h @ own["r"].T + own["wb"] + own["rb"], 4, axis=-1)
        pi, po, pf = jnp.split(own["p"], 3)
        i = f[0](_clipped(i + pi * c, clip))
        forget = 1 - i if input_forget else f[0](_clipped(forget + pf * c, clip))
        c = forget * c + i * f[1](_clipped(new, clip))
        return [f[0](_clipped(o + po * c, clip)) * f[2](c), c]

    y, (h, c) = _run(cell, X, sequence_lens, initial, weights, functions, direction, layout, clip)
    return y, h, c
