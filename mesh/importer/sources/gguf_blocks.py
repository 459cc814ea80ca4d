"""Quantized tensors of GGUF as codes, scales and minima: what a block holds in place of the numbers that they stand for.

    value = code * scale - minimum          (or + minimum)

Nothing is rounded a second time. A scale or a minimum of a K-quant is itself a code times a step for 8 or 16 groups, and stays that. The
layouts are those of ggml's block structs: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. Types that are not in `FORMS`
(tables, three bits and fewer) are widened to float32 by the gguf package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mesh.importer.write.kept import Kept, KeptForm

__all__ = ["FORMS", "TWICE_FP4", "half_powers", "kept"]

Array = npt.NDArray[Any]

_INT4, _UINT4 = np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.uint4)
_INT8, _UINT8 = np.dtype(np.int8), np.dtype(np.uint8)

TWICE_FP4 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)
"""Twice what a float of 4 bits (e2m1) stands for, by its bits."""

_E8M0_BIAS = 127

FORMS: dict[int, KeptForm] = {
    2: KeptForm("Q4_0", _INT4, 32, bits=4.5),
    3: KeptForm("Q4_1", _UINT4, 32, minimum="add", bits=5.0),
    6: KeptForm("Q5_0", _INT8, 32, bits=5.5),
    7: KeptForm("Q5_1", _UINT8, 32, minimum="add", bits=6.0),
    8: KeptForm("Q8_0", _INT8, 32, bits=8.5),
    12: KeptForm("Q4_K", _UINT4, 32, each=8, minimum="subtract", bits=4.5),
    13: KeptForm("Q5_K", _UINT8, 32, each=8, minimum="subtract", bits=5.5),
    14: KeptForm("Q6_K", _INT8, 16, each=16, bits=6.5625),
    39: KeptForm("MXFP4", _INT8, 32, bits=4.25),
}
"""By the number of the type in the file (GGMLQuantizationType)."""


def kept(kind: int, blocks: Array) -> Kept:
    """blocks uint8 [out, blocks, bytes of a block] -> what they say, [out, in]."""
    codes, scale, minimum = _READ[kind](blocks)
    form, rows = FORMS[kind], len(blocks)
    codes = np.ascontiguousarray(codes).reshape(rows, -1)
    if form.codes in (_INT4, _UINT4):
        codes = codes.astype(form.codes)
    return Kept(form, codes, _factors(scale, rows), _factors(minimum, rows))


def half_powers(exponents: Array) -> Array:
    """Half of the powers of two that e8m0 stands for, bfloat16: exact."""
    return np.ldexp(np.float32(1), exponents.astype(np.int32) - (_E8M0_BIAS + 1)).astype(ml_dtypes.bfloat16)


def _factors(each: Any, rows: int) -> tuple[Array, Array | None] | None:
    """Numbers of groups, or (codes, step of several groups)."""
    if each is None:
        return None
    data, step = each if isinstance(each, tuple) else (each, None)
    return np.ascontiguousarray(data).reshape(rows, -1), None if step is None else np.ascontiguousarray(step).reshape(rows, -1)


def _halves(blocks: Array, start: int) -> Array:
    """The float16 at `start` of each block."""
    return np.ascontiguousarray(blocks[..., start : start + 2]).view(np.float16)[..., 0]


def _nibbles(packed: Array) -> Array:
    """[..., n] bytes -> [..., 2 n] codes: the low halves, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth(blocks: Array, start: int) -> Array:
    """The fifth bits of the 32 codes of each block, in their place."""
    bits = np.unpackbits(np.ascontiguousarray(blocks[..., start : start + 4]), axis=-1, bitorder="little")
    return bits << 4


def _q4_0(blocks: Array) -> tuple[Any, Any, Any]:
    return _nibbles(blocks[..., 2:]).view(np.int8) - np.int8(8), _halves(blocks, 0), None


def _q4_1(blocks: Array) -> tuple[Any, Any, Any]:
    return _nibbles(blocks[..., 4:]), _halves(blocks, 0), _halves(blocks, 2)


def _q5_0(blocks: Array) -> tuple[Any, Any, Any]:
    codes = _nibbles(blocks[..., 6:]) | _fifth(blocks, 2)
    return codes.view(np.int8) - np.int8(16), _halves(blocks, 0), None


def _q5_1(blocks: Array) -> tuple[Any, Any, Any]:
    return _nibbles(blocks[..., 8:]) | _fifth(blocks, 4), _halves(blocks, 0), _halves(blocks, 2)


def _q8_0(blocks: Array) -> tuple[Any, Any, Any]:
    return np.ascontiguousarray(blocks[..., 2:]).view(np.int8), _halves(blocks, 0), None


def _six_bits(blocks: Array, start: int) -> tuple[Array, Array]:
    """Codes of scales and of minima [..., 8] each, from the 12 bytes at `start`."""
    a, b, c = (blocks[..., start + at : start + at + 4] for at in (0, 4, 8))
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=-1)
    return scale, np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=-1)


def _pairs(packed: Array) -> Array:
    """128 bytes of a block -> 256 codes: for each 32 bytes the low halves, then the high ones."""
    return _nibbles(packed.reshape(*packed.shape[:-1], 4, 32)).reshape(*packed.shape[:-1], 256)


def _q4_k(blocks: Array) -> tuple[Any, Any, Any]:
    scale, minimum = _six_bits(blocks, 4)
    return _pairs(np.ascontiguousarray(blocks[..., 16:])), (scale, _halves(blocks, 0)), (minimum, _halves(blocks, 2))


def _q5_k(blocks: Array) -> tuple[Any, Any, Any]:
    scale, minimum = _six_bits(blocks, 4)
    fifth = blocks[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # [..., 8 groups, 32]
    codes = _pairs(np.ascontiguousarray(blocks[..., 48:])) | fifth.reshape(*blocks.shape[:-1], 256) << 4
    return codes, (scale, _halves(blocks, 0)), (minimum, _halves(blocks, 2))


def _mxfp4(blocks: Array) -> tuple[Any, Any, Any]:
    return TWICE_FP4[_nibbles(blocks[..., 1:])], half_powers(blocks[..., 0]), None


def _q6_k(blocks: Array) -> tuple[Any, Any, Any]:
    lead = blocks.shape[:-1]
    low = _nibbles(np.ascontiguousarray(blocks[..., :128]).reshape(*lead, 2, 64)).reshape(*lead, 256)
    upper = np.ascontiguousarray(blocks[..., 128:192]).reshape(*lead, 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    codes = (low | upper.reshape(*lead, 256) << 4).view(np.int8) - np.int8(32)
    return codes, (np.ascontiguousarray(blocks[..., 192:208]).view(np.int8), _halves(blocks, 208)), None


_READ: dict[int, Callable[[Array], tuple[Any, Any, Any]]] = {
    2: _q4_0,
    3: _q4_1,
    6: _q5_0,
    7: _q5_1,
    8: _q8_0,
    12: _q4_k,
    13: _q5_k,
    14: _q6_k,
    39: _mxfp4,
}
