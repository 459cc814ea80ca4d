"""Weight-only quantization: the codes are as near as they can be, and blocks compute exactly with the weights they give back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ort_chain import Chain, relative_error
from tiny_models import LLAMA, logits_of, make_model, torch

from mesh.errors import ConfigError
from mesh.importer.options import ImportOptions
from mesh.importer.precision import fits
from mesh.importer.sources.safetensors import open_source
from mesh.importer.write.blocks import BlockWriter
from mesh.importer.write.narrow import fit
from mesh.importer.write.quantize import dequantize, half_type, quantize_rows, quantize_weight

GPT2 = {"vocab_size": 199, "hidden_size": 60, "num_hidden_layers": 2, "num_attention_heads": 5, "tie_word_embeddings": False}
MODELS = {
    "llama": ("Llama", LLAMA),
    "mixtral": ("Mixtral", {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}),
    "gpt2": ("GPT2", GPT2),
}
STORAGE = {
    "16": (ImportOptions(bits=16), 1e-4),
    "8": (ImportOptions(bits=8), 1e-4),
    "8-32": (ImportOptions(bits=8, group_size=32), 1e-4),
    "4": (ImportOptions(bits=4), 1e-4),
    "4-64": (ImportOptions(bits=4, group_size=64), 1e-4),
    "float16-4": (ImportOptions("float16", bits=4), 2e-2),
    # 16-bit arithmetic differs by itself; so does what it adds up
    "float16": (ImportOptions("float16"), 2e-2),
    "float16-8": (ImportOptions("float16", bits=8), 2e-2),
}


def stored(weight: np.ndarray, options: ImportOptions) -> np.ndarray:
    """[in, out] or [experts, in, out] as its block gives it back."""
    if options.bits == 16:
        return weight.astype(options.compute if options.dtype != "float32" else half_type(weight)).astype(np.float32)
    return dequantize(quantize_weight(weight, options.eight_bits() if options.bits == 4 else options))


def narrowed(rows: np.ndarray, options: ImportOptions, *, wide: bool) -> np.ndarray | None:
    """[..., out, in] as a block gives it back that holds it in 4 bits, or 6 if `wide`. None: its inputs are no whole groups."""
    assert options.group_size is not None
    depth = rows.shape[-1]
    bits: Literal[4, 6] = 6 if wide and fits(depth, options.group_size, 6) else 4
    if options.bits != 4 or not fits(depth, options.group_size, bits):
        return None
    return fit(rows.reshape(-1, depth), bits, options.group_size, options.compute).numbers().reshape(rows.shape)


def rounded(model: Any, options: ImportOptions) -> Any:
    """`model` with every weight as its block stores it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            array = parameter.numpy()
            if array.ndim < 2 or name.endswith("mlp.gate.weight"):  # norms, biases and routers stay
                continue
            table = name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight"))
            turned = ".c_" in name  # GPT-2 keeps [in, out]
            narrow = None
            if options.bits == 4:
                narrow = narrowed(array.T if turned else array, options, wide=table or name == "lm_head.weight")
            if narrow is not None:
                new = narrow.T if turned else narrow
            elif table:
                if options.width <= 8:
                    codes, scale = quantize_rows(array, options)
                    new = codes.astype(np.float32) * scale.astype(np.float32)
                else:
                    new = stored(array, options)
            elif turned:
                new = stored(array, options)
            else:
                new = stored(array.swapaxes(-1, -2), options).swapaxes(-1, -2)
            parameter.copy_(torch.from_numpy(np.ascontiguousarray(new)))
    return model


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_compute_with_the_weights_that_quantization_gives_back(name: str, storage: str, tmp_path: Path) -> None:
    options, bound = STORAGE[storage]
    model = make_model(*MODELS[name], tmp_path / "source")
    source = open_source(tmp_path / "source")
    source.write_blocks(BlockWriter(tmp_path), options, lambda *_: None)
    prompt = np.random.default_rng(1).integers(0, source.vocab_size, 9).tolist()
    assert relative_error(Chain(tmp_path, source.cache)(prompt), logits_of(rounded(model, options), prompt)) < bound


SHAPES = st.lists(st.integers(1, 70), min_size=2, max_size=3).map(tuple)
OPTIONS = [
    ImportOptions(bits=8),
    ImportOptions(bits=8, group_size=16),
]


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(0, 2**32), st.sampled_from(["normal", "heavy", "one", "zero"]), st.sampled_from(OPTIONS))
def test_every_element_is_within_its_groups_step(shape: tuple[int, ...], seed: int, kind: str, options: ImportOptions) -> None:
    rng = np.random.default_rng(seed)
    weight = {
        "normal": lambda: rng.standard_normal(shape),
        "heavy": lambda: rng.standard_t(2, shape).clip(-100, 100),
        "one": lambda: np.where(rng.random(shape) < 0.02, rng.standard_normal(shape), 0),
        "zero": lambda: np.zeros(shape),
    }[kind]().astype(np.float32)
    quantized = quantize_weight(weight, options)
    back = dequantize(quantized)
    assert back.shape == weight.shape
    block = quantized.block_size or weight.shape[-2]
    for start in range(0, weight.shape[-2], block):
        group = weight[..., start : start + block, :]
        error = np.abs(back[..., start : start + block, :] - group)
        largest = np.abs(group).max(axis=-2, keepdims=True)
        assert (error <= largest / 127 * 0.501 + 1e-6).all()


def test_options_say_what_is_wrong_with_them() -> None:
    assert ImportOptions("bfloat16").bits == 16
    assert ImportOptions(bits=4).group_size == 32
    for values, message in (
        ({"bits": 5}, "5 bits"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"bits": 16, "group_size": 32}, "group_size is for"),
        ({"bits": 4, "group_size": 48}, "group_size 48"),
    ):
        with pytest.raises(ConfigError, match=message):
            ImportOptions(**values)
