"""A quantized weight that is kept as its source has it: codes, scales and minima, none of them rounded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Kept", "KeptForm", "SourceMatrix"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class KeptForm:
    """How a kind of quantized weight is laid out: known before it is read.

    codes: their type. group: elements of a row that share a scale. each: groups that share a step of the scale (None: it is a number of
    its own). minimum: whether it is added or subtracted. bits: of one weight in the source, all told.
    """

    name: str
    codes: np.dtype[Any]
    group: int
    each: int | None = None
    minimum: Literal["add", "subtract"] | None = None
    bits: float = 0.0


@dataclass(frozen=True, slots=True)
class Kept:
    """codes [out, in]; scale and minimum [out, groups], with their step [out, groups / each] where they have one."""

    form: KeptForm
    codes: Array
    scale: tuple[Array, Array | None] | None
    minimum: tuple[Array, Array | None] | None = None

    def rows(self, pick: Callable[[Array], Array]) -> Kept:
        """The same with `pick` applied to the outputs, which are the first axis of every array."""

        def of(each: tuple[Array, Array | None] | None) -> Any:
            return None if each is None else (pick(each[0]), None if each[1] is None else pick(each[1]))

        return replace(self, codes=pick(self.codes), scale=of(self.scale), minimum=of(self.minimum))


@dataclass(frozen=True)
class SourceMatrix:
    """A weight that a source stores as [out, in]. Calling it reads it as numbers, [in, out].

    `form` and `keep`: how the source quantized it, if a block can hold that.
    """

    read: Callable[[], Array]
    form: KeptForm | None = None
    keep: Callable[[], Kept] | None = None

    def __call__(self) -> Array:
        return self.read().T
