"""Products with the weights of chosen experts: as the standard's gather and product give them, without a copy for every token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from mesh.kernels import calls
from mesh.kernels.library import kernels
from mesh.lowering import experts, linear
from mesh.lowering.experts import ExpertWeight
from mesh.lowering.lower import Lowered
from mesh.runtime.loading import load_block

EXPERTS, OUT, DEPTH, GROUP = 6, 24, 64, 32
STORED = ("float32", "float16", "bfloat16", "int8", "int4")


def graph(stored: str, *, turned: bool, gather: str, swap: bool = False, more: bool = False, rounds: bool = False) -> onnx.ModelProto:
    """x [S, in], chosen [S] -> y [S, out]. `turned`: experts are stored [in, out]; `swap`: a Transpose stands between gather and product;
    `more`: something else reads what was gathered; `rounds`: x is rounded to bfloat16."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((EXPERTS, DEPTH, OUT) if turned else (EXPERTS, OUT, DEPTH)).astype(np.float32)
    axis = 1 if turned else 2
    nodes: list[Any] = []
    initializers = [numpy_helper.from_array(np.array([-1]), "last")]
    if stored in ("int8", "int4"):
        groups = tuple(size // GROUP if at == axis else size for at, size in enumerate(weight.shape))
        scale = rng.uniform(0.01, 0.1, groups).astype(np.float32)
        codes = rng.integers(-8, 8, weight.shape)
        kind = TensorProto.INT8 if stored == "int8" else TensorProto.INT4
        initializers += [helper.make_tensor("codes", kind, weight.shape, codes.reshape(-1)), numpy_helper.from_array(scale, "scale")]
        nodes.append(helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"], axis=axis, block_size=GROUP))
    elif stored == "float32":
        initializers.append(numpy_helper.from_array(weight, "w"))
    else:
        kind = TensorProto.FLOAT16 if stored == "float16" else TensorProto.BFLOAT16
        initializers.append(helper.make_tensor("half", kind, weight.shape, weight.reshape(-1)))
        nodes.append(helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT))
    index = "chosen"
    if gather == "GatherND":
        nodes.append(helper.make_node("Unsqueeze", ["chosen", "last"], ["index"]))
        index = "index"
    nodes.append(helper.make_node(gather, ["w", index], ["each"]))
    each = "each"
    seen_turned = turned
    if swap:
        nodes.append(helper.make_node("Transpose", ["each"], ["swapped"], perm=[0, 2, 1]))
        each, seen_turned = "swapped", not turned
    axes = [1] if seen_turned else [2]
    initializers.append(numpy_helper.from_array(np.array(axes), "axes"))
    nodes.append(helper.make_node("Unsqueeze", ["x", "axes"], ["column"]))
    if rounds:
        nodes[-1].output[0] = "before"
        nodes.append(helper.make_node("Cast", ["before"], ["narrow"], to=TensorProto.BFLOAT16))
        nodes.append(helper.make_node("Cast", ["narrow"], ["column"], to=TensorProto.FLOAT))
    nodes.append(helper.make_node("MatMul", ["column", each] if seen_turned else [each, "column"], ["product"]))
    nodes.append(helper.make_node("Squeeze", ["product", "axes"], ["y"]))
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["s", OUT])]
    if more:
        nodes.append(helper.make_node("ReduceMax", ["each"], ["peak"], keepdims=0))
        outputs.append(helper.make_tensor_value_info("peak", TensorProto.FLOAT, []))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["s", DEPTH]),
        helper.make_tensor_value_info("chosen", TensorProto.INT64, ["s"]),
    ]
    made = helper.make_graph(nodes, "layer_000", inputs, outputs, initializers)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def loaded(model: onnx.ModelProto, folder: Path) -> tuple[Lowered, dict[str, Any]]:
    onnx.save(model, str(folder / "layer_000.onnx"))
    block = load_block(folder, "layer_000")
    return block.lowered, block.weights


def inputs(rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"x": rng.standard_normal((rows, DEPTH)).astype(np.float32), "chosen": rng.integers(-EXPERTS, EXPERTS, rows)}


def by_name(lowered: Lowered, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Under the canonical names, which are in the order of the model's inputs."""
    return dict(zip(lowered.inputs, given.values(), strict=False))


@pytest.fixture(params=["kernels", "XLA"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What multiplies."""
    if request.param == "kernels" and kernels().name is None:
        pytest.skip(f"kernels: {kernels()}")
    if request.param == "XLA":
        monkeypatch.setattr(linear, "in_kernel", lambda *_: False)
    return str(request.param)


def run(lowered: Lowered, weights: dict[str, Any], given: dict[str, np.ndarray]) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(lambda w, x: lowered(w, x))(weights, by_name(lowered, given))[lowered.outputs[0]])


@pytest.mark.parametrize("gather", ["Gather", "GatherND"])
@pytest.mark.parametrize(("turned", "swap"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("stored", STORED)
def test_products_are_those_of_the_standard(stored: str, turned: bool, swap: bool, gather: str, engine: str, tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = graph(stored, turned=turned, gather=gather, swap=swap)
    lowered, weights = loaded(model, tmp_path)
    assert [type(each) for each in weights.values() if isinstance(each, ExpertWeight)] == [ExpertWeight]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for rows in (1, 2, 7, 40):
        given = inputs(rows, rows)
        (expected,) = session.run(["y"], given)
        np.testing.assert_allclose(run(lowered, weights, given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("turned", "swap"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("stored", ["bfloat16", "int8"])
def test_inputs_are_rounded_to_bfloat16_where_the_block_rounds_them(
    stored: str, turned: bool, swap: bool, engine: str, tmp_path: Path
) -> None:
    ort = pytest.importorskip("onnxruntime")
    model = graph(stored, turned=turned, gather="Gather", swap=swap, rounds=True)
    lowered, weights = loaded(model, tmp_path)
    assert [each.rounds for each in weights.values() if isinstance(each, ExpertWeight)] == [True]
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    exact = ort.InferenceSession(graph(stored, turned=turned, gather="Gather", swap=swap).SerializeToString())
    for rows in (1, 7, 100):
        given = inputs(rows, rows)
        (expected,), got = session.run(["y"], given), run(lowered, weights, given)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=2e-5)
        assert np.abs(exact.run(["y"], given)[0] - expected).max() > 1e-4
        if engine == "kernels" and rows > 1:
            alone = np.concatenate(
                [run(lowered, weights, {"x": given["x"][r : r + 1], "chosen": given["chosen"][r : r + 1]}) for r in range(5)]
            )
            np.testing.assert_array_equal(got[:5], alone)


@pytest.mark.parametrize("stored", STORED)
def test_the_experts_of_a_few_tokens_at_a_time_give_the_same(stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """XLA's form where there are more experts than it lets compute every token, and more tokens than it has copies for."""
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(linear, "in_kernel", lambda *_: False)
    monkeypatch.setattr(experts, "_FEW_EXPERTS", 0)
    monkeypatch.setattr(experts, "_COPIED_BYTES", 3 * OUT * DEPTH * 4)
    model = graph(stored, turned=False, gather="GatherND")
    lowered, weights = loaded(model, tmp_path)
    given = inputs(40, 1)
    (expected,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(["y"], given)
    np.testing.assert_allclose(run(lowered, weights, given), expected, rtol=1e-5, atol=1e-5)


def test_codes_of_four_bits_stay_four_bits(tmp_path: Path) -> None:
    _, weights = loaded(graph("int4", turned=True, gather="GatherND"), tmp_path)
    (held,) = (each for each in weights.values() if isinstance(each, ExpertWeight))
    scales = EXPERTS * OUT * (DEPTH // GROUP) * 4
    assert held.codes.bits == 4 and sum(leaf.nbytes for leaf in jax.tree.leaves(held)) == EXPERTS * OUT * DEPTH // 2 + scales


def test_a_weight_that_something_else_reads_stays_as_it_is(tmp_path: Path) -> None:
    lowered, weights = loaded(graph("float32", turned=False, gather="GatherND", more=True), tmp_path)
    assert not any(isinstance(each, ExpertWeight) for each in weights.values())
    assert run(lowered, weights, inputs(3)).shape == (3, OUT)


@pytest.mark.usefixtures("engine")
def test_no_expert_is_copied_for_every_token() -> None:
    """1,024 tokens of experts of 256 KiB: 256 MiB as it is written."""
    weight = ExpertWeight(linear.Codes(jnp.zeros((8 * 256, 256), jnp.float32)), 8, False)
    x, chosen = jnp.zeros((1024, 256)), jnp.zeros(1024, jnp.int32)
    compiled = jax.jit(lambda w, x, c: w.product(x, c)).lower(weight, x, chosen).compile()
    memory = compiled.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes < 48 << 20


@pytest.mark.skipif(kernels().name is None, reason=f"kernels: {kernels()}")
@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 70), st.integers(1, 50), st.integers(0, 99))
def test_a_row_has_the_same_bits_in_any_company(count: int, out: int, depth: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = linear.Codes(jnp.asarray(rng.standard_normal((count * out, depth)), jnp.float32))
    x, chosen = jnp.asarray(rng.standard_normal((rows, depth)), jnp.float32), jnp.asarray(rng.integers(0, count, rows), jnp.int32)
    weight = ExpertWeight(codes, count, False)
    together = np.asarray(weight.product(x, chosen))
    for row in range(rows):
        alone = np.asarray(weight.product(x[row : row + 1], chosen[row : row + 1]))[0]
        np.testing.assert_array_equal(together[row], alone)
        whole = np.asarray(codes.data).reshape(count, out, depth)[int(chosen[row])].astype(np.float64)
        np.testing.assert_allclose(alone, whole @ np.asarray(x[row], np.float64), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(kernels().name is None, reason=f"kernels: {kernels()}")
@pytest.mark.parametrize("chosen", [3, -1])
def test_an_expert_that_there_is_not_is_an_error(chosen: int) -> None:
    codes = linear.Codes(jnp.zeros((3 * 16, 32), jnp.float32))
    with pytest.raises(Exception, match="an expert is chosen that there is not"):
        calls.expert_products(jnp.zeros((1, 32)), jnp.array([chosen], jnp.int32), codes.for_kernels(), 3).block_until_ready()
