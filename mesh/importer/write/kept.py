"""A quantized weight that is kept as its source has it: codes, scales, zero points and minima, none of them rounded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["UNQUANTIZED", "Kept", "KeptForm", "SourceMatrix", "joined", "joined_experts", "one_form"]

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


UNQUANTIZED = {
    dtype: KeptForm(dtype.name, dtype, 0, bits=16, scaled=False) for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
}
"""Forms of weights that are numbers of 16 bits, by their type."""


@dataclass(frozen=True, slots=True)
class Kept:
    """codes [out, in]; scale, minimum and zero [out, groups], scale and minimum with their step [out, groups / each] where they have one.
    Where a row is one group, [out]. Of experts, the outputs are those of all of them, one expert after the other."""

    form: KeptForm
    codes: Array
    scale: Factors | None = None
    minimum: Factors | None = None
    zero: Array | None = None

    def rows(self, pick: Callable[[Array], Array]) -> Kept:
        """The same with `pick` applied to the outputs, which are the first axis of every array but the order's."""
        return joined([self], lambda arrays: pick(arrays[0]))

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


def one_form(forms: Sequence[KeptForm | None], shapes: Sequence[tuple[int, ...]]) -> KeptForm | None:
    """The form of weights that one weight can be made of; None where they differ in form or shape, or have inputs in an order of their
    own."""
    alike = len(set(shapes)) == 1 and all(form == forms[0] for form in forms)
    return forms[0] if alike and forms[0] is not None and forms[0].order is None else None


def joined(parts: Sequence[Kept], join: Callable[[Sequence[Array]], Array] = np.concatenate) -> Kept:
    """Weights of one form as one: `join` makes each of its arrays of theirs; they have the outputs as their first axis."""

    def of(each: Sequence[Any]) -> Any:
        return None if each[0] is None else join(each)

    def factors(each: Sequence[Any]) -> Any:
        return None if each[0] is None else (of([data for data, _ in each]), of([step for _, step in each]))

    return replace(
        parts[0],
        codes=of([part.codes for part in parts]),
        scale=factors([part.scale for part in parts]),
        minimum=factors([part.minimum for part in parts]),
        zero=of([part.zero for part in parts]),
    )


def joined_experts(parts: Sequence[Kept], experts: int, join: Callable[[Sequence[Array]], Array]) -> Kept:
    """The same for weights of experts: `join` is given each array as [experts, outputs of one, ...], and gives it so."""

    def of(arrays: Sequence[Array]) -> Array:
        made = join([array.reshape(experts, len(array) // experts, *array.shape[1:]) for array in arrays])
        return made.reshape(-1, *made.shape[2:])

    return joined(parts, of)


def _product(factors: Factors) -> Array:
    data, step = factors
    numbers = data.astype(np.float32)
    return numbers if step is None else numbers * np.repeat(step.astype(np.float32), data.shape[1] // step.shape[1], axis=1)


@dataclass(frozen=True)
class SourceMatrix:
    """A weight that a source stores as [out, in], or the weights of experts [experts, out, in], which is `experts` then. Calling it reads
    it as numbers, [in, out] or [experts, in, out].

    `form` and `keep`: how the source quantized it, if a block can hold that. `turned`: the graph of a traced source has the experts as
    [experts, in, out].
    """

    read: Callable[[], Array]
    form: KeptForm | None = None
    keep: Callable[[], Kept] | None = None
    experts: tuple[int, int, int] | None = None
    turned: bool = False

    def __call__(self) -> Array:
        return self.read().swapaxes(-1, -2)

    def transposed(self, pick: Callable[[Array], Array] = lambda array: array) -> SourceMatrix:
        """The same of a source that stores [in, out], with `pick` applied to the outputs. Groups of inputs lie along rows, so it has no
        form where it is quantized."""
        form, keep = self.form, self.keep
        if form is None or form.scaled or keep is None:
            return SourceMatrix(lambda: pick(self.read().T))
        return SourceMatrix(lambda: pick(self.read().T), form, lambda: keep().rows(lambda array: pick(array.T)))
