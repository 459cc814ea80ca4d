"""Safetensors files of a Hugging Face directory: one, or several with an index. Only headers are read before a tensor is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel, decoding, short
from mesh.host.pages import PIECE_BYTES
from mesh.importer.sources.place import inside_source, refuse_pointer
from mesh.importer.write.kept import UNQUANTIZED, Kept, KeptForm

__all__ = ["INDEX", "SINGLE", "SafetensorsCheckpoint", "checkpoint_bytes", "read_json"]

MOST_JSON_BYTES = 64 * 1024 * 1024  # of config.json or an index
MOST_HEADER_BYTES = 64 * 1024 * 1024
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types of weights that can be imported, by safetensors' names. The library finds bfloat16 because ml_dtypes is imported."""

PACKED_DTYPES = {
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
"""Types that parts of a quantized weight may have."""


def read_json(path: Path) -> dict[str, Any]:
    refuse_pointer(path)
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise CorruptModel(f"{path} has {path.stat().st_size:,} bytes, where at most {MOST_JSON_BYTES:,} are read: fetch it again")
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{path} is not JSON ({error}): fetch it again") from None
    if not isinstance(value, dict):
        raise CorruptModel(f"{path} is not a JSON object: fetch it again")
    return value


def checkpoint_bytes(directory: Path) -> int:
    """What its weights take in files."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class _Entry:
    path: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsCheckpoint:
    """The tensors of a directory by name. Each read opens the file and copies that tensor out of it; nothing else stays in memory."""

    def __init__(self, entries: dict[str, _Entry], directory: Path) -> None:
        self._entries = entries
        self._directory = directory

    @classmethod
    def open(cls, directory: Path) -> SafetensorsCheckpoint:
        """Read the headers. CorruptModel: a file is missing, truncated or inconsistent. ModelNotFound: no weights at all."""
        with decoding(CorruptModel, f"{directory}: the list of weights"):
            return cls._open(directory)

    @classmethod
    def _open(cls, directory: Path) -> SafetensorsCheckpoint:
        index_path = directory / INDEX
        entries: dict[str, _Entry] = {}
        if (directory / SINGLE).is_file():
            files = [SINGLE]
        elif index_path.is_file():
            files = sorted({str(file) for file in read_json(index_path).get("weight_map", {}).values()})
        elif any(directory.glob("pytorch_model*.bin")):
            raise UnsupportedModel(f"{directory} has pytorch_model.bin only: convert it to safetensors (save_pretrained does)")
        else:
            raise ModelNotFound(f"{directory} has neither {SINGLE} nor {INDEX}")
        for file in files:
            path = directory / file
            if path.parent != directory:
                raise CorruptModel(f"{index_path}: {short(repr(file))} is not a file of this directory")
            inside_source(directory, file)
            if not path.is_file():
                raise CorruptModel(f"{path} is missing though {INDEX} names it: fetch it")
            entries.update(_read_header(path))
        return cls(entries, directory)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, name: str) -> npt.NDArray[Any]:
        entry = self._entry(name)
        if entry.dtype not in DTYPES:
            raise UnsupportedModel(f"{entry.path}: tensor {name} has type {entry.dtype}: only {', '.join(DTYPES)} are supported")
        with _opened(entry.path) as file, decoding(CorruptModel, f"{entry.path}: tensor {name}"):
            array = np.asarray(file.get_tensor(name), DTYPES[entry.dtype])
        with np.errstate(all="ignore"):
            suspicious = np.isnan(array.sum(dtype=np.float32))  # much faster than a look at each number
        if suspicious and np.isnan(array).any():
            raise _not_a_number(entry.path, name)
        return array

    def read_wide(self, name: str) -> npt.NDArray[Any]:
        """The tensor as float32; never in memory with as many narrow numbers: its file is mapped for one piece at a time."""
        entry = self._entry(name)
        if entry.dtype not in DTYPES or entry.dtype == "F32" or not entry.shape:
            return self.read(name).astype(np.float32, copy=False)
        wide = np.empty(entry.shape, np.float32)
        height = max(1, PIECE_BYTES // max(1, wide[:1].nbytes))
        for start in range(0, len(wide), height):
            piece = wide[start : start + height]
            with _opened(entry.path) as file, decoding(CorruptModel, f"{entry.path}: tensor {name}"):
                piece[...] = np.asarray(file.get_slice(name)[start : start + len(piece)], DTYPES[entry.dtype])
            if np.isnan(piece).any():
                raise _not_a_number(entry.path, name)
        return wide

    def dtype(self, name: str) -> str:
        """The type of a tensor as safetensors calls it."""
        return self._entry(name).dtype

    def read_packed(self, name: str) -> npt.NDArray[Any]:
        """A part of a quantized weight: of a type of DTYPES or of PACKED_DTYPES."""
        entry = self._entry(name)
        if entry.dtype in DTYPES:
            return self.read(name)
        if entry.dtype not in PACKED_DTYPES:
            raise UnsupportedModel(f"{entry.path}: tensor {name} has type {entry.dtype}, which no supported quantization uses")
        dtype = PACKED_DTYPES[entry.dtype]
        if dtype.kind in "iu":
            with _opened(entry.path) as file, decoding(CorruptModel, f"{entry.path}: tensor {name}"):
                return np.asarray(file.get_tensor(name), dtype)
        array = _eight_bits(entry.path, name).view(dtype).reshape(entry.shape)  # the library gives numpy none of these
        if np.isnan(array).any():
            raise _not_a_number(entry.path, name)
        return array

    def form(self, name: str) -> KeptForm | None:
        """That of a matrix of 16 bits, which keeps them; None for all others."""
        entry = self._entry(name)
        dtype = DTYPES.get(entry.dtype)
        return UNQUANTIZED.get(dtype) if dtype is not None and len(entry.shape) == 2 else None

    def kept(self, name: str) -> Kept:
        form = self.form(name)
        if form is None:
            raise UnsupportedModel(f"{self._directory}: tensor {name} is not a matrix of 16 bits")
        return Kept(form, self.read(name))

    def release(self) -> None:
        """Nothing is held between reads."""

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CorruptModel(f"{self._directory} has no tensor {name}: its weights are not those of its config.json")
        return self._entries[name]


def _read_header(path: Path) -> dict[str, _Entry]:
    """The tensors of one file, from its header alone."""
    with _opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {name: _Entry(path, part.get_dtype(), tuple(part.get_shape())) for name, part in parts.items()}


def _opened(path: Path) -> Any:
    """The file as the safetensors library opens it. CorruptModel if it is not whole: the library checks every offset and shape."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UnsupportedModel(f"reading {path} needs the import extra: pip install 'stagemesh[import]'") from None
    refuse_pointer(path)
    with path.open("rb") as start:
        size = int.from_bytes(start.read(8), "little")
    if size > MOST_HEADER_BYTES:
        raise CorruptModel(
            f"{path} is not a whole safetensors file: it has {path.stat().st_size:,} bytes, and its header would have {size:,}, "
            f"where {MOST_HEADER_BYTES:,} are the most; fetch it again"
        )
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        size = path.stat().st_size
        raise CorruptModel(f"{path} is not a whole safetensors file: it has {size:,} bytes ({error}); fetch it again") from None


def _eight_bits(path: Path, name: str) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor whose elements have one each, where the header says that they lie. The library has checked the header."""
    with path.open("rb") as file, decoding(CorruptModel, f"{path}: tensor {name}"):
        size = int.from_bytes(file.read(8), "little")
        start, end = json.loads(file.read(size))[name]["data_offsets"]
        file.seek(8 + size + start)
        return np.fromfile(file, np.uint8, end - start)


def _not_a_number(path: Path, name: str) -> CorruptModel:
    return CorruptModel(f"{path}: tensor {name} holds NaN, with which no token can be computed: fetch it again")
