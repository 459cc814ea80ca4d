"""Quantized weights of Hugging Face checkpoints are kept: the blocks' values are those that their codes stand for, bit for bit.

The packed tensors are made by tests/tools/quantized_checkpoints.py, which knows the numbers before it packs them; where a library that owns
a format is installed, it unpacks them too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the checkpoints are made with torch (the fixtures extra)")

from quantized_checkpoints import (  # noqa: E402
    Quantize,
    Quantized,
    awq,
    compressed,
    fp8,
    gptq,
    mxfp4,
    nvfp4,
    packed_integers,
    plain_integers,
    scheme,
)
from safetensors.torch import save_file  # noqa: E402

from mesh.errors import CorruptModel, UnsupportedModel  # noqa: E402
from mesh.importer.options import ImportOptions  # noqa: E402
from mesh.importer.sources.quantized import QuantizedCheckpoint, open_checkpoint  # noqa: E402
from mesh.importer.sources.quantized_forms import experts_of_blocks  # noqa: E402
from mesh.importer.verify.oracle import session  # noqa: E402
from mesh.importer.write.blocks import BlockWriter, GraphBuilder  # noqa: E402
from mesh.importer.write.kept import SourceMatrix  # noqa: E402
from mesh.lowering.weights import PackedWeight  # noqa: E402
from mesh.runtime.loading import load_block  # noqa: E402

OUT, IN = 24, 256
BITS = range(2, 9)


@dataclass(frozen=True)
class Case:
    """bits: of a weight in memory, all told, at most."""

    quantize: Quantize
    config: dict[str, Any]
    bits: float
    kernel: bool = True


def a_gptq(bits: int, group: int, limit: float, *, version: int = 1, **how: Any) -> Case:
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}
    return Case(gptq(bits, group, version=version, **how), config, limit)


def an_int(bits: int, group: int, limit: float, **how: Any) -> Case:
    weights = scheme(bits, "int", "channel" if group == -1 else "group", group_size=group, symmetric=how["symmetric"])
    return Case(packed_integers(bits, group, **how), compressed("pack-quantized", weights), limit)


CASES = {
    "gptq-4": a_gptq(4, 32, 4.6, symmetric=True),
    "gptq-4-whole-rows": a_gptq(4, -1, 4.6, symmetric=True),
    "gptq-4-zeros": a_gptq(4, 128, 4.6, symmetric=False),
    "gptq-4-order": a_gptq(4, 32, 4.9, symmetric=True, shuffled=True),
    "gptq-4-order-zeros": a_gptq(4, 64, 4.9, symmetric=False, shuffled=True),
    "gptq-4-version-2": a_gptq(4, 32, 4.9, symmetric=False, version=2),
    "gptq-2": a_gptq(2, 64, 4.6, symmetric=True),
    "gptq-8": a_gptq(8, 32, 8.9, symmetric=True),
    "gptq-8-zeros": a_gptq(8, 64, 8.9, symmetric=False, shuffled=True),
    "awq": Case(awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, 4.9),
    "awq-whole-rows": Case(awq(-1), {"quant_method": "awq", "w_bit": 4, "q_group_size": -1}, 4.9),
    "int4": an_int(4, 32, 4.6, symmetric=True),
    "int4-channel": an_int(4, -1, 4.6, symmetric=True),
    "int4-zeros": an_int(4, 64, 4.6, symmetric=False),
    "int4-zeros-in-bytes": an_int(4, 64, 4.6, symmetric=False, zeros_packed=False),
    "int3": an_int(3, 32, 5.1, symmetric=True),
    "int6": an_int(6, 32, 6.6, symmetric=True),
    "int8-packed": an_int(8, 128, 8.2, symmetric=True),
    "int8-packed-zeros": an_int(8, 64, 8.6, symmetric=False),
    "int8": Case(plain_integers(-1), compressed("int-quantized", scheme(8, "int", "channel")), 8.2),
    "int8-whole": Case(plain_integers(None), compressed("naive-quantized", scheme(8, "int", "tensor")), 8.2),
    "int8-groups": Case(plain_integers(64), compressed("naive-quantized", scheme(8, "int", "group", group_size=64)), 8.6),
    "int8-zeros": Case(plain_integers(-1, symmetric=False), compressed("int-quantized", scheme(8, "int", "channel")), 8.3),
    "fp8-whole": Case(fp8((0, 0), "weight_scale"), compressed("float-quantized", scheme(8, "float", "tensor")), 8.2, kernel=False),
    "fp8-channel": Case(fp8(None, "weight_scale"), compressed("float-quantized", scheme(8, "float", "channel")), 8.2, kernel=False),
    "fp8-compressed-blocks": Case(
        fp8((16, 64), "weight_scale"),
        compressed("float-quantized", scheme(8, "float", "block", block_structure=[16, 64])),
        8.6,
        kernel=False,
    ),
    "fp8-blocks": Case(fp8((16, 128), "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [16, 128]}, 8.4, kernel=False),
    "fp8-fbgemm": Case(fp8(None, "weight_scale"), {"quant_method": "fbgemm_fp8"}, 8.2, kernel=False),
    "mxfp4": Case(mxfp4, compressed("mxfp4-pack-quantized", scheme(4, "float", "group", group_size=32)), 5.6),
    "nvfp4": Case(nvfp4, compressed("nvfp4-pack-quantized", scheme(4, "float", "tensor_group", group_size=16)), 7.1),
}


def weight(seed: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((OUT, IN)).astype(np.float32)


def saved(directory: Path, tensors: dict[str, Any], config: dict[str, Any]) -> QuantizedCheckpoint:
    """The tensors of one module `m`, saved and opened."""
    directory.mkdir(exist_ok=True)
    save_file({f"m.{part}": tensor.contiguous() for part, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    checkpoint = open_checkpoint(directory)
    assert isinstance(checkpoint, QuantizedCheckpoint)
    return checkpoint


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    yield CASES[request.param]


@pytest.fixture
def made(case: Case) -> Quantized:
    return case.quantize(weight())


@pytest.fixture
def checkpoint(case: Case, made: Quantized, tmp_path: Path) -> QuantizedCheckpoint:
    return saved(tmp_path / "source", made.tensors, case.config)


def test_a_weight_has_its_usual_name_and_shape_and_its_numbers(checkpoint: QuantizedCheckpoint, made: Quantized) -> None:
    assert list(checkpoint) == ["m.weight"]
    assert checkpoint.shape("m.weight") == (OUT, IN)
    np.testing.assert_array_equal(checkpoint.read("m.weight"), made.numbers)


def test_a_block_has_the_same_numbers_in_onnxruntime_and_here(
    case: Case, checkpoint: QuantizedCheckpoint, made: Quantized, tmp_path: Path
) -> None:
    """A product with the unit matrix gives the weight itself; in memory the weight is narrow, and a kernel reads it."""
    matrix = SourceMatrix(lambda: made.numbers, checkpoint.form("m.weight"), lambda: checkpoint.kept("m.weight"))
    builder = GraphBuilder("layer_000", ImportOptions())
    builder.linear(builder.input("x", ["rows", IN]), "w", matrix, out="y")
    builder.output("y", ["rows", OUT])
    info = builder.write(BlockWriter(tmp_path))
    assert info.parameters == OUT * IN
    eye = np.eye(IN, dtype=np.float32)
    oracle = session(tmp_path / "layer_000.onnx")
    np.testing.assert_array_equal(oracle.run(["y"], {"x": eye})[0].T, made.numbers)
    block = load_block(tmp_path, "layer_000")
    ours = block.lowered(block.weights, {"x": jnp.asarray(eye)})
    np.testing.assert_array_equal(np.asarray(ours["y"]).T, made.numbers)
    packed = [each for each in block.weights.values() if isinstance(each, PackedWeight)]
    assert len(packed) == 1
    form = checkpoint.form("m.weight")
    order = 4 * IN if form is not None and form.order is not None else 0
    assert block.weight_bytes - order <= case.bits / 8 * OUT * IN
    assert (packed[0].codes.kernel_kind is not None) == case.kernel


def test_outputs_can_be_taken_apart(checkpoint: QuantizedCheckpoint, made: Quantized) -> None:
    """As the families do with projections that are stored as one."""
    part = checkpoint.kept("m.weight").rows(lambda array: array[8:16])
    np.testing.assert_array_equal(part.numbers(), made.numbers[8:16])


def test_groups_of_unequal_size_are_numbers_of_32_bits(tmp_path: Path) -> None:
    """Where no order of the inputs puts the groups side by side; the report says so."""
    made = gptq(4, 64, symmetric=False, shuffled=True)(weight())
    index = made.tensors["g_idx"].clone()
    moved = int((index == 0).nonzero()[0])
    index[moved] = 1
    checkpoint = saved(tmp_path, {**made.tensors, "g_idx": index}, {"quant_method": "gptq", "bits": 4, "group_size": 64})
    assert checkpoint.form("m.weight") is None
    assert "1 weights have groups of unequal size" in str(checkpoint.note)
    others = np.arange(IN) != moved
    np.testing.assert_array_equal(checkpoint.read("m.weight")[:, others], made.numbers[:, others])
    assert (checkpoint.read("m.weight")[:, moved] != made.numbers[:, moved]).any()


def test_a_gptq_weight_may_have_other_bits_and_groups_than_most(tmp_path: Path) -> None:
    """As GPTQModel's `dynamic` rules make them."""
    made = gptq(8, 32, symmetric=False)(weight())
    checkpoint = saved(tmp_path, made.tensors, {"quant_method": "gptq", "bits": 4, "group_size": 128})
    form = checkpoint.form("m.weight")
    assert form is not None and form.name == "GPTQ of 8 bits" and form.group == 32
    np.testing.assert_array_equal(checkpoint.read("m.weight"), made.numbers)


def test_a_matrix_that_is_not_quantized_keeps_its_16_bits(tmp_path: Path) -> None:
    tensors = awq(32)(weight()).tensors
    save_file(
        {
            **{f"m.{part}": tensor for part, tensor in tensors.items()},
            "head.weight": torch.from_numpy(weight()).bfloat16(),
            "norm.weight": torch.ones(IN).half(),
        },
        tmp_path / "model.safetensors",
    )
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}))
    checkpoint = open_checkpoint(tmp_path)
    form = checkpoint.form("head.weight")
    assert form is not None and (form.name, form.bits) == ("bfloat16", 16)
    assert checkpoint.form("norm.weight") is None
    np.testing.assert_array_equal(checkpoint.kept("head.weight").numbers(), torch.from_numpy(weight()).bfloat16().float().numpy())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "quantized by bitsandbytes are not supported"),
    "hqq": ({"quant_method": "hqq"}, "quantized by hqq are not supported"),
    "nameless": ({"bits": 4}, "quantized by unknown are not supported"),
    "gptq-3": ({"quant_method": "gptq", "bits": 3, "group_size": 32}, "GPTQ weights of 3 bits"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "in the layout marlin"),
    "awq-gemv": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "in the layout gemv"),
    "awq-8": ({"quant_method": "awq", "bits": 8}, "AWQ weights of 8 bits"),
    "sparse": (compressed("marlin-24", scheme(4, "int", "group")), "as marlin-24 are not supported"),
    "two-kinds-of-blocks": (
        {
            **compressed("float-quantized", scheme(8, "float", "block", block_structure=[1, 2])),
            "config_groups": {str(n): scheme(8, "float", "block", block_structure=[n, 2]) for n in (1, 2)},
        },
        "blocks of several sizes",
    ),
}


def test_a_refusal_repeats_the_beginning_of_a_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        saved(tmp_path, {"weight": torch.ones(2, 2)}, {"quant_method": "x" * 20_000})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", REFUSED)
def test_another_quantization_is_refused_by_its_name_with_advice(name: str, tmp_path: Path) -> None:
    config, said = REFUSED[name]
    with pytest.raises(UnsupportedModel, match=said) as caught:
        saved(tmp_path, {"weight": torch.ones(2, 2)}, config)
    assert "import the unquantized model" in str(caught.value)


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "too-few-scales": ("gptq-4", {"scales": torch.ones(3, OUT).half()}, "scales has shape"),
    "group-that-is-not-there": ("gptq-4-order", {"g_idx": torch.full((IN,), 8, dtype=torch.int32)}, "in which group"),
    "zeros-of-other-width": ("gptq-4", {"qzeros": torch.zeros(8, 7, dtype=torch.int32)}, "7 words for 24 outputs"),
    "words-of-bytes": ("awq", {"qweight": torch.zeros(IN, OUT, dtype=torch.uint8)}, "has type U8"),
    "a-stack": ("int8", {"weight": torch.zeros(2, OUT, IN, dtype=torch.int8)}, "only quantized matrices"),
    "another-shape": ("int4", {"weight_shape": torch.tensor([OUT + 1, IN])}, "weight_shape says"),
    "scales-of-nothing": ("int8", {"weight_scale": torch.ones(5, 1)}, "fits no weight"),
    "blocks-of-nothing": ("fp8-blocks", {"weight_scale_inv": torch.ones(3, 3)}, "where its weight needs"),
    "not-a-number": ("fp8-channel", {"weight": torch.full((OUT, IN), torch.nan).to(torch.float8_e4m3fn)}, "holds NaN"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_do_not_fit_each_other_are_an_error(name: str, tmp_path: Path) -> None:
    of, tensors, said = BROKEN[name]
    case = CASES[of]
    checkpoint = saved(tmp_path, case.quantize(weight()).tensors | tensors, case.config)
    with pytest.raises((CorruptModel, UnsupportedModel), match=said):
        checkpoint.read("m.weight")


def test_a_configuration_of_the_wrong_types_is_an_error(tmp_path: Path) -> None:
    wrong: list[Any] = [
        {"quant_method": "gptq", "bits": "four"},
        {"quant_method": "gptq"},
        {"quant_method": "fp8", "weight_block_size": [1]},
    ]
    for config in (*wrong, "gptq", ["gptq"], 4):
        with pytest.raises(CorruptModel):
            saved(tmp_path, {"weight": torch.ones(2, 2)}, config)


# -- the libraries that own the formats ------------------------------------------------------------------------------------

THEIRS = [name for name, case in CASES.items() if case.config["quant_method"] == "compressed-tensors" and name != "int4-zeros-in-bytes"]


@pytest.mark.parametrize("name", THEIRS)
def test_compressed_tensors_unpacks_the_same_numbers(name: str, tmp_path: Path) -> None:
    """With scales of 32 bits, the same bits; its own arithmetic has the 16 bits of the scales, to which ours then round."""
    pytest.importorskip("compressed_tensors", reason="the fixtures extra")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    case = CASES[name]
    tensors = case.quantize(weight()).tensors
    ours = torch.from_numpy(saved(tmp_path, tensors, case.config).read("m.weight"))
    entry = case.config["config_groups"]["group_0"]
    weights = {**entry["weights"], "symmetric": "weight_zero_point" not in tensors}
    bits = {"int3": 3, "int6": 6}.get(name, weights["num_bits"])
    theirs = QuantizationScheme(targets=["Linear"], weights={**weights, "num_bits": bits})
    library = BaseCompressor.get_value_from_registry(case.config["format"])
    unpacked = library.decompress(dict(tensors), theirs)["weight"]
    if unpacked.dtype != torch.float32:
        assert torch.equal(ours.to(unpacked.dtype), unpacked)
    if not name.endswith("fp4"):  # whose arithmetic has 16 bits in any case
        wide = {key: tensor.float() if key == "weight_scale" else tensor for key, tensor in tensors.items()}
        assert torch.equal(ours, library.decompress(wide, theirs)["weight"])


def test_transformers_widens_blocks_of_fp8_to_the_same_numbers(tmp_path: Path) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    tensors = fp8((8, 128), "weight_scale_inv")(weight()).tensors
    checkpoint = saved(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [8, 128]})
    theirs = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    assert torch.equal(torch.from_numpy(checkpoint.read("m.weight")), theirs)


def test_transformers_widens_mxfp4_experts_to_the_same_numbers() -> None:
    """gpt_oss: its blocks are of 32 inputs, and every scale is a power of two."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (3, 10, 4, 16), np.uint8)
    scales = rng.integers(90, 140, (3, 10, 4), np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(experts_of_blocks(blocks, scales), theirs.numpy())
