"""Writing blocks to disk: the graph to NAME.onnx, its weights to NAME.onnx.data, one tensor in memory at a time.

See docs/model-format.md for what a block is; mesh/importer/write/blocks.py builds their graphs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from mesh.errors import UnsupportedModel
from mesh.model.manifest import BlockInfo, FileInfo
from mesh.model.onnx_form import IR_VERSION, OPSET

__all__ = ["INLINE_BYTES", "BlockWriter", "Weight", "WeightValue", "as_callable", "block_model"]

ALIGNMENT = 64
INLINE_BYTES = 1024  # weights of this size or more are external data
CHUNK_BYTES = 8 << 20
TRANSPOSE_TILE = 64

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that is produced only when it is written: an array of any strides, stored as `dtype` (None: its own type).

    Conversion and transposition happen slice by slice while writing, so `produce` may return a view of a mapped file. `counted`: how many
    parameters of the model each element is (None: one or none, as what it is used for says). `narrows`: it is one of those that `--bits`
    stores narrower.
    """

    produce: Callable[[], Array]
    dtype: np.dtype[Any] | Callable[[Array], np.dtype[Any]] | None = None
    counted: int | None = None
    narrows: bool = False


WeightValue = Array | Callable[[], Array] | Weight


class BlockWriter:
    """Writes blocks into one directory, which must exist. Files of the same name are replaced."""

    def __init__(self, directory: Path) -> None:
        self.directory = Path(directory)

    def write(self, name: str, model: ModelProto | GraphProto | ir.Model, weights: Mapping[str, WeightValue] | None = None) -> BlockInfo:
        """Write block `name` (embed, layer_NNN, head): the graph, the weights of `weights` that it uses, its own initializers.

        Weights are produced, written and dropped one at a time. UnsupportedModel if the graph is not valid ONNX.
        """
        values: dict[str, WeightValue] = dict(weights or {})
        if isinstance(model, ir.Model):
            proto, held = _from_ir(model)
            values = {**held, **values}
        else:
            proto = block_model(model) if isinstance(model, GraphProto) else model
        graph = _without_initializers(proto.graph)
        for tensor in proto.graph.initializer:
            values.setdefault(tensor.name, _initializer(tensor))
        used = {used for node in graph.node for used in node.input}
        scales = {extra for node in graph.node if node.op_type == "DequantizeLinear" for extra in node.input[1:]}
        quantized = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        data_path = self.directory / f"{name}.onnx.data"
        weight_bytes = parameters = 0
        data = _DataFile(data_path)
        try:
            for weight_name in [key for key in values if key in used]:
                value = values.pop(weight_name)
                tensor, stored_bytes = data.store(weight_name, value)
                graph.initializer.append(tensor)
                weight_bytes += stored_bytes
                counted = value.counted if isinstance(value, Weight) else None
                if counted is None:
                    counted = weight_name not in scales and (weight_name in quantized or _is_float(tensor.data_type))
                parameters += int(counted) * int(np.prod(tensor.dims, dtype=np.int64))
        finally:
            data.close()
        path = self.directory / f"{name}.onnx"
        graph.name = name
        files = [_write_model(path, block_model(graph))]
        if data.size:
            files.append(FileInfo(name=data_path.name, bytes=data.size, sha256=data.hash.hexdigest()))
        else:
            data_path.unlink()
        try:
            onnx.checker.check_model(os.fspath(path))
        except onnx.checker.ValidationError as error:
            raise UnsupportedModel(f"block {name} is not a valid ONNX model: {' '.join(str(error).split())}") from None
        return BlockInfo(name=name, files=tuple(files), weight_bytes=weight_bytes, parameters=parameters)


class _DataFile:
    """The external data of one block: aligned tensors one after the other, hashed as they are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.hash = hashlib.sha256()
        self._file: BinaryIO = path.open("wb")

    def store(self, name: str, value: WeightValue) -> tuple[TensorProto, int]:
        """The initializer of that name, inline or pointing into this file, and its stored bytes."""
        weight = value if isinstance(value, Weight) else Weight(as_callable(value))
        array = np.asarray(weight.produce())
        dtype = weight.dtype(array) if callable(weight.dtype) and not isinstance(weight.dtype, np.dtype) else weight.dtype
        dtype = np.dtype(dtype) if dtype is not None else array.dtype
        nbytes = stored_bytes(dtype, array.size)
        if nbytes < INLINE_BYTES:
            return numpy_helper.from_array(np.ascontiguousarray(array, dtype=dtype).reshape(array.shape), name), nbytes
        self._append(b"\0" * (-self.size % ALIGNMENT))
        offset = self.size
        for chunk in _chunks(array, dtype):
            self._append(chunk)
        tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(dtype), dims=array.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, entry in (("location", self.path.name), ("offset", str(offset)), ("length", str(self.size - offset))):
            tensor.external_data.add(key=key, value=entry)
        return tensor, nbytes

    def close(self) -> None:
        self._file.close()

    def _append(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.hash.update(data)
        self.size += len(data)


def stored_bytes(dtype: np.dtype[Any], elements: int) -> int:
    """Bytes of that many elements as ONNX stores them: 4-bit types are two to a byte."""
    return (elements + 1) // 2 if dtype.name in ("int4", "uint4") else elements * dtype.itemsize


def _chunks(array: Array, dtype: np.dtype[Any]) -> Iterator[memoryview]:
    """The stored bytes of `array` as `dtype`, in row-major order, about CHUNK_BYTES at a time."""
    if array.ndim > 2 and array[0].nbytes > CHUNK_BYTES and array[0].size % 2 == 0:
        for part in array:
            yield from _chunks(part, dtype)
        return
    rows = array.reshape(1) if array.ndim == 0 else array
    # an even number of rows, so that 4-bit elements of different chunks never share a byte
    height = max(2, CHUNK_BYTES // max(1, rows[0].size * dtype.itemsize) // 2 * 2)
    for start in range(0, len(rows), height):
        chunk = np.ascontiguousarray(_row_major(rows[start : start + height]), dtype=dtype).reshape(-1)
        if dtype.name in ("int4", "uint4"):
            codes = np.append(chunk, chunk[:1]).view(np.uint8) if chunk.size % 2 else chunk.view(np.uint8)
            chunk = (codes[0::2] & 0x0F) | (codes[1::2] & 0x0F) << 4
        yield memoryview(chunk.view(np.uint8))  # type: ignore[arg-type]


def _row_major(array: Array) -> Array:
    """`array` in row-major order. A transposed matrix is copied tile by tile: 3 times as fast as row by row."""
    if array.ndim != 2 or abs(array.strides[0]) >= abs(array.strides[1]):
        return array
    bits = array.view(f"u{array.itemsize}") if array.itemsize in (1, 2, 4, 8) else array  # small types copy faster as integers
    copy = np.empty(array.shape, bits.dtype)
    for column in range(0, array.shape[1], TRANSPOSE_TILE):
        copy[:, column : column + TRANSPOSE_TILE] = bits[:, column : column + TRANSPOSE_TILE]
    return copy.view(array.dtype)


def as_callable(value: WeightValue) -> Callable[[], Array]:
    if isinstance(value, Weight):
        return value.produce
    if callable(value):
        return value
    return lambda: value


def _initializer(tensor: TensorProto) -> WeightValue:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ValueError(f"initializer {tensor.name} is external data: give it in `weights`")
    return lambda: numpy_helper.to_array(tensor)


def _from_ir(model: ir.Model) -> tuple[ModelProto, dict[str, WeightValue]]:
    """The model without its initializers, and the initializers as weights that are read only when they are written."""
    values = list(model.graph.initializers.values())
    tensors = [value.const_value for value in values]
    held: dict[str, WeightValue] = {}
    try:
        for value, tensor in zip(values, tensors, strict=True):
            if tensor is not None:
                held[str(value.name)] = tensor.numpy
                # a description without data: serializing must not read the weights
                value.const_value = ir.ExternalTensor(
                    "unread", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=str(value.name)
                )
        proto = ir.to_proto(model)
    finally:
        for value, tensor in zip(values, tensors, strict=True):
            value.const_value = tensor
    del proto.graph.initializer[:]
    return proto, held


def _without_initializers(source: GraphProto) -> GraphProto:
    """A copy of the graph without its initializers, which would otherwise be in memory twice."""
    graph = GraphProto()
    graph.node.extend(source.node)
    graph.input.extend(source.input)
    graph.output.extend(source.output)
    graph.value_info.extend(source.value_info)
    return graph


def block_model(graph: GraphProto) -> ModelProto:
    model: ModelProto = helper.make_model(
        graph, producer_name="stagemesh", ir_version=IR_VERSION, opset_imports=[helper.make_opsetid("", OPSET)]
    )
    return model


def _write_model(path: Path, model: ModelProto) -> FileInfo:
    data = model.SerializeToString(deterministic=True)
    path.write_bytes(data)
    return FileInfo(name=path.name, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _is_float(data_type: int) -> bool:
    return data_type in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
