"""The com.microsoft ops against onnxruntime's own kernels."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from mesh.lowering import lower

MICROSOFT = "com.microsoft"
BATCH, TOKENS, HIDDEN = 2, 5, 32


def check(
    op_type: str, inputs: list[np.ndarray | None], outputs: int | tuple[bool, ...] = 1, *, domain: str = MICROSOFT, rtol: float = 1e-5,
    atol: float = 2e-6, fixed: tuple[int, ...] = (), **attributes: Any,
) -> list[np.ndarray]:  # fmt: skip
    """One node in onnxruntime and, compiled, in the lowering; `fixed`: positions of inputs that decide shapes."""
    wanted = (True,) * outputs if isinstance(outputs, int) else outputs
    names = ["" if value is None else f"x{i}" for i, value in enumerate(inputs)]
    results = [f"y{i}" if want else "" for i, want in enumerate(wanted)]
    node = helper.make_node(op_type, names, results, domain=domain, **attributes)
    infos = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in zip(names, inputs, strict=True)
        if value is not None
    ]
    first = next(value for value in inputs if value is not None)
    element = helper.np_dtype_to_tensor_dtype(first.dtype) if first.dtype.kind == "f" else TensorProto.FLOAT
    graph = helper.make_graph([node], op_type, infos, [helper.make_tensor_value_info(name, element, None) for name in results if name])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {name: value for name, value in zip(names, inputs, strict=True) if value is not None}
    expected = session.run([name for name in results if name], feeds)

    lowered = lower(model)
    static = {name: value for name, value in feeds.items() if name in {f"x{i}" for i in fixed}}
    assert lowered.static_inputs == set(static)
    compiled = jax.jit(lambda arrays: lowered({}, {**static, **arrays}))
    computed = compiled({name: value for name, value in feeds.items() if name not in static})
    for name, want in zip([name for name in results if name], expected, strict=True):
        assert computed[name].dtype == want.dtype
        np.testing.assert_allclose(np.asarray(computed[name]), want, rtol=rtol, atol=atol)
    return expected


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("op_type", ["Gelu", "QuickGelu", "FastGelu"])
def test_gelu_of_each_kind(op_type: str, rng: np.random.Generator) -> None:
    # onnxruntime's own tanh and erf are approximations
    check(op_type, [normal(rng, BATCH, TOKENS, HIDDEN) * 3], rtol=1e-4, atol=1e-5)


def test_gelu_with_a_bias(rng: np.random.Generator) -> None:
    x, bias = normal(rng, BATCH, TOKENS, HIDDEN), normal(rng, HIDDEN)
    check("BiasGelu", [x, bias], rtol=1e-4, atol=1e-5)
    check("FastGelu", [x, bias], rtol=1e-4, atol=1e-5)


def test_quick_gelu_with_another_alpha(rng: np.random.Generator) -> None:
    check("QuickGelu", [normal(rng, 3, 7)], alpha=1.0, rtol=1e-4, atol=1e-5)


def test_simplified_layer_normalization_in_the_default_domain(rng: np.random.Generator) -> None:
    check("SimplifiedLayerNormalization", [normal(rng, BATCH, TOKENS, HIDDEN), normal(rng, HIDDEN)], 1, domain="", axis=-1, epsilon=1e-6)


@pytest.mark.parametrize("with_bias", [False, True])
def test_skip_simplified_layer_normalization(with_bias: bool, rng: np.random.Generator) -> None:
    x, skip, gamma = normal(rng, BATCH, TOKENS, HIDDEN), normal(rng, BATCH, TOKENS, HIDDEN), normal(rng, HIDDEN)
    bias = [normal(rng, HIDDEN)] if with_bias else []
    check("SkipSimplifiedLayerNormalization", [x, skip, gamma, *bias], (True, False, False, True), epsilon=1e-5)


def test_skip_layer_normalization_with_beta_bias_and_a_broadcast_skip(rng: np.random.Generator) -> None:
    x, skip = normal(rng, BATCH, TOKENS, HIDDEN), normal(rng, TOKENS, HIDDEN)
    vectors = [normal(rng, HIDDEN) for _ in range(3)]
    check("SkipLayerNormalization", [x, skip, *vectors], (True, False, False, True), epsilon=1e-5)


def test_the_default_epsilon_of_skip_normalizations(rng: np.random.Generator) -> None:
    tiny = normal(rng, 1, 2, 8) * 1e-4
    check("SkipSimplifiedLayerNormalization", [tiny, tiny, normal(rng, 8)], rtol=1e-4)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("rotary_dim", [0, 4])
def test_rotary_embedding(interleaved: int, rotary_dim: int, rng: np.random.Generator) -> None:
    heads, size = 4, 8
    width = (rotary_dim or size) // 2
    cos, sin = normal(rng, 16, width), normal(rng, 16, width)
    positions = np.array([[3, 4, 5, 6, 7], [0, 1, 2, 3, 4]], np.int64)
    attributes: dict[str, Any] = {"interleaved": interleaved, "rotary_embedding_dim": rotary_dim, "num_heads": heads if rotary_dim else 0}
    check("RotaryEmbedding", [normal(rng, BATCH, TOKENS, heads * size), positions, cos, sin], **attributes)
    check("RotaryEmbedding", [normal(rng, BATCH, heads, TOKENS, size), positions, cos, sin], **attributes)
    check("RotaryEmbedding", [normal(rng, BATCH, TOKENS, heads * size), np.array([2], np.int64), cos, sin], **attributes)


def gqa(
    rng: np.random.Generator, *, tokens: int, past: int | None, lengths: list[int], total: int, heads: int = 4, kv_heads: int = 2,
    size: int = 16, rotary: bool = False, packed: bool = False, bias: bool = False, sink: bool = False, positions: bool = False,
    **attributes: Any,
) -> None:  # fmt: skip
    """`lengths`: tokens of each row including the new ones; `past`: slots of the incoming cache (None: no cache)."""
    rows = len(lengths)
    q, k, v = (
        normal(rng, rows, tokens, heads * size),
        normal(rng, rows, tokens, kv_heads * size),
        normal(rng, rows, tokens, kv_heads * size),
    )
    cache = [None, None] if past is None else [normal(rng, rows, kv_heads, past, size) for _ in range(2)]
    inputs: list[np.ndarray | None] = [np.concatenate([q, k, v], -1), None, None] if packed else [q, k, v]
    inputs += [*cache, np.array(lengths, np.int32) - 1, np.array([total], np.int32).reshape(())]
    inputs += [normal(rng, 64, size // 2), normal(rng, 64, size // 2)] if rotary else [None, None]
    given = np.stack([np.arange(length - tokens, length) for length in lengths]).astype(np.int64) if positions else None
    inputs += [given, normal(rng, 1, heads, tokens, total) if bias else None, normal(rng, heads) if sink else None]
    while inputs[-1] is None:
        inputs.pop()
    check("GroupQueryAttention", inputs, 3, fixed=(6,), num_heads=heads, kv_num_heads=kv_heads, do_rotary=int(rotary), **attributes)


def test_group_query_attention_of_a_prompt(rng: np.random.Generator) -> None:
    gqa(rng, tokens=6, past=0, lengths=[6, 6], total=6)
    gqa(rng, tokens=6, past=0, lengths=[6], total=6, rotary=True, packed=True)
    gqa(rng, tokens=6, past=0, lengths=[6], total=6, rotary=True, rotary_interleaved=1)


def test_group_query_attention_of_one_more_token(rng: np.random.Generator) -> None:
    gqa(rng, tokens=1, past=7, lengths=[8], total=8, rotary=True)
    gqa(rng, tokens=1, past=7, lengths=[8, 8], total=8, packed=True, rotary=True, scale=0.3)
    gqa(rng, tokens=1, past=7, lengths=[8, 8], total=8, rotary=True, positions=True)


def test_group_query_attention_of_a_chunk_after_a_past(rng: np.random.Generator) -> None:
    gqa(rng, tokens=4, past=5, lengths=[9], total=9, rotary=True)


def test_group_query_attention_with_a_window(rng: np.random.Generator) -> None:
    gqa(rng, tokens=8, past=0, lengths=[8], total=8, local_window_size=3)
    gqa(rng, tokens=1, past=9, lengths=[10], total=10, local_window_size=4)


def test_group_query_attention_with_soft_cap_bias_and_sinks(rng: np.random.Generator) -> None:
    gqa(rng, tokens=5, past=0, lengths=[5], total=5, softcap=2.0)
    gqa(rng, tokens=5, past=0, lengths=[5], total=5, bias=True)
    gqa(rng, tokens=5, past=0, lengths=[5], total=5, smooth_softmax=1)
    gqa(rng, tokens=5, past=0, lengths=[5], total=5, sink=True)
    gqa(rng, tokens=1, past=5, lengths=[6], total=6, bias=True, softcap=5.0)


@pytest.mark.parametrize(
    ("bits", "zero"),  # onnxruntime takes only packed zero points at 8 bits
    [(bits, zero) for bits in (2, 4, 8) for zero in ("default", "packed", "float") if (bits, zero) != (8, "float")],
)
@pytest.mark.parametrize("depth", [64, 80])
def test_matmul_n_bits(bits: int, zero: str, depth: int, rng: np.random.Generator) -> None:
    out, block = 24, 32
    blocks = -(-depth // block)
    stored = rng.integers(0, 256, (out, blocks, block * bits // 8), dtype=np.uint8)
    scales = rng.random((out, blocks), dtype=np.float32) * 0.1 + 0.01
    inputs: list[np.ndarray | None] = [normal(rng, BATCH, 3, depth), stored, scales.reshape(-1) if zero == "default" else scales]
    if zero == "packed":
        inputs.append(rng.integers(0, 256, (out, -(-blocks * bits // 8)), dtype=np.uint8))
    elif zero == "float":
        inputs.append(rng.random((out, blocks), dtype=np.float32) * 4)
    check("MatMulNBits", inputs, K=depth, N=out, bits=bits, block_size=block, rtol=1e-4, atol=1e-4)


def test_matmul_n_bits_with_a_bias(rng: np.random.Generator) -> None:
    stored = rng.integers(0, 256, (16, 2, 16), dtype=np.uint8)
    inputs = [normal(rng, 3, 64), stored, normal(rng, 16, 2) * 0.05, None, None, normal(rng, 16)]
    check("MatMulNBits", inputs, K=64, N=16, bits=4, block_size=32, rtol=1e-4, atol=1e-4)


def test_dequantize_linear_of_the_microsoft_domain(rng: np.random.Generator) -> None:
    x = rng.integers(0, 255, (4, 6), dtype=np.uint8)
    check("DequantizeLinear", [x, np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.array([1, 2, 3, 4], np.uint8)], axis=0)
