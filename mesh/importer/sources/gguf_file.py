"""GGUF files: metadata and tensors by name, from a memory map. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

The header is read here, and docs/adr/0005-gguf-header.md says why. The gguf package converts quantized tensors.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel, decoding
from mesh.importer.sources.gguf_blocks import FORMS, kept
from mesh.importer.sources.place import inside_source
from mesh.importer.write.kept import UNQUANTIZED, Kept, KeptForm

__all__ = ["GgufCheckpoint"]

MAGIC = b"GGUF"
SPLIT_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
# Bounds of what a header can say: far above any model, far below what would hurt to hold.
MOST_PAIRS = MOST_TENSORS = 100_000
MOST_DIMENSIONS = 8
MOST_ITEMS = 16_000_000  # of all arrays of metadata together; the merges of a large vocabulary are 500,000
MOST_NESTING = 4
MOST_PARTS = 10_000
DEQUANTIZE_ELEMENTS = 4 << 20  # at a time: the float32 working copies stay small

# value types of metadata: struct format of the fixed-size ones
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9

# tensor types that are stored as plain elements
PLAIN = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 28: np.dtype(np.float64), 30: np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, slots=True)
class _Entry:
    file: _File
    kind: int  # GGMLQuantizationType
    shape: tuple[int, ...]  # outermost first
    offset: int  # from the beginning of the file
    nbytes: int


class GgufCheckpoint:
    """The tensors of a model by name, and its `metadata`. A model split over several files is opened by its first."""

    def __init__(self, path: Path) -> None:
        """Read the headers. ModelNotFound, CorruptModel (truncated or inconsistent), UnsupportedModel (version, tensor type)."""
        self.path = Path(path)
        with decoding(CorruptModel, str(path)):
            self._open()

    def _open(self) -> None:
        first = _File(self.path)
        self.metadata = first.metadata
        self._files = [first]
        count = int(first.metadata.get("split.count", 1))
        if count > MOST_PARTS:
            raise CorruptModel(f"{self.path} says that it has {count} parts, which no model has; fetch it again")
        if count > 1:
            match = SPLIT_NAME.match(self.path.name)
            if match is None or match[2] != "00001":
                raise ModelNotFound(f"{self.path} is one of {count} parts: give the first, NAME-00001-of-{count:05d}.gguf")
            parts = (self.path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(2, count + 1))
            self._files += [_File(inside_source(part.parent, part.name)) for part in parts]
        self._entries = {name: entry for file in self._files for name, entry in file.entries.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor: a view of the file for unquantized types, float32 for quantized ones."""
        entry = self._entry(name)
        dtype = PLAIN.get(entry.kind)
        with decoding(CorruptModel, f"{entry.file.path}: tensor {name}"):
            if dtype is not None:
                count = math.prod(entry.shape)
                return np.frombuffer(entry.file.map, dtype, count, entry.offset).reshape(entry.shape)
            return _dequantize(entry, name)

    def form(self, name: str) -> KeptForm | None:
        """How a tensor [..., out, in] is stored, if a block can hold that: quantized, or as numbers of 16 bits."""
        entry = self._entry(name)
        if len(entry.shape) < 2:
            return None
        return UNQUANTIZED.get(PLAIN[entry.kind]) if entry.kind in PLAIN else FORMS.get(entry.kind)

    def kept(self, name: str) -> Kept:
        """The tensor as it is stored, of a type that has a `form`; what lies before its last axis is one: [... * out, in]."""
        entry, form = self._entry(name), self.form(name)
        if form is not None and not form.scaled:
            return Kept(form, self.read(name).reshape(-1, entry.shape[-1]))
        with decoding(CorruptModel, f"{entry.file.path}: tensor {name}"):
            out = math.prod(entry.shape[:-1])
            elements, size = block_sizes(entry.kind)
            stored = np.frombuffer(entry.file.map, np.uint8, entry.nbytes, entry.offset)
            return kept(entry.kind, stored.reshape(out, entry.shape[-1] // elements, size))

    def release(self) -> None:
        """Let go of the pages that reading brought in; the next read brings them back."""
        for file in self._files:
            file.map.madvise(mmap.MADV_DONTNEED)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CorruptModel(f"{self.path} has no tensor {name}, which its architecture needs: fetch or convert it again")
        return self._entries[name]


class _File:
    """One file: its map, metadata and tensor table."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = path.stat().st_size
                if file.read(4) != MAGIC:
                    raise CorruptModel(f"{path} is not a GGUF file: it does not begin with {MAGIC.decode()}")
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, IsADirectoryError):
            raise ModelNotFound(f"{path} is not a file: give a GGUF file") from None
        self._at = 4
        self._items = 0
        try:
            self._read()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError):
            raise CorruptModel(
                f"{path} is truncated: it has {self.size:,} bytes and its header does not end within them; fetch it again"
            ) from None

    def _read(self) -> None:
        version = self._scalar("I")
        if version not in (2, 3):
            raise UnsupportedModel(f"{self.path} is GGUF version {version} (or big-endian): only 2 and 3, little-endian, are supported")
        tensors, pairs = self._scalar("Q"), self._scalar("Q")
        self._require(tensors <= MOST_TENSORS and pairs <= MOST_PAIRS, f"{tensors:,} tensors and {pairs:,} pairs of metadata")
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._string()
            self.metadata[key] = self._value(self._scalar("I"))
        table = []
        for _ in range(tensors):
            name, rank = self._string(), self._scalar("I")
            self._require(rank <= MOST_DIMENSIONS, f"a tensor of {rank:,} dimensions")
            dims = [self._scalar("Q") for _ in range(rank)]
            self._require(all(dims), f"a tensor {name} of size zero")
            table.append((name, tuple(reversed(dims)), self._scalar("I"), self._scalar("Q")))
        alignment = self.metadata.get("general.alignment", 32)
        good = isinstance(alignment, int) and 0 < alignment <= 1 << 20 and alignment & (alignment - 1) == 0
        self._require(good, f"the alignment {alignment!r}")
        start = -(-self._at // alignment) * alignment
        self.entries = {
            name: _Entry(self, kind, shape, start + offset, _nbytes(self.path, name, kind, shape)) for name, shape, kind, offset in table
        }
        needed = max((entry.offset + entry.nbytes for entry in self.entries.values()), default=0)
        if needed > self.size:
            raise CorruptModel(f"{self.path} is truncated: it has {self.size:,} bytes where its header needs {needed:,}; fetch it again")

    def _require(self, good: bool, what: str) -> None:
        """CorruptModel, naming `what` the header says, unless it is `good`."""
        if not good:
            raise CorruptModel(f"{self.path}: its header says {what[:200]}, which no model has; fetch it again")

    def _scalar(self, layout: str) -> Any:
        value = struct.unpack_from("<" + layout, self.map, self._at)[0]
        self._at += struct.calcsize("<" + layout)
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if self._at + length > self.size:
            raise struct.error
        raw = self.map[self._at : self._at + length]
        self._at += length
        return raw.decode("utf-8", errors="surrogateescape")

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise struct.error
        item, count = self._scalar("I"), self._scalar("Q")
        self._items += count
        self._require(self._items <= MOST_ITEMS and depth < MOST_NESTING, f"an array of {count:,} items at depth {depth}")
        if item in SCALARS:
            values = list(struct.unpack_from(f"<{count}{SCALARS[item]}", self.map, self._at))
            self._at += struct.calcsize(f"<{count}{SCALARS[item]}")
            return values
        return [self._value(item, depth + 1) for _ in range(count)]


def block_sizes(kind: int) -> tuple[int, int]:
    """Elements and bytes of a block of tensor type `kind`."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    elements, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return int(elements), int(size)


def _nbytes(path: Path, name: str, kind: int, shape: tuple[int, ...]) -> int:
    try:
        block, size = block_sizes(kind)
    except (ValueError, KeyError):
        raise UnsupportedModel(f"{path}: tensor {name} has type {kind}, which is not known") from None
    if block > 1 and (not shape or shape[-1] % block):
        raise CorruptModel(f"{path}: tensor {name} {shape} is not made of blocks of {block}; fetch it again")
    return math.prod(shape) // block * size


def _dequantize(entry: _Entry, name: str) -> npt.NDArray[np.float32]:
    """The tensor as float32, converted a number of rows at a time."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType(entry.kind)
    result = np.empty(entry.shape, np.float32)
    rows = result.reshape(-1, entry.shape[-1])
    stored = np.frombuffer(entry.file.map, np.uint8, entry.nbytes, entry.offset).reshape(len(rows), -1)
    height = max(1, DEQUANTIZE_ELEMENTS // rows.shape[1])
    try:
        for start in range(0, len(rows), height):
            rows[start : start + height] = quants.dequantize(stored[start : start + height], kind)
    except NotImplementedError:
        raise UnsupportedModel(f"{entry.file.path}: tensor {name} has type {kind.name}, which the gguf package cannot convert") from None
    return result
