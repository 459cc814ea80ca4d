"""The options of `mesh import`: the type of the arithmetic, and the width of the stored weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from mesh.dtypes import NUMPY_DTYPES
from mesh.errors import ConfigError
from mesh.importer.precision import NARROW_GROUP, Rounding
from mesh.model.manifest import WeightsInfo
from mesh.types import CacheDType, DType

__all__ = ["ImportOptions"]


@dataclass(frozen=True, slots=True)
class ImportOptions:
    """How blocks compute and how they store their weights.

    dtype: type of the hidden state, the cache and all arithmetic.
    kv_cache: type of the cache where it is another: float16 and int8 under float32 arithmetic hold twice and four times the positions.
    bits: width of the stored MatMul weights and embedding tables; 4 are 4 or 6, as mesh/importer/precision.py chooses; 32 under 16-bit
    compute means 16. None: as the source has them. Weights that it has quantized, and its matrices and tables of 16 bits, are kept as they
    are under float32 compute; all others are 32 bits.
    group_size: input elements that share a scale, for 8 and 4 bits; None is one scale an output channel at 8 bits and
    groups of 32 at 4 bits.
    calibrate: a text; weights of 4 and 6 bits are rounded so that the model's own activations of it change least.
    products: bfloat16: products round their inputs to it and have weights of it, where these are not kept in fewer bits; sums stay float32.
    Processors that multiply bfloat16 do that up to twice as fast.
    choices: how each weight is rounded, by its block and name, once they have been chosen; a weight that is not there gets 4 bits, in embed
    and head 6.
    trust_remote_code: whether code of the model's directory may run, where tracing it needs that.

    ConfigError if a value is not one of these.
    """

    dtype: DType = "float32"
    bits: Literal[32, 16, 8, 4] | None = None
    keep: bool = field(default=False, init=False)
    group_size: int | None = None
    trust_remote_code: bool = False
    kv_cache: CacheDType | None = None
    calibrate: Path | None = None
    products: Literal["bfloat16"] | None = None
    choices: Mapping[tuple[str, str], Rounding] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.dtype not in NUMPY_DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not known: use one of {', '.join(NUMPY_DTYPES)}")
        narrower = ("float16", "int8") if self.dtype == "float32" else ()
        if self.kv_cache not in (None, self.dtype, *narrower):
            raise ConfigError(f"a cache of {self.kv_cache} does not go with {self.dtype}: use {self.dtype}; float16 or int8 under float32")
        if self.products is not None and (self.products != "bfloat16" or self.dtype != "float32" or self.bits not in (None, 16)):
            raise ConfigError("products of bfloat16 have weights of 16 bits and float32 sums: leave --bits out or give 16, --dtype too")
        if self.bits is None:
            object.__setattr__(self, "keep", self.dtype == "float32")
            object.__setattr__(self, "bits", 32 if self.products is None else 16)
        if self.bits not in (32, 16, 8, 4):
            raise ConfigError(f"weights of {self.bits!r} bits are not supported: use 32, 16, 8 or 4")
        if self.bits == 32 and self.dtype != "float32":
            object.__setattr__(self, "bits", 16)
        if self.group_size is not None:
            if self.bits not in (8, 4):
                raise ConfigError(f"group_size is for weights of 8 or 4 bits, not {self.bits}: leave it out")
            if self.group_size < 16 or self.group_size & (self.group_size - 1):
                raise ConfigError(f"group_size {self.group_size} is not a power of two of at least 16: use 32, 64 or 128")
        elif self.bits == 4:
            object.__setattr__(self, "group_size", NARROW_GROUP)
        if self.calibrate is not None and self.bits != 4:
            raise ConfigError("calibrate is for weights of 4 bits: give --bits 4 with it")

    @property
    def compute(self) -> np.dtype:
        """The compute type as a numpy dtype (ml_dtypes for bfloat16)."""
        return NUMPY_DTYPES[self.dtype]

    def eight_bits(self) -> ImportOptions:
        """The options of a weight whose inputs are no whole groups."""
        return replace(self, bits=8, group_size=None, calibrate=None)

    @property
    def width(self) -> Literal[32, 16, 8, 4]:
        """The width of weights that are not kept."""
        assert self.bits is not None  # __post_init__ has replaced it
        return self.bits

    @property
    def weights(self) -> WeightsInfo:
        return WeightsInfo(bits=self.width, group_size=self.group_size)
