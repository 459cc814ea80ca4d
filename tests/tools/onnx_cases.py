"""Runs a case of the ONNX backend test suite through the lowering, compiled and evaluated at trace time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import numpy as np
import onnx
from onnx import numpy_helper

from mesh.lowering import lower
from mesh.lowering.static import is_traced


@cache
def node_cases() -> dict[str, Any]:
    """Every node case by name. Some of the generators overflow on purpose, hence no warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.loader import load_model_tests

        return {case.name: case for case in load_model_tests(kind="node")}


def run(case: Any) -> None:
    """AssertionError, or whatever the lowering raises, unless the case's outputs come out: compiled, and on known values too where
    every op has a numpy form (the others are the same JAX function either way)."""
    for given, wanted in case.data_sets:
        given, wanted = [_array(item) for item in given], [_array(item) for item in wanted]
        lowered = lower(case.model)
        inputs = dict(zip(lowered.inputs, given, strict=True))
        traced = {name: value for name, value in inputs.items() if name not in lowered.static_inputs}
        if not lowered.weights and (not traced or all(node.op.numpy for node in lowered.graph.nodes)):
            at_once = lowered({}, inputs)
            assert not any(is_traced(value) for value in at_once.values()), "known inputs gave a result that is not"
            _compare(case, [at_once[name] for name in lowered.outputs], wanted)
        if (not traced and not lowered.weights) or any(array.dtype == object for array in (*given, *wanted)):
            continue  # nothing to compile
        with jax.enable_x64(_needs_64_bits([*given, *wanted, *_constants(case.model)])):
            fixed = {name: value for name, value in inputs.items() if name in lowered.static_inputs}
            compiled = jax.jit(lambda weights, arrays, fixed=fixed, lowered=lowered: lowered(weights, {**fixed, **arrays}))
            computed = compiled(lowered.weights, traced)
            _compare(case, [np.asarray(computed[name]) for name in lowered.outputs], wanted)


def _array(item: Any) -> np.ndarray:
    if isinstance(item, onnx.TensorProto):
        return numpy_helper.to_array(item)
    if not isinstance(item, (np.ndarray, np.generic)):
        raise NotImplementedError(f"a value of type {type(item).__name__}")
    return np.asarray(item)


def _constants(model: onnx.ModelProto) -> list[np.ndarray]:
    return [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]


def _needs_64_bits(arrays: Sequence[np.ndarray]) -> bool:
    """Whether the case is about 64-bit values: float64 at all, integers beyond 32 bits."""
    return any(
        array.dtype in (np.float64, np.uint64) or (array.dtype == np.int64 and array.size > 0 and np.abs(array).max() >= 2**31)
        for array in arrays
    )


def _compare(case: Any, computed: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> None:
    assert len(computed) == len(wanted)
    for got, want in zip(computed, wanted, strict=True):
        assert got.shape == want.shape
        allowed = {want.dtype, np.dtype({"int64": "int32", "uint64": "uint32", "float64": "float32"}.get(want.dtype.name, want.dtype))}
        assert got.dtype in allowed, f"{got.dtype} where {want.dtype} is wanted"
        if want.dtype == object:
            np.testing.assert_array_equal(got, want)
            continue
        rtol = case.rtol
        if want.dtype.name == "bfloat16":  # as onnx.backend.test.runner has it: two units in the last place
            rtol = max(rtol, 2**-6)
        if want.dtype.kind not in "biufc":  # ml_dtypes do not promote with Python floats
            got, want = got.astype(np.float32), want.astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=rtol, atol=case.atol)
