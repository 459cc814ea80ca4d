"""Which weights of a model are held at 4 bits and which at 6, under `--bits 4`.

The rule asks for shapes alone, so it is the same for every family and source. All matrices and tables begin at 4 bits. Then these get 6, as
long as the whole model (every weight, scales and minima included, a table that is tied to the head once) stays within BUDGET bits a weight:

1. the head, and the table with it where they are tied: its error reaches every logit undamped;
2. tables of positions, which are small;
3. matrices with fewer outputs than inputs, the smallest first: keys and values of grouped queries, then what leads out of the MLP. Each
   output carries the error of many inputs. Of equal ones those of the first and the last eighth of the layers come first, then every third
   layer, as the K-quants of llama.cpp have it;
4. a table of tokens of its own.

A weight whose inputs are no whole groups is held at 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy.typing as npt

__all__ = ["BUDGET", "NARROW_GROUP", "NarrowBits", "Rounding", "Surveyed", "bits_of", "choose", "fits", "groups_of_a_step"]

NarrowBits = Literal[4, 6]

NARROW_GROUP = 32
MOST_GROUPS = 32  # that share a step

BUDGET = 5.0
"""Bits a weight, of the whole model."""

Role = Literal["product", "tokens", "positions", "head"]
Key = tuple[str, str]
"""The block and the name of a weight."""


@dataclass(frozen=True, eq=False, slots=True)
class Surveyed:
    """What is known of a weight before it is rounded. shape: of a product [in, out] or [experts, in, out], of a table [rows, width]. layer:
    the number of its layer, None in embed and head. importance [in] and moments [in, in]: the mean squares and mean products of its inputs
    over a calibration text, where there is one."""

    key: Key
    role: Role
    shape: tuple[int, ...]
    layer: int | None = None
    importance: npt.NDArray[Any] | None = None
    moments: npt.NDArray[Any] | None = None

    @property
    def depth(self) -> int:
        """Elements along which groups lie."""
        return self.shape[-1] if self.role in ("tokens", "positions") else self.shape[-2]

    @property
    def elements(self) -> int:
        return prod(self.shape)

    @property
    def narrows(self) -> bool:
        """Whether it brings many numbers to fewer."""
        return self.role == "product" and self.shape[-1] < self.shape[-2]


@dataclass(frozen=True, eq=False, slots=True)
class Rounding:
    """How a weight of that shape is rounded."""

    bits: Literal[4, 6, 8]
    shape: tuple[int, ...]
    importance: npt.NDArray[Any] | None = None
    moments: npt.NDArray[Any] | None = None


def fits(depth: int, group: int, bits: NarrowBits) -> bool:
    """Whether a weight of so many inputs can be held so: whole groups, and whole blocks of 32 codes, of 6 bits 64."""
    return depth % group == 0 and depth % (64 if bits == 6 else 32) == 0


def groups_of_a_step(groups: int) -> int:
    """How many groups share a step: the largest divisor that is not above MOST_GROUPS."""
    return max(each for each in range(1, min(groups, MOST_GROUPS) + 1) if groups % each == 0)


def bits_of(depth: int, group: int, bits: NarrowBits, step_bits: int = 32) -> float:
    """Bits a weight, all told."""
    each = groups_of_a_step(depth // group)
    return bits + (8 + step_bits / each) / group * (2 if bits == 4 else 1)


def choose(weights: Iterable[Surveyed], others: int, *, layers: int, group: int, step_bits: int, tied: bool) -> Mapping[Key, Rounding]:
    """A choice for each weight. `others`: bits of all that is not narrowed. `tied`: the table of tokens and the head are one weight.
    `step_bits`: of a step of scales."""
    found = list(weights)

    def size(weight: Surveyed, bits: int) -> float:
        if bits == 8:
            return weight.elements * (8 + step_bits / weight.depth)
        return weight.elements * bits_of(weight.depth, group, 4 if bits == 4 else 6, step_bits)

    bits = {weight.key: 4 if fits(weight.depth, group, 4) else 8 for weight in found}
    once = [weight for weight in found if not (tied and weight.role == "tokens")]
    total = others + sum(size(weight, bits[weight.key]) for weight in once)
    most = BUDGET * sum(weight.elements for weight in once)
    for weight in sorted((each for each in once if each.role != "product" or each.narrows), key=lambda each: _order(each, layers)):
        if bits[weight.key] == 4 and fits(weight.depth, group, 6):
            more = size(weight, 6) - size(weight, 4)
            if total + more <= most:
                bits[weight.key] = 6
                total += more
    if tied:
        head = next((bits[weight.key] for weight in found if weight.role == "head"), 4)
        bits |= {weight.key: head for weight in found if weight.role == "tokens"}
    return {
        weight.key: Rounding(bits[weight.key], weight.shape, weight.importance, weight.moments)  # type: ignore[arg-type]
        for weight in found
    }


def _order(weight: Surveyed, layers: int) -> tuple[int, int, int, str]:
    """Smaller ones get more bits first."""
    rank = {"head": 0, "positions": 1, "product": 2, "tokens": 3}[weight.role]
    layer, eighth = weight.layer or 0, layers // 8
    ends = layer < eighth or layer >= layers - eighth
    turn = 0 if ends else 1 if (layer - eighth) % 3 == 2 else 2
    return rank, weight.elements if weight.role == "product" else 0, 10_000 * turn + layer, weight.key[1]
