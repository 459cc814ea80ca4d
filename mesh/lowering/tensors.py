"""Initializers as arrays: views of external data where possible, never copies of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import jax.numpy as jnp
import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from mesh.errors import CorruptModel, decoding
from mesh.host.paths import inside
from mesh.lowering import static

__all__ = ["PackedFormat", "TensorReader", "unpack"]

_SHOWN = 200  # characters of a name in an error
# ONNX types stored several to a byte: bits, and whether the type is signed.
_PACKED: dict[int, tuple[int, bool]] = {
    TensorProto.INT4: (4, True),
    TensorProto.UINT4: (4, False),
    TensorProto.INT2: (2, True),
    TensorProto.UINT2: (2, False),
}


@dataclass(frozen=True)
class PackedFormat:
    """A tensor of `shape` whose elements of `bits` bits are stored in bytes, the first in the lowest bits (as ONNX packs them)."""

    shape: tuple[int, ...]
    bits: int
    signed: bool


def _stored_bits(tensor: TensorProto) -> int | None:
    """Bits of an element where several share a byte, else None."""
    return 4 if tensor.data_type == TensorProto.FLOAT4E2M1 else _PACKED.get(tensor.data_type, (None,))[0]


def unpack(value: Any, packed: PackedFormat) -> Any:
    """Packed bytes uint8 [n] -> int8 or uint8 [shape]; anything else (an object the runtime put there) is returned as it is.

    numpy in, numpy out; traced in, traced out.
    """
    if not isinstance(value, np.ndarray) and not static.is_traced(value):
        return value
    xp: Any = jnp if static.is_traced(value) else np
    shifts = np.arange(0, 8, packed.bits, dtype=np.uint8)
    fields = (value[:, None] >> shifts) & np.uint8((1 << packed.bits) - 1)
    flat = fields.reshape(-1)[: math.prod(packed.shape)].reshape(packed.shape)
    if not packed.signed:
        return flat
    high = np.int8(1 << (packed.bits - 1))
    return (flat.astype(xp.int8) ^ high) - high


class TensorReader:
    """Reads TensorProtos of one model. External files are mapped once and their tensors are views of the map."""

    def __init__(self, base_dir: Path | None) -> None:
        self._base_dir = base_dir
        self._files: dict[str, np.ndarray] = {}

    def read(self, tensor: TensorProto) -> np.ndarray:
        """The tensor as numpy, small types (bfloat16, float8, int4 ...) by ml_dtypes, one byte or more an element. CorruptModel: it is
        not what its type and shape say."""
        with decoding(CorruptModel, f"tensor {tensor.name[:_SHOWN]!r}"):
            return self._read(tensor)

    def _read(self, tensor: TensorProto) -> np.ndarray:
        if uses_external_data(tensor):
            stored = self._external(tensor)
            bits = _stored_bits(tensor)
            if bits is None:
                return stored
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
            if tensor.data_type == TensorProto.FLOAT4E2M1:  # ml_dtypes keeps its code in the low bits of a byte
                return np.asarray(unpack(stored, PackedFormat(tuple(tensor.dims), bits, signed=False))).view(dtype)
            return np.asarray(unpack(stored, PackedFormat(tuple(tensor.dims), bits, _PACKED[tensor.data_type][1]))).astype(dtype)
        if tensor.HasField("raw_data") and _stored_bits(tensor) is None:
            dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
            count = math.prod(tensor.dims)
            if len(tensor.raw_data) != count * dtype.itemsize:
                raise CorruptModel(f"tensor {tensor.name!r} has {len(tensor.raw_data)} bytes where its shape says {count * dtype.itemsize}")
            return np.frombuffer(tensor.raw_data, dtype=dtype.newbyteorder("<") if dtype.kind in "iuf" else dtype).reshape(
                tuple(tensor.dims)
            )
        return np.asarray(numpy_helper.to_array(tensor))

    def read_packed(self, tensor: TensorProto) -> np.ndarray:
        """The bytes of a packed tensor, uint8 [n]. CorruptModel as for `read`."""
        with decoding(CorruptModel, f"tensor {tensor.name[:_SHOWN]!r}"):
            return self._read_packed(tensor)

    def _read_packed(self, tensor: TensorProto) -> np.ndarray:
        if uses_external_data(tensor):
            return self._external(tensor)
        if tensor.HasField("raw_data"):
            return np.frombuffer(tensor.raw_data, dtype=np.uint8)
        return np.asarray(tensor.int32_data, dtype=np.uint8)

    @staticmethod
    def packed_format(tensor: TensorProto) -> PackedFormat | None:
        if tensor.data_type not in _PACKED:
            return None
        bits, signed = _PACKED[tensor.data_type]
        return PackedFormat(tuple(tensor.dims), bits, signed)

    def _external(self, tensor: TensorProto) -> np.ndarray:
        try:
            info = ExternalDataInfo(tensor)
        except ValueError as error:
            raise CorruptModel(str(error)) from None
        whole = self._map(info.location, tensor.name)
        bits = _stored_bits(tensor)
        if bits is not None:
            dtype, shape = np.dtype(np.uint8), (-(-math.prod(tensor.dims) * bits // 8),)
        else:
            dtype, shape = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type)), tuple(tensor.dims)
        length = math.prod(shape) * dtype.itemsize
        offset = info.offset or 0
        stated: Any = info.length
        if stated is not None and stated != length:
            raise CorruptModel(f"tensor {tensor.name!r} has {stated} bytes of external data where its shape says {length}")
        if offset + length > whole.size:
            raise CorruptModel(
                f"{info.location} ends at byte {whole.size:,}, but tensor {tensor.name!r} reaches byte {offset + length:,}: "
                f"the file is truncated; fetch or export it again"
            )
        return whole[offset : offset + length].view(dtype).reshape(shape)

    def _map(self, location: str, tensor_name: str) -> np.ndarray:
        if location not in self._files:
            path = PurePosixPath(location)
            if not location or path.is_absolute() or ".." in path.parts or "\\" in location:
                raise CorruptModel(f"tensor {tensor_name!r} points outside the model's folder ({location!r})")
            if self._base_dir is None:
                raise CorruptModel(f"tensor {tensor_name!r} is in {location}, but the model was given without its folder")
            file = inside(Path(self._base_dir), str(path))
            if not file.is_file():
                raise CorruptModel(f"{file} is missing (tensor {tensor_name!r} is in it): put it beside the model's .onnx file")
            size = file.stat().st_size
            self._files[location] = np.asarray(np.memmap(file, dtype=np.uint8, mode="r")) if size else np.zeros(0, np.uint8)
        return self._files[location]
