"""Hugging Face directories whose weights are quantized, packed as each method publishes its layout, with the numbers that they stand for.

The numbers come from the codes before they are packed, so that a test that reads the packed tensors compares two different ways.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

FP4 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_PLACES = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight each four bits of a word hold, the lowest bits first


@dataclass(frozen=True)
class Quantized:
    """The tensors of one weight by what stands after its module's name, and its numbers, float32 [out, in]."""

    tensors: dict[str, torch.Tensor]
    numbers: np.ndarray


Quantize = Callable[[np.ndarray], Quantized]


@dataclass(frozen=True)
class Codes:
    codes: np.ndarray  # [out, in], from 0 on
    scale: np.ndarray  # [out, groups], float16
    zero: np.ndarray  # [out, groups]
    group: np.ndarray  # [in]: which group an input is in

    @property
    def numbers(self) -> np.ndarray:
        lifted = self.codes.astype(np.float32) - self.zero.astype(np.float32)[:, self.group]
        return lifted * self.scale.astype(np.float32)[:, self.group]


def codes_of(weight: np.ndarray, bits: int, group: int, *, symmetric: bool, shuffled: bool = False) -> Codes:
    """Plain rounding to `bits`; with `shuffled` the inputs of a group are anywhere."""
    depth = weight.shape[1]
    size = depth if group == -1 else group
    index = np.arange(depth) // size
    if shuffled:
        index = np.random.default_rng(5).permutation(index)
    groups, top = int(index.max()) + 1, 2**bits - 1
    low = np.stack([np.minimum(weight[:, index == g].min(1), 0) for g in range(groups)], 1)
    high = np.stack([np.maximum(weight[:, index == g].max(1), 0) for g in range(groups)], 1)
    if symmetric:
        low, high = -np.maximum(-low, high), np.maximum(-low, high)
    scale = ((high - low) / top + 1e-4).astype(np.float16)
    zero = np.full(scale.shape, (top + 1) // 2) if symmetric else np.clip(np.rint(-low / scale.astype(np.float32)), 0, top)
    codes = np.clip(np.rint(weight / scale.astype(np.float32)[:, index]) + zero[:, index], 0, top)
    return Codes(codes.astype(np.uint8), scale, zero.astype(np.int64), index)


def words(codes: np.ndarray, bits: int) -> np.ndarray:
    """[rows, n] codes -> int32 [rows, ceil(n * bits / 32)]: one string of bits a row, least significant first."""
    rows, count = codes.shape
    size = -(-count * bits // 32)
    total = [sum(int(code) << (bits * at) for at, code in enumerate(row)) for row in codes]
    raw = b"".join(number.to_bytes(size * 4, "little") for number in total)
    return np.frombuffer(raw, "<i4").reshape(rows, size).copy()


def gptq(bits: int, group: int, *, symmetric: bool, shuffled: bool = False, version: int = 1) -> Quantize:
    def quantize(weight: np.ndarray) -> Quantized:
        made = codes_of(weight, bits, group, symmetric=symmetric, shuffled=shuffled)
        stored = words(made.zero.T, bits).view(np.uint32)
        if version == 1:  # less one in each field, a word at a time
            stored = stored - np.uint32(sum(1 << at for at in range(0, 32, bits)))
        tensors = {
            "qweight": torch.from_numpy(words(made.codes, bits).T.copy()),
            "qzeros": torch.from_numpy(stored.view(np.int32)),
            "scales": torch.from_numpy(made.scale.T.copy()),
            "g_idx": torch.from_numpy(made.group.astype(np.int32)),
        }
        return Quantized(tensors, made.numbers)

    return quantize


def awq(group: int) -> Quantize:
    def quantize(weight: np.ndarray) -> Quantized:
        made = codes_of(weight, 4, group, symmetric=False)

        def packed(codes: np.ndarray) -> torch.Tensor:  # [rows, out]
            eights = codes.reshape(len(codes), -1, 8)[:, :, AWQ_PLACES]
            return torch.from_numpy(words(eights.reshape(codes.shape), 4))

        tensors = {"qweight": packed(made.codes.T), "qzeros": packed(made.zero.T), "scales": torch.from_numpy(made.scale.T.copy())}
        return Quantized(tensors, made.numbers)

    return quantize


def packed_integers(bits: int, group: int, *, symmetric: bool, zeros_packed: bool = True) -> Quantize:
    """compressed-tensors' pack-quantized, with scales of bfloat16."""

    def quantize(weight: np.ndarray) -> Quantized:
        made = codes_of(weight, bits, group, symmetric=symmetric)
        scale = made.scale.astype(ml_dtypes.bfloat16)
        half = 1 << (bits - 1)
        tensors = {
            "weight_packed": torch.from_numpy(words(made.codes, bits)),
            "weight_scale": torch.from_numpy(scale.astype(np.float32)).bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            zeros = torch.from_numpy(words(made.zero.T.copy().T.T, bits).T.copy())
            tensors["weight_zero_point"] = zeros if zeros_packed else torch.from_numpy((made.zero - half).astype(np.int8))
        return Quantized(tensors, Codes(made.codes, scale, made.zero, made.group).numbers)

    return quantize


def plain_integers(group: int | None, *, symmetric: bool = True) -> Quantize:
    """int8 weights with a scale for the whole (None), for an output (-1) or for a group, of float32."""

    def quantize(weight: np.ndarray) -> Quantized:
        source = weight.reshape(1, -1) if group is None else weight
        made = codes_of(source, 8, -1 if group is None else group, symmetric=symmetric)
        tensors = {
            "weight": torch.from_numpy((made.codes.astype(np.int16) - 128).astype(np.int8).reshape(weight.shape)),
            "weight_scale": torch.from_numpy(made.scale.astype(np.float32)).reshape(1 if group is None else made.scale.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy((made.zero - 128).astype(np.int8)).reshape(tensors["weight_scale"].shape)
        return Quantized(tensors, made.numbers.reshape(weight.shape))

    return quantize


def fp8(block: tuple[int, int] | None, name: str) -> Quantize:
    """float8 weights with a scale for each block of outputs and inputs; (0, 0): for the whole; None: for an output."""

    def quantize(weight: np.ndarray) -> Quantized:
        out, depth = weight.shape
        high, wide = (out, depth) if block == (0, 0) else (1, depth) if block is None else block
        rows, columns = np.arange(out) // high, np.arange(depth) // wide
        scale = np.zeros((int(rows[-1]) + 1, int(columns[-1]) + 1), np.float32)
        np.maximum.at(scale, (rows[:, None], columns[None]), np.abs(weight) / 448)
        spread = scale[rows][:, columns]
        codes = (weight / spread).astype(ml_dtypes.float8_e4m3fn)
        shape = (1,) if block == (0, 0) else scale.shape
        tensors = {
            "weight": torch.from_numpy(codes.view(np.uint8)).view(torch.float8_e4m3fn),
            name: torch.from_numpy(scale).reshape(shape),
        }
        return Quantized(tensors, codes.astype(np.float32) * spread)

    return quantize


def nearest_fp4(weight: np.ndarray, scale: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """(bits of each number [out, in], what they stand for) with scales [out, groups]."""
    spread = np.repeat(scale, group, axis=1)
    bits = np.abs((weight / spread)[..., None] - FP4).argmin(-1).astype(np.uint8)
    return bits, FP4[bits] * spread


def mxfp4(weight: np.ndarray) -> Quantized:
    exponent = np.floor(np.log2(np.abs(weight.reshape(len(weight), -1, 32)).max(-1))).astype(np.int32) - 2
    bits, numbers = nearest_fp4(weight, np.ldexp(np.float32(1), exponent), 32)
    tensors = {"weight_packed": bits[:, 0::2] | bits[:, 1::2] << 4, "weight_scale": (exponent + 127).astype(np.uint8)}
    return Quantized({key: torch.from_numpy(value) for key, value in tensors.items()}, numbers)


def nvfp4(weight: np.ndarray) -> Quantized:
    largest = np.abs(weight.reshape(len(weight), -1, 16)).max(-1) / 6
    whole = np.float32(448 / largest.max())
    stored = (largest * whole).astype(ml_dtypes.float8_e4m3fn)
    bits, numbers = nearest_fp4(weight, stored.astype(np.float32) / whole, 16)
    tensors = {
        "weight_packed": torch.from_numpy(bits[:, 0::2] | bits[:, 1::2] << 4),
        "weight_scale": torch.from_numpy(stored.view(np.uint8)).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([whole]),
    }
    return Quantized(tensors, numbers)


def scheme(bits: int, kind: str, strategy: str, **rest: Any) -> dict[str, Any]:
    """A scheme of compressed-tensors' configuration."""
    return {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, "strategy": strategy, **rest}}


def compressed(layout: str, each: dict[str, Any]) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed", "config_groups": {"group_0": each}}


def write_quantized(
    directory: Path, model: Any, quantize: Quantize, config: dict[str, Any], *, others: torch.dtype = torch.float16
) -> None:
    """Save `model`, a float32 model of transformers, with the projections of its layers quantized (of experts [experts, out, in] one at a
    time) and all else as `others`. The model's own weights become the numbers that are stored."""
    model.save_pretrained(directory)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith("_proj.weight"):
                made = quantize(value.float().numpy())
                tensors |= {name.removesuffix("weight") + part: tensor.contiguous() for part, tensor in made.tensors.items()}
                value.copy_(torch.from_numpy(made.numbers))
            elif name.endswith("_proj") and value.ndim == 3:
                holder, _, kind = name.rpartition(".")
                kinds = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
                for expert, own in enumerate(value):
                    for part, rows in zip(kinds, own.chunk(len(kinds)), strict=True):
                        made = quantize(rows.float().numpy())
                        tensors |= {f"{holder}.{expert}.{part}.{each}": tensor.contiguous() for each, tensor in made.tensors.items()}
                        rows.copy_(torch.from_numpy(made.numbers))
            else:
                stored = value.to(others)
                value.copy_(stored.float())
                if not (name == "lm_head.weight" and model.config.tie_word_embeddings):
                    tensors[name] = stored.contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
