"""What lowering promises besides the ops themselves: exact shapes, mapped weights, errors before the first trace."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.lowering import Lowered, lower, register, supported

FLOAT, INT64 = TensorProto.FLOAT, TensorProto.INT64
OPSET = 24


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[int, list[Any]]],
    outputs: list[str],
    constants: dict[str, np.ndarray] | None = None,
    *,
    opset: int = OPSET,
    domains: dict[str, int] | None = None,
    functions: list[onnx.FunctionProto] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(name, version) for name, version in (domains or {}).items())]
    return helper.make_model(graph, opset_imports=imports, functions=functions or [])


def run(lowered: Lowered, **inputs: Any) -> dict[str, np.ndarray]:
    """Compiled, with everything traced that may be."""
    fixed = {name: inputs.pop(name) for name in list(inputs) if name in lowered.static_inputs}
    result = jax.jit(lambda weights, arrays: lowered(weights, {**fixed, **arrays}))(lowered.weights, inputs)
    return {name: np.asarray(value) for name, value in result.items()}


def saved(folder: Path, model: onnx.ModelProto) -> onnx.ModelProto:
    """The model as read back without its external data."""
    path = folder / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return onnx.load(path, load_external_data=False)


# --- weights


def product(weight: np.ndarray) -> onnx.ModelProto:
    return model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], {"x": (FLOAT, [2, weight.shape[0]])}, ["y"], {"w": weight})


def test_external_weights_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    lowered = lower(saved(tmp_path, product(weight)), base_dir=tmp_path)
    array = lowered.weights["w"]
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    assert not array.flags.owndata
    assert isinstance(root, np.memmap) or type(root.base).__name__ == "mmap"
    x = np.ones((2, 64), np.float32)
    np.testing.assert_allclose(run(lowered, x=x)["y"], x @ weight, rtol=1e-5)


def test_small_initializers_are_constants_and_large_ones_are_arguments() -> None:
    nodes = [helper.make_node("Mul", ["x", "small"], ["a"]), helper.make_node("Add", ["a", "large"], ["y"])]
    constants = {"small": np.float32(3).reshape(1), "large": np.ones((1, 1024), np.float32), "unused": np.ones(4096, np.float32)}
    lowered = lower(model_of(nodes, {"x": (FLOAT, [1, 1024])}, ["y"], constants))
    assert set(lowered.weights) == {"large"}
    replaced = lowered({"large": np.zeros((1, 1024), np.float32)}, {"x": np.ones((1, 1024), np.float32)})
    assert (replaced["y"] == 3).all()


def test_a_large_constant_node_is_an_argument_too() -> None:
    table = numpy_helper.from_array(np.arange(2048, dtype=np.float32).reshape(2048, 1))
    nodes = [helper.make_node("Constant", [], ["t"], value=table), helper.make_node("Gather", ["t", "ids"], ["y"])]
    lowered = lower(model_of(nodes, {"ids": (INT64, [2])}, ["y"]))
    assert set(lowered.weights) == {"t"}
    assert run(lowered, ids=np.array([5, -1]))["y"].tolist() == [[5.0], [2047.0]]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("kind", [ml_dtypes.int4, ml_dtypes.uint4])
def test_four_bit_weights_stay_packed_until_they_are_used(kind: Any, external: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    low, high = (-8, 8) if kind is ml_dtypes.int4 else (0, 16)
    codes = rng.integers(low, high, (64, 33))
    scale = rng.random((2, 33), dtype=np.float32)
    zero = rng.integers(low, high, (2, 33)).astype(kind)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wide"], axis=0, block_size=32),
        helper.make_node("MatMul", ["x", "wide"], ["y"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, [1, 64])}, ["y"], {"w": codes.astype(kind), "scale": scale, "zero": zero})
    lowered = lower(saved(tmp_path, model) if external else model, base_dir=tmp_path)
    assert lowered.weights["w"].dtype == np.uint8
    assert lowered.weights["w"].size == 64 * 33 // 2
    assert lowered.packed["w"].shape == (64, 33)
    x = rng.standard_normal((1, 64)).astype(np.float32)
    expected = x @ ((codes - np.repeat(zero.astype(np.int64), 32, 0)) * np.repeat(scale, 32, 0))
    np.testing.assert_allclose(run(lowered, x=x)["y"], expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_are_mapped_as_such(tmp_path: Path) -> None:
    weight = np.arange(1024).reshape(32, 32).astype(ml_dtypes.bfloat16)
    nodes = [helper.make_node("Cast", ["w"], ["wide"], to=FLOAT), helper.make_node("MatMul", ["x", "wide"], ["y"])]
    lowered = lower(saved(tmp_path, model_of(nodes, {"x": (FLOAT, [1, 32])}, ["y"], {"w": weight})), base_dir=tmp_path)
    assert lowered.weights["w"].dtype == ml_dtypes.bfloat16
    x = np.ones((1, 32), np.float32)
    np.testing.assert_allclose(run(lowered, x=x)["y"], x @ weight.astype(np.float32), rtol=1e-5)


def test_a_truncated_data_file_is_named(tmp_path: Path) -> None:
    model = saved(tmp_path, product(np.ones((64, 32), np.float32)))
    data = tmp_path / "model.data"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(CorruptModel, match=r"model\.data ends at byte 8,191.*'w'.*truncated"):
        lower(model, base_dir=tmp_path)


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    model = saved(tmp_path, product(np.ones((64, 32), np.float32)))
    (tmp_path / "model.data").unlink()
    with pytest.raises(CorruptModel, match=r"model\.data is missing"):
        lower(model, base_dir=tmp_path)


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b"])
def test_external_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    model = saved(tmp_path, product(np.ones((64, 32), np.float32)))
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    with pytest.raises(CorruptModel, match="outside"):
        lower(model, base_dir=tmp_path)


# --- what is refused, and when


def test_every_missing_op_is_named_at_once_before_any_trace() -> None:
    nodes = [
        helper.make_node("Frobnicate", ["x"], ["a"], name="first", domain="com.example"),
        helper.make_node("Frobnicate", ["a"], ["b"], name="second", domain="com.example"),
        helper.make_node("StringSplit", ["b"], ["y", "n"], name="third"),
    ]
    with pytest.raises(UnsupportedModel) as caught:
        lower(model_of(nodes, {"x": (FLOAT, [1])}, ["y"], domains={"com.example": 3}))
    message = str(caught.value)
    assert "com.example.Frobnicate (opset 3) at node 'first' and 1 more" in message
    assert f"StringSplit (opset {OPSET}) at node 'third'" in message
    assert "\n" not in message


def test_an_unknown_attribute_is_named() -> None:
    node = helper.make_node("Softmax", ["x"], ["y"], name="s", temperature=2.0)
    with pytest.raises(UnsupportedModel, match=r"Softmax \(opset 24\): attribute temperature is not known at node 's'"):
        lower(model_of([node], {"x": (FLOAT, [1])}, ["y"]))


def test_a_value_of_an_attribute_that_is_not_supported_is_named() -> None:
    node = helper.make_node("ScatterND", ["x", "i", "u"], ["y"], name="s", reduction="median")
    with pytest.raises(UnsupportedModel, match="reduction = 'median'"):
        lower(model_of([node], {"x": (FLOAT, [4]), "i": (INT64, [1, 1]), "u": (FLOAT, [1])}, ["y"]))


def test_nodes_that_no_output_needs_are_not_looked_at() -> None:
    nodes = [helper.make_node("Frobnicate", ["x"], ["dead"], domain="com.example"), helper.make_node("Neg", ["x"], ["y"])]
    lowered = lower(model_of(nodes, {"x": (FLOAT, [1])}, ["y"], domains={"com.example": 1}))
    assert run(lowered, x=np.array([2], np.float32))["y"] == [-2]


def test_a_shape_from_run_time_values_is_refused_by_name() -> None:
    nodes = [helper.make_node("Cast", ["x"], ["shape"], to=INT64), helper.make_node("Reshape", ["y0", "shape"], ["y"], name="view")]
    lowered = lower(model_of(nodes, {"x": (FLOAT, [2]), "y0": (FLOAT, [6])}, ["y"]))
    assert lowered.static_inputs == {"x"}
    with pytest.raises(UnsupportedModel, match=r"node 'view' \(Reshape\): input 1 \('shape'\) must be a constant"):
        jax.jit(lambda x: lowered({}, {"x": x, "y0": np.zeros(6, np.float32)}))(np.array([2, 3], np.float32))
    assert lowered({}, {"x": np.array([2, 3], np.float32), "y0": np.zeros(6, np.float32)})["y"].shape == (2, 3)


def test_an_undefined_value_is_named() -> None:
    with pytest.raises(CorruptModel, match="'ghost'"):
        lower(model_of([helper.make_node("Add", ["x", "ghost"], ["y"])], {"x": (FLOAT, [1])}, ["y"]))


def test_supported_follows_the_opset() -> None:
    assert supported("Attention", "", 24)
    assert supported("GroupQueryAttention", "com.microsoft", 1)
    assert not supported("Gemm", "", 6)
    assert not supported("Frobnicate", "com.example", 1)


# --- known values


def test_shape_arithmetic_is_exact_and_never_compiled() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "big"], ["large"]),
        helper.make_node("Div", ["large", "big"], ["back"]),
        helper.make_node("Slice", ["x", "zero", "far", "axes"], ["same"]),
        helper.make_node("Reshape", ["same", "back"], ["y"]),
    ]
    constants = {
        "big": np.array([2**40, 2**40], np.int64),
        "zero": np.array([0], np.int64),
        "far": np.array([np.iinfo(np.int64).max], np.int64),
        "axes": np.array([1], np.int64),
    }
    lowered = lower(model_of(nodes, {"x": (FLOAT, ["n", 3])}, ["y"], constants))
    assert lowered.static_inputs == frozenset()
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    np.testing.assert_array_equal(run(lowered, x=x)["y"], x)
    traced = jax.make_jaxpr(lambda x: lowered({}, {"x": x}))(x)
    assert {equation.primitive.name for equation in traced.eqns} <= {"reshape", "slice", "copy"}


def test_int64_limits_saturate_where_they_meet_run_time_values() -> None:
    nodes = [helper.make_node("Where", ["c", "most", "least"], ["y"])]
    constants = {"most": np.array(np.iinfo(np.int64).max), "least": np.array(np.iinfo(np.int64).min)}
    lowered = lower(model_of(nodes, {"c": (TensorProto.BOOL, [2])}, ["y"], constants))
    limits = np.iinfo(np.int32)
    assert run(lowered, c=np.array([True, False]))["y"].tolist() == [limits.max, limits.min]


def test_an_expanded_constant_is_not_embedded_in_the_compiled_code() -> None:
    nodes = [helper.make_node("Expand", ["zero", "shape"], ["wide"]), helper.make_node("Add", ["x", "wide"], ["y"])]
    constants: dict[str, np.ndarray] = {"zero": np.zeros(1, np.float32), "shape": np.array([512, 512], np.int64)}
    lowered = lower(model_of(nodes, {"x": (FLOAT, [512, 512])}, ["y"], constants))
    text = jax.jit(lambda x: lowered({}, {"x": x})).lower(jnp.ones((512, 512))).as_text()
    assert len(text) < 10_000


# --- functions, branches, versions


def test_model_functions_are_inlined() -> None:
    body = [helper.make_node("Mul", ["a", "a"], ["b"]), helper.make_node("Neg", ["b"], ["c"])]
    function = helper.make_function("com.example", "NegSquare", ["a"], ["c"], body, [helper.make_opsetid("", OPSET)])
    node = helper.make_node("NegSquare", ["x"], ["y"], domain="com.example")
    lowered = lower(model_of([node], {"x": (FLOAT, [1])}, ["y"], domains={"com.example": 1}, functions=[function]))
    assert run(lowered, x=np.array([3], np.float32))["y"] == [-9]


def test_standard_functions_are_inlined_with_their_default_attributes() -> None:
    node = helper.make_node("HannWindow", ["n"], ["y"])  # periodic = 1, output_datatype = FLOAT
    lowered = lower(model_of([node], {}, ["y"], {"n": np.array(8)}))
    np.testing.assert_allclose(lowered({}, {})["y"], 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(8) / 8), atol=1e-6)


@pytest.mark.parametrize("chosen", [True, False])
def test_a_branch_is_chosen_when_its_condition_follows_from_shapes(chosen: bool) -> None:
    def branch(op_type: str) -> onnx.GraphProto:
        return helper.make_graph([helper.make_node(op_type, ["x"], ["z"])], op_type, [], [helper.make_tensor_value_info("z", FLOAT, None)])

    nodes = [
        helper.make_node("Size", ["x"], ["n"]),
        helper.make_node("Greater", ["n", "two"], ["more"]),
        helper.make_node("If", ["more"], ["y"], then_branch=branch("Neg"), else_branch=branch("Abs")),
    ]
    lowered = lower(model_of(nodes, {"x": (FLOAT, ["n"])}, ["y"], {"two": np.array(2)}))
    x = np.full(3 if chosen else 1, 5, np.float32)
    np.testing.assert_array_equal(run(lowered, x=x)["y"], -x if chosen else x)


def test_the_semantics_are_those_of_the_models_opset() -> None:
    x = np.random.default_rng(2).standard_normal((2, 3, 4)).astype(np.float32)
    node = helper.make_node("Softmax", ["x"], ["y"])
    old = run(lower(model_of([node], {"x": (FLOAT, [2, 3, 4])}, ["y"], opset=11)), x=x)["y"]
    new = run(lower(model_of([node], {"x": (FLOAT, [2, 3, 4])}, ["y"], opset=13)), x=x)["y"]
    np.testing.assert_allclose(old.reshape(2, -1).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(new.sum(-1), 1, rtol=1e-5)


# --- extension points


class Doubling:
    """Stands where a weight stood, and computes MatMul its own way."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[tuple[str, int]] = []

    def __lower_op__(self, op_type: str, args: tuple[Any, ...], attrs: dict[str, Any]) -> Any:
        self.asked.append((op_type, len(args)))
        return args[0] * 2 if self.answer else NotImplemented


def test_an_object_in_a_weights_place_is_asked_first() -> None:
    lowered = lower(product(np.ones((32, 32), np.float32)))
    double = Doubling(answer=True)
    x = np.ones((2, 32), np.float32)
    assert (lowered({"w": double}, {"x": x})["y"] == 2).all()
    assert double.asked == [("MatMul", 2)]


def test_an_object_that_declines_falls_through_to_the_op() -> None:
    lowered = lower(product(np.ones((32, 32), np.float32)))
    with pytest.raises(TypeError) as caught:
        lowered({"w": Doubling(answer=False)}, {"x": jnp.ones((2, 32))})
    assert "MatMul" in "".join(caught.value.__notes__)


def test_another_package_may_register_ops_of_its_own_domain() -> None:
    @register(domain="com.example.lower", since=2)
    def Scale(x: Any, *, by: float = 2.0) -> Any:
        return x * by

    node = helper.make_node("Scale", ["x"], ["y"], domain="com.example.lower", by=3.0)
    model = model_of([node], {"x": (FLOAT, [1])}, ["y"], domains={"com.example.lower": 2})
    assert run(lower(model), x=np.array([2], np.float32))["y"] == [6]
    assert not supported("Scale", "com.example.lower", 1)
    with pytest.raises(ValueError, match="already registered"):
        register("Scale", domain="com.example.lower", since=2)(lambda x: x)


def test_trace_stops_after_the_node_asked_for() -> None:
    nodes = [
        helper.make_node("Neg", ["x"], ["a"], name="first"),
        helper.make_node("Exp", ["a"], ["b"], name="second"),
        helper.make_node("Abs", ["b"], ["y"], name="third"),
    ]
    lowered = lower(model_of(nodes, {"x": (FLOAT, [1])}, ["y"]))
    values = lowered.trace({}, {"x": np.array([1], np.float32)}, until="second")
    assert set(values) == {"x", "a", "b"}
    assert set(lowered.trace({}, {"x": np.array([1], np.float32)})) == {"x", "a", "b", "y"}
    with pytest.raises(KeyError, match="'fourth'"):
        lowered.trace({}, {"x": np.array([1], np.float32)}, until="fourth")


# --- attention


def test_grouped_queries_never_repeat_the_keys() -> None:
    b, hq, hkv, t, s, d = 2, 8, 2, 3, 16, 4
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    shapes = {"q": (FLOAT, [b, hq, t, d]), "k": (FLOAT, [b, hkv, s, d]), "v": (FLOAT, [b, hkv, s, d])}
    lowered = lower(model_of([node], shapes, ["y"]))
    arrays = {name: jnp.ones(shape) for name, (_, shape) in shapes.items()}
    jaxpr = jax.make_jaxpr(lambda arrays: lowered({}, arrays))(arrays)
    assert all(b * hq * s * d not in {value.aval.size for value in equation.outvars} for equation in jaxpr.eqns)


@pytest.mark.parametrize("additive", [False, True])
def test_a_query_that_may_attend_nothing_gives_zeros(additive: bool) -> None:
    mask = np.array([[True, False], [False, False]])
    node = helper.make_node("Attention", ["q", "k", "v", "mask"], ["y"])
    shapes = {name: (FLOAT, [1, 1, 2, 4]) for name in ("q", "k", "v")}
    lowered = lower(model_of([node], {**shapes, "mask": (FLOAT if additive else TensorProto.BOOL, [2, 2])}, ["y"]))
    arrays = {name: np.random.default_rng(3).standard_normal((1, 1, 2, 4)).astype(np.float32) for name in shapes}
    given = np.where(mask, 0, -np.inf).astype(np.float32) if additive else mask
    y = run(lowered, **arrays, mask=given)["y"]
    np.testing.assert_allclose(y[0, 0, 0], arrays["v"][0, 0, 0], rtol=1e-6)
    assert (y[0, 0, 1] == 0).all()


def test_each_row_is_written_at_its_own_index() -> None:
    node = helper.make_node("TensorScatter", ["cache", "new", "at"], ["y"])
    lowered = lower(model_of([node], {"cache": (FLOAT, [2, 1, 5, 2]), "new": (FLOAT, [2, 1, 2, 2]), "at": (INT64, [2])}, ["y"]))
    assert lowered.static_inputs == frozenset()
    y = run(lowered, cache=np.zeros((2, 1, 5, 2), np.float32), new=np.ones((2, 1, 2, 2), np.float32), at=np.array([0, 3]))["y"]
    assert y[:, 0, :, 0].tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]
