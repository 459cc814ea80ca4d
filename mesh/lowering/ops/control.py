"""The control-flow ops. A condition or a trip count must be known when the graph is compiled; the branch or the loop is then unrolled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.errors import UnsupportedModel
from mesh.lowering.op_helpers import Array, array_namespace, positive_axis
from mesh.lowering.registry import register
from mesh.lowering.static import is_traced

_MOST_UNROLLED = 4096


@register(static=(0,))
def If(cond: Array, *, then_branch: Any, else_branch: Any, scope: Any) -> tuple[Array, ...]:
    return tuple(scope.run(then_branch if bool(np.asarray(cond).reshape(())) else else_branch, []))


@register(static=(0, 1))
def Loop(M: Array | None, cond: Array | None, *v_initial: Array, body: Any, scope: Any) -> tuple[Array, ...]:
    """Unrolled: trip count and condition are known. Scan outputs are stacked along a new first axis."""
    state, collected = list(v_initial), []
    trips = _MOST_UNROLLED + 1 if M is None else int(np.asarray(M).reshape(()))
    going = cond is None or bool(np.asarray(cond).reshape(()))
    step = 0
    while going and step < trips:
        if step == _MOST_UNROLLED:
            raise UnsupportedModel(f"a loop of more than {_MOST_UNROLLED} steps")
        results = scope.run(body, [np.asarray(step, np.int64), np.asarray(True), *state])
        if is_traced(results[0]):
            raise UnsupportedModel("the loop's condition is computed from run-time values")
        going = bool(np.asarray(results[0]).reshape(()))
        state = results[1 : 1 + len(v_initial)]
        collected.append(results[1 + len(v_initial) :])
        step += 1
    if not collected and len(body.outputs) > 1 + len(v_initial):
        raise UnsupportedModel("a loop of no steps with scan outputs")
    return (*state, *(array_namespace(*items).stack(items) for items in zip(*collected, strict=True)))


@register(since=9)
def Scan(
    *initial_state_and_scan_inputs: Array, body: Any, num_scan_inputs: int,
    scan_input_axes: Sequence[int] = (), scan_input_directions: Sequence[int] = (),
    scan_output_axes: Sequence[int] = (), scan_output_directions: Sequence[int] = (), scope: Any,
) -> tuple[Array, ...]:  # fmt: skip
    """lax.scan over the first axes, after what is scanned has been moved there and reversed as asked."""
    values = [jnp.asarray(value) for value in initial_state_and_scan_inputs]
    states, scanned = values[: len(values) - num_scan_inputs], values[len(values) - num_scan_inputs :]
    for i, value in enumerate(scanned):
        axis = positive_axis(scan_input_axes[i], value.ndim) if scan_input_axes else 0
        value = jnp.moveaxis(value, axis, 0)
        scanned[i] = jnp.flip(value, 0) if scan_input_directions and scan_input_directions[i] else value

    def step(carry: list[Array], items: list[Array]) -> tuple[list[Array], list[Array]]:
        results = [jnp.asarray(value) for value in scope.run(body, [*carry, *items])]
        return results[: len(states)], results[len(states) :]

    final, outputs = jax.lax.scan(step, states, scanned)
    for i, value in enumerate(outputs):
        value = jnp.flip(value, 0) if scan_output_directions and scan_output_directions[i] else value
        axis = positive_axis(scan_output_axes[i], value.ndim) if scan_output_axes else 0
        outputs[i] = jnp.moveaxis(value, 0, axis)
    return (*final, *outputs)
