"""A quantized weight that is kept as its source has it: codes, scales, zero points and minima, none of them rounded again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

__all__ = ["Kept", "KeptForm", "SourceMatrix"]

Array = npt.NDArray[Any]
Factors = tuple[Array, Array | None]
"""Numbers [out, groups], and the step [out, groups / each] that they are multiplied with where they have one."""


@dataclass(frozen=True, slots=True)
class KeptForm:
    """How a kind of quantized weight is laid out: known before it is read.

    codes: their type; a float type of 16 bits without a scale is a weight that is not quantized. group: elements of a row that share a
    scale; 0: a row has one. each: groups that share a step of the scale (None: it is a number of its own). zero: whether groups have a zero
    point, of the codes' type. minimum: whether it is added or subtracted. order: which input each column of the codes is multiplied with,
    where they are not in order, so that those of a group are side by side. bits: of one weight in the source, all told.
    """

    name: str
    codes: np.dtype[Any]
    group: int
    each: int | None = None
    minimum: Literal["add", "subtract"] | None = None
    bits: float = 0.0
    scaled: bool = True
    zero: bool = False
    order: Array | None = field(default=None, compare=False)

    @property
    def has_rows(self) -> bool:
        """Whether a table of this form can be read row by row."""
        return not self.scaled or (self.group > 0 and not self.zero and self.order is None and self.codes.name != "float8_e4m3fn")


@dataclass(frozen=True, slots=True)
class Kept:
    """codes [out, in]; scale, minimum and zero [out, groups], scale and minimum with their step [out, groups / each] where they have one.
    Where a row is one group, [out]."""

    form: KeptForm
    codes: Array
    scale: Factors | None = None
    minimum: Factors | None = None
    zero: Array | None = None

    def rows(self, pick: Callable[[Array], Array]) -> Kept:
        """The same with `pick` applied to the outputs, which are the first axis of every array but the order's."""

        def of(each: Factors | None) -> Any:
            return None if each is None else (pick(each[0]), None if each[1] is None else pick(each[1]))

        zero = None if self.zero is None else pick(self.zero)
        return replace(self, codes=pick(self.codes), scale=of(self.scale), minimum=of(self.minimum), zero=zero)

    def numbers(self) -> Array:
        """What it stands for, float32 [out, in], by the same steps as the nodes of a block take."""
        values = self.codes.astype(np.float32)
        if self.zero is not None:
            values -= self._spread(self.zero.astype(np.float32))
        if self.scale is not None:
            values *= self._spread(_product(self.scale))
        if self.minimum is not None:
            each = self._spread(_product(self.minimum))
            values = values + each if self.form.minimum == "add" else values - each
        if self.form.order is None:
            return values
        turned = np.empty_like(values)
        turned[:, self.form.order] = values
        return turned

    def _spread(self, each: Array) -> Array:
        """Numbers of groups over the elements that they are for."""
        if each.ndim == 1:
            return each[:, None]
        return np.repeat(each, self.form.group, axis=1)[:, : self.codes.shape[1]]


def _product(factors: Factors) -> Array:
    data, step = factors
    numbers = data.astype(np.float32)
    return numbers if step is None else numbers * np.repeat(step.astype(np.float32), data.shape[1] // step.shape[1], axis=1)


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
