"""Dropout. Decoders are run for inference only, where it is the identity."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh.errors import UnsupportedModel
from mesh.lowering.op_helpers import Array
from mesh.lowering.registry import register


def _kept(data: Array, mask_type: Any) -> tuple[Array, Array]:
    return data, jnp.ones(data.shape, mask_type)


@register(since=12, static=(1, 2))
def Dropout(data: Array, ratio: Array | None = None, training_mode: Array | None = None, *, seed: int = 0) -> tuple[Array, Array]:
    dropping = ratio is None or float(np.asarray(ratio).reshape(())) > 0
    if training_mode is not None and bool(np.asarray(training_mode).reshape(())) and dropping:
        raise UnsupportedModel("Dropout in training mode; export the model for inference")
    return _kept(data, bool)


@register("Dropout", since=7)
def Dropout_7(data: Array, *, ratio: float = 0.5) -> tuple[Array, Array]:
    return _kept(data, bool)
