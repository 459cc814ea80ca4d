"""The named tensors of a checkpoint. Each is read only when its block is written, and reshaped then as the block needs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mesh.errors import CorruptModel
from mesh.importer.families.spec import Linear, Norm
from mesh.importer.write.kept import Kept, KeptForm, SourceMatrix, joined, one_form

__all__ = ["Checkpoint", "Tensors"]

Array = npt.NDArray[Any]


class Checkpoint(Protocol):
    """Tensors by name. `read` may return a view of a mapped file; CorruptModel if the name is missing."""

    def __contains__(self, name: str) -> bool: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read(self, name: str) -> Array: ...
    def form(self, name: str) -> KeptForm | None:
        """How the tensor is quantized, if a block can hold that; `kept` reads it so."""
        ...

    def kept(self, name: str) -> Kept: ...
    def release(self) -> None: ...


class Tensors:
    """A checkpoint under a prefix. `used` records the full names of the tensors that were asked for; others belong to no known part."""

    def __init__(self, checkpoint: Checkpoint, prefix: str = "") -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.used: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.checkpoint

    def shape(self, name: str) -> tuple[int, ...]:
        """CorruptModel if the tensor is missing."""
        return self.checkpoint.shape(self.prefix + name)

    def tensor(
        self, name: str, change: Callable[[Array], Array] | None = None, *, shape: tuple[int | None, ...] | None = None
    ) -> Callable[[], Array]:
        """A function that reads the tensor and applies `change`.

        CorruptModel at once, not when it is read, if the tensor is missing or not of `shape` (None: any size).
        """
        full = self.prefix + name
        found = self.checkpoint.shape(full)
        if shape is not None and (
            len(found) != len(shape) or any(want not in (None, have) for want, have in zip(shape, found, strict=True))
        ):
            wanted = ["any" if size is None else size for size in shape]
            raise CorruptModel(f"tensor {full} has shape {list(found)} where the configuration needs {wanted}")
        self.used.add(full)
        if change is None:
            return lambda: self.checkpoint.read(full)
        return lambda: change(self.checkpoint.read(full))

    def optional(self, name: str, change: Callable[[Array], Array] | None = None) -> Callable[[], Array] | None:
        return self.tensor(name, change) if name in self else None

    def linear(
        self, name: str, part: slice | Callable[[Array], Array] | None = None, *, shape: tuple[int | None, int | None] = (None, None)
    ) -> Linear:
        """`name`.weight stored [out, in] = `shape`, and `name`.bias if there is one. `part` takes some of the output rows of both."""
        pick = part if callable(part) else (lambda array: array[part]) if part is not None else (lambda array: array)
        return Linear(self.matrix(f"{name}.weight", pick, shape=shape), self.optional(f"{name}.bias", pick))

    def matrix(
        self, name: str, pick: Callable[[Array], Array] = lambda array: array, *, shape: tuple[int | None, int | None] = (None, None)
    ) -> SourceMatrix:
        """The weight `name`, stored [out, in] = `shape`, with `pick` applied to its outputs."""
        read = self.tensor(name, pick, shape=shape)
        full = self.prefix + name
        form = self.checkpoint.form(full)
        return SourceMatrix(read, form, None if form is None else lambda: self.checkpoint.kept(full).rows(pick))

    def experts(self, name: str) -> SourceMatrix:
        """The weights of all experts, of one tensor [experts, out, in]."""
        read, full = self.tensor(name, shape=(None, None, None)), self.prefix + name
        form, (experts, out, depth) = self.checkpoint.form(full), self.shape(name)
        return SourceMatrix(read, form, None if form is None else lambda: self.checkpoint.kept(full), (experts, out, depth))

    def stack(self, names: Sequence[str]) -> SourceMatrix:
        """The same of a tensor [out, in] for each expert. They are kept where all have one form."""
        readers = [self.tensor(name, shape=(None, None)) for name in names]
        full = [self.prefix + name for name in names]
        forms, (out, depth) = [self.checkpoint.form(name) for name in full], self.shape(names[0])

        def read() -> Array:
            first = readers[0]()
            stacked = np.empty((len(readers), *first.shape), first.dtype)
            for index, each in enumerate(readers):
                stacked[index] = each()
            return stacked

        form = one_form(forms, [self.shape(name) for name in names])
        keep = None if form is None else lambda: joined([self.checkpoint.kept(name) for name in full])
        return SourceMatrix(read, form, keep, (len(names), out, depth))

    def norm(self, name: str, *, plus_one: bool = False) -> Norm:
        """`name`.weight and `name`.bias if there is one. `plus_one`: stored as the multiplier less one."""
        change = (lambda array: array.astype(np.float32) + 1) if plus_one else None
        return Norm(self.tensor(f"{name}.weight", change), self.optional(f"{name}.bias"))

    def optional_norm(self, name: str, *, plus_one: bool = False) -> Norm | None:
        return self.norm(name, plus_one=plus_one) if f"{name}.weight" in self else None
