"""Quantized weights of Hugging Face checkpoints as codes, scales and zero points: what a block holds in place of numbers.

    value = (code - zero point) * scale

A weight is several tensors of one module, `Parts`; each function here makes a `Packed` of one way to lay them out. Nothing is rounded:

    gptq              codes in words along the inputs, zero points along the outputs; g_idx: which group an input is in
    awq               codes and zero points in words along the outputs, in the order 0 2 4 6 1 3 5 7
    packed_integers   compressed-tensors: codes of 2 to 8 bits in words along the inputs
    plain             a weight of its own type (int8 or float8) and scales of the whole, of outputs, of groups, or of blocks
    four_bit_floats   MXFP4 and NVFP4: floats of 4 bits, twice which are whole numbers
    four_bit_experts  the MXFP4 of gpt_oss: all experts of a layer in one tensor
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.importer.passes.nbits import group_order
from mesh.importer.sources.gguf_blocks import TWICE_FP4, half_powers
from mesh.importer.sources.safetensors_file import SafetensorsCheckpoint
from mesh.importer.write.kept import Kept, KeptForm

__all__ = [
    "Packed",
    "Parts",
    "awq",
    "experts_of_blocks",
    "four_bit_experts",
    "four_bit_floats",
    "gptq",
    "packed_integers",
    "plain",
    "unpack_words",
]

Array = npt.NDArray[Any]

_INT4, _UINT4 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)
_INT8, _UINT8 = np.dtype(np.int8), np.dtype(np.uint8)
_FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the outputs of a word lie in it, in fours of bits."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The tensors of one module, `name`.PART, or with another `joint` in place of the dot."""

    checkpoint: SafetensorsCheckpoint
    name: str
    joint: str = "."

    def __contains__(self, part: str) -> bool:
        return f"{self.name}{self.joint}{part}" in self.checkpoint

    def shape(self, part: str) -> tuple[int, ...]:
        return self.checkpoint.shape(f"{self.name}{self.joint}{part}")

    def dtype(self, part: str) -> str:
        return self.checkpoint.dtype(f"{self.name}{self.joint}{part}")

    def read(self, part: str) -> Array:
        return self.checkpoint.read_packed(f"{self.name}{self.joint}{part}")

    def matrix(self, part: str, *dtypes: str) -> tuple[int, int]:
        """The shape of a part that must be a matrix of one of these types."""
        shape, dtype = self.shape(part), self.dtype(part)
        if dtype not in dtypes:
            raise UnsupportedModel(f"tensor {self.name}.{part} has type {dtype}, where only {' and '.join(dtypes)} are supported")
        if len(shape) != 2 or not all(shape):
            raise UnsupportedModel(f"tensor {self.name}.{part} has shape {list(shape)}: only quantized matrices are supported")
        return shape[0], shape[1]

    def expect(self, part: str, *shapes: tuple[int, ...]) -> None:
        """CorruptModel where a part has none of these shapes."""
        if self.shape(part) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            raise CorruptModel(f"tensor {self.name}{self.joint}{part} has shape {list(self.shape(part))} where its weight needs {wanted}")


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantized weight [out, in], or those of experts: their numbers are [experts, in, out], and they are kept one after the other, as
    [experts * out, in]. `form`: how a block holds it; None: it cannot, and only `numbers` is of use.

    The functions read it: what is in memory between their calls is the order of the inputs at most.
    """

    shape: tuple[int, ...]
    form: KeptForm | None
    kept: Callable[[], Kept]
    numbers: Callable[[], Array]


def _keep(shape: tuple[int, int], form: KeptForm, kept: Callable[[], Kept]) -> Packed:
    return Packed(shape, form, kept, lambda: kept().numbers())


def unpack_words(words: Array, bits: int, count: int) -> Array:
    """int32 words [rows, n] -> the first `count` codes of each row, uint8: a row is one string of bits, the lowest bit of a word first."""
    stored = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return stored[:, :count]
    if bits == 4:
        codes = np.empty((len(stored), stored.shape[1] * 2), np.uint8)
        codes[:, 0::2], codes[:, 1::2] = stored & 15, stored >> 4
        return codes[:, :count]
    each = np.unpackbits(stored, axis=1, bitorder="little")[:, : count * bits].reshape(len(stored), count, bits)
    return np.packbits(each, axis=2, bitorder="little")[..., 0]


def _signed(codes: Array, bits: int) -> Array:
    """uint8 codes less half their range, int8."""
    lowered: Array = codes - np.uint8(1 << (bits - 1))
    return lowered.view(np.int8)


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


# -- GPTQ ----------------------------------------------------------------------------------------------------------------


def gptq(parts: Parts, bits: int, group: int, first_version: bool) -> Packed:
    """`bits`, `group`: of most weights; others say by their shapes what they have. `group`: inputs of a group; -1: all. `first_version`:
    zero points are stored less one, which is added to whole words."""
    rows, out = parts.matrix("qweight", "I32")
    groups, packed = parts.matrix("qzeros", "I32")
    parts.expect("scales", (groups, out))
    bits = next((each for each in (bits, 2, 4, 8) if _words(out, each) == packed), 0)
    if not bits or rows * 32 % bits:
        raise UnsupportedModel(f"tensor {parts.name}.qzeros has {packed} words for {out} outputs: only 2, 4 and 8 bits are supported")
    depth = rows * 32 // bits
    group = depth if groups == 1 else group if groups == -(-depth // max(group, 1)) else _group(depth, groups)
    if groups != -(-depth // group):
        raise CorruptModel(f"tensor {parts.name}.scales has {groups} groups, which do not divide {depth} inputs")

    def zeros() -> Array:
        return _gptq_zeros(parts, bits, out, first_version)

    symmetric = bool((zeros() == 1 << (bits - 1)).all())
    index = parts.read("g_idx").astype(np.int32) if "g_idx" in parts else None

    def codes() -> Array:
        return unpack_words(np.ascontiguousarray(parts.read("qweight").T), bits, depth)

    def numbers_by(which: Array) -> Array:
        lifted = codes().astype(np.float32) - zeros().astype(np.float32)[:, which]
        return lifted * parts.read("scales").T.astype(np.float32)[:, which]

    order = None
    if index is not None:
        _check_index(parts, index, depth, group)
        try:
            order = group_order(index, group)
        except ValueError:  # no block has a form for it
            return Packed((out, depth), None, _not_kept, partial(numbers_by, index))

    narrow = bits <= 4
    form = KeptForm(
        f"GPTQ of {bits} bits",
        (_INT4 if narrow else _INT8) if symmetric else (_UINT4 if narrow else _UINT8),
        0 if groups == 1 else group,
        bits=bits + (16 if symmetric else 16 + bits) * groups / depth,
        zero=not symmetric,
        order=order,
    )

    def kept() -> Kept:
        values = codes() if order is None else codes()[:, order]
        scale = parts.read("scales").T
        return _kept_of(form, _signed(values, bits) if symmetric else values, scale, None if symmetric else zeros())

    return _keep((out, depth), form, kept)


def _gptq_zeros(parts: Parts, bits: int, out: int, first_version: bool) -> Array:
    """Zero points uint8 [out, groups]."""
    words = parts.read("qzeros").astype(np.int32).view(np.uint32)
    if first_version:
        words = words + np.uint32(sum(1 << at for at in range(0, 32, bits)))  # a word at a time, as it was subtracted
    return np.ascontiguousarray(unpack_words(words, bits, out).T)


def _check_index(parts: Parts, index: Array, depth: int, group: int) -> None:
    if index.shape != (depth,) or index.min(initial=0) < 0 or index.max(initial=0) >= -(-depth // group):
        raise CorruptModel(f"tensor {parts.name}.g_idx does not say for each of {depth} inputs in which group of {group} it is")


def _not_kept() -> Kept:
    raise UnsupportedModel("a block has no form for a weight whose groups are of unequal size")


# -- AWQ -----------------------------------------------------------------------------------------------------------------


def awq(parts: Parts, group: int) -> Packed:
    """The layout for GEMM, of 4 bits."""
    depth, words = parts.matrix("qweight", "I32")
    out = words * 8
    group = depth if group == -1 else group
    groups = -(-depth // group)
    parts.expect("qzeros", (groups, words))
    parts.expect("scales", (groups, out))
    form = KeptForm("AWQ of 4 bits", _UINT4, 0 if groups == 1 else group, bits=4 + 20 / group, zero=True)

    def outputs(part: str) -> Array:
        """[out, rows] of words [rows, out / 8]."""
        fours = unpack_words(parts.read(part), 4, out)
        return np.ascontiguousarray(fours.reshape(len(fours), words, 8)[:, :, AWQ_ORDER].reshape(len(fours), out).T)

    def kept() -> Kept:
        return _kept_of(form, outputs("qweight"), parts.read("scales").T, outputs("qzeros"))

    return _keep((out, depth), form, kept)


# -- compressed-tensors ------------------------------------------------------------------------------------------------------


def packed_integers(parts: Parts) -> Packed:
    """compressed-tensors' pack-quantized: signed codes, stored plus half their range."""
    out, words = parts.matrix("weight_packed", "I32")
    shape = parts.read("weight_shape").reshape(-1).tolist()
    if len(shape) != 2 or shape[0] != out or shape[1] < 1:
        raise CorruptModel(f"tensor {parts.name}.weight_shape says {shape} of a weight with {out} rows")
    depth = int(shape[1])
    bits = next((bits for bits in range(2, 9) if _words(depth, bits) == words), None)
    if bits is None:
        raise UnsupportedModel(f"tensor {parts.name}.weight_packed has {words} words for {depth} inputs: of no supported width")
    groups = _scale_of_groups(parts, out, depth).shape[1]
    index = parts.read("weight_g_idx").astype(np.int32) if "weight_g_idx" in parts else None
    if index is not None and (index < 0).all():
        index = None  # there is none
    group = _group(depth, groups)
    if index is not None:
        _check_index(parts, index, depth, group)
    try:
        order = None if index is None else group_order(index, group)
    except ValueError as error:
        raise UnsupportedModel(f"tensor {parts.name}.weight_g_idx: {error} are not supported") from None
    lifted = "weight_zero_point" in parts
    codes_type = _INT4 if bits <= 4 else _INT8
    form = KeptForm(
        f"int{bits}",
        codes_type,
        0 if groups == 1 else group,
        bits=bits + (16 + (bits if lifted else 0)) * groups / depth,
        zero=lifted,
        order=order,
    )

    def kept() -> Kept:
        codes = _signed(unpack_words(parts.read("weight_packed"), bits, depth), bits)
        zero = _packed_zeros(parts, bits, out, groups) if lifted else None
        return _kept_of(form, codes if order is None else codes[:, order], _scale_of_groups(parts, out, depth), zero)

    return _keep((out, depth), form, kept)


def _packed_zeros(parts: Parts, bits: int, out: int, groups: int) -> Array:
    """Zero points int8 [out, groups], packed along the outputs or not."""
    stored = parts.read("weight_zero_point")
    if stored.dtype == np.int8:
        parts.expect("weight_zero_point", (out, groups))
        return stored
    parts.expect("weight_zero_point", (_words(out, bits), groups))
    return np.ascontiguousarray(_signed(unpack_words(np.ascontiguousarray(stored.T), bits, out), bits).T)


def plain(parts: Parts, scale: str, block: tuple[int, int] | None = None) -> Packed:
    """A weight of int8 or float8 with the scales `scale`. `block`: outputs and inputs that share one, where scales are of blocks."""
    out, depth = parts.matrix("weight", "I8", "F8_E4M3")
    kind = parts.dtype("weight")
    scales = _scale_of_groups(parts, out, depth, scale, block)
    shape, size, groups = scales.shape, scales.dtype.itemsize, scales.shape[1]
    lifted = kind == "I8" and _zeros_of_groups(parts, shape) is not None
    name, codes_type = ("int8", _INT8) if kind == "I8" else ("fp8", _FLOAT8)
    group = 0 if groups == 1 else block[1] if block is not None and _is_blocks(parts, scale, out) else _group(depth, groups)
    form = KeptForm(name, codes_type, group, bits=8 + 8 * size * groups / depth, zero=lifted)

    def kept() -> Kept:
        zero = _zeros_of_groups(parts, shape) if lifted else None
        return _kept_of(form, parts.read("weight"), _scale_of_groups(parts, out, depth, scale, block), zero)

    return _keep((out, depth), form, kept)


def _kept_of(form: KeptForm, codes: Array, scale: Array, zero: Array | None) -> Kept:
    """Scales and zero points [out, groups]."""
    if not form.group:
        scale, zero = scale[:, 0], None if zero is None else zero[:, 0]
    return Kept(form, codes.astype(form.codes), (scale, None), zero=None if zero is None else zero.astype(form.codes))


def _zeros_of_groups(parts: Parts, shape: tuple[int, ...]) -> Array | None:
    """Zero points int8 [out, groups]; None where all are zero."""
    if "weight_zero_point" not in parts:
        return None
    zero = parts.read("weight_zero_point")
    zero = np.broadcast_to(zero.reshape(1, 1) if zero.size == 1 else zero.reshape(shape[0], -1), shape)
    return zero if zero.any() else None


def _is_blocks(parts: Parts, part: str, out: int) -> bool:
    shape = parts.shape(part)
    return len(shape) == 2 and math.prod(shape) > 1 and shape[0] != out


def _scale_of_groups(parts: Parts, out: int, depth: int, part: str = "weight_scale", block: tuple[int, int] | None = None) -> Array:
    """Scales [out, groups]: of the whole weight, of each output, of groups of each, or of blocks, said for each output."""
    scale = parts.read(part)
    if scale.dtype.name == "float8_e8m0fnu":
        scale = scale.astype(_BFLOAT16)  # the same powers of two
    if scale.size == 1:
        return np.broadcast_to(scale.reshape(1, 1), (out, 1))
    if scale.ndim == 1 and scale.shape == (out,):
        return scale[:, None]
    if _is_blocks(parts, part, out) and block is not None:
        high, wide = block
        parts.expect(part, (-(-out // high), -(-depth // wide)))
        return np.repeat(scale, high, axis=0)[:out]
    if scale.ndim != 2 or scale.shape[0] != out or not 1 <= scale.shape[1] <= depth:
        raise CorruptModel(f"tensor {parts.name}.{part} has shape {list(scale.shape)}, which fits no weight of [{out}, {depth}]")
    return scale


def _group(depth: int, groups: int) -> int:
    return -(-depth // groups)


# -- floats of 4 bits --------------------------------------------------------------------------------------------------------


def four_bit_floats(parts: Parts) -> Packed:
    """MXFP4 (scales are powers of two, for 32 inputs) and NVFP4 (scales are float8, for 16, and one of all that divides them)."""
    out, width = parts.matrix("weight_packed", "U8")
    depth = width * 2
    shared = parts.dtype("weight_scale") in ("U8", "F8_E8M0")
    group = 32 if shared else 16
    parts.expect("weight_scale", (out, depth // group))
    form = KeptForm("MXFP4" if shared else "NVFP4", _INT8, group, bits=4 + 8 / group)

    def kept() -> Kept:
        stored = parts.read("weight_scale")
        if shared:
            scale = half_powers(stored.view(np.uint8))
        else:
            scale = stored.astype(np.float32) / parts.read("weight_global_scale").astype(np.float32).reshape(()) * np.float32(0.5)
        return Kept(form, _twice(parts.read("weight_packed")), (scale, None))

    return _keep((out, depth), form, kept)


def four_bit_experts(parts: Parts) -> Packed:
    """Experts as blocks of 32 floats of 4 bits, each with a power of two as its scale."""
    shape = parts.shape("blocks")
    if parts.dtype("blocks") != "U8" or len(shape) != 4 or shape[-1] != 16 or not all(shape):
        raise UnsupportedModel(f"tensor {parts.name}{parts.joint}blocks is {parts.dtype('blocks')} of shape {list(shape)}: not supported")
    parts.expect("scales", shape[:-1])
    experts, out, groups, _ = shape

    form = KeptForm("MXFP4", _INT8, 32, bits=4.25)

    def numbers() -> Array:
        return experts_of_blocks(parts.read("blocks"), parts.read("scales").view(np.uint8))

    def kept() -> Kept:
        scales = half_powers(parts.read("scales").view(np.uint8)).reshape(-1, groups)
        return Kept(form, _twice(parts.read("blocks")).reshape(-1, groups * 32), (scales, None))

    return Packed((experts, groups * 32, out), form, kept, numbers)


def experts_of_blocks(blocks: Array, scales: Array) -> Array:
    """The experts of gpt_oss, blocks uint8 [experts, out, groups, 16] and scales uint8 [experts, out, groups] -> [experts, in, out]."""
    codes = _twice(blocks).astype(np.float32)  # [experts, out, groups, 32]
    codes *= half_powers(scales).astype(np.float32)[..., None]
    return codes.reshape(*codes.shape[:-2], -1).swapaxes(-1, -2)


def _twice(packed: Array) -> Array:
    """[..., n] bytes -> int8 [..., 2 n]: the low four bits are the first."""
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.int8)
    codes[..., 0::2], codes[..., 1::2] = TWICE_FP4[packed & 15], TWICE_FP4[packed >> 4]
    return codes
