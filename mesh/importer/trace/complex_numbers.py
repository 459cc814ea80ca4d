"""Rotary positions as complex numbers, traced as pairs of real ones: ONNX has no complex arithmetic.

Some models multiply each pair of a query's or a key's numbers, seen as one complex number, by another one of length 1. While such a
model is traced, torch's functions that make and take apart complex numbers work on pairs of tensors. The arithmetic is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mesh.importer.trace.library import torch_and_transformers

__all__ = ["pairs_of_reals"]


class _Pairs:
    """Complex numbers as two tensors of one shape. What a tensor does to its shape, type or device is done to both."""

    def __init__(self, real: Any, imaginary: Any) -> None:
        self.real, self.imag = real, imaginary

    @property
    def shape(self) -> Any:
        return self.real.shape

    @property
    def device(self) -> Any:
        return self.real.device

    def __getitem__(self, index: Any) -> _Pairs:
        return _Pairs(self.real[index], self.imag[index])

    def __mul__(self, other: Any) -> _Pairs:
        if not isinstance(other, _Pairs):
            return _Pairs(self.real * other, self.imag * other)
        real = self.real * other.real - self.imag * other.imag
        return _Pairs(real, self.real * other.imag + self.imag * other.real)

    __rmul__ = __mul__

    def __getattr__(self, name: str) -> Any:
        if name not in _ALIKE:
            raise AttributeError(f"complex numbers have no {name} where they are traced")
        return lambda *args, **kwargs: _Pairs(getattr(self.real, name)(*args, **kwargs), getattr(self.imag, name)(*args, **kwargs))


_ALIKE = frozenset(("contiguous", "expand", "reshape", "squeeze", "to", "transpose", "unsqueeze", "view"))


@contextmanager
def pairs_of_reals() -> Iterator[None]:
    """Within the block torch makes pairs of real tensors in place of complex ones."""
    torch, _ = torch_and_transformers()
    instead = {
        "polar": lambda length, angle: _Pairs(length * angle.cos(), length * angle.sin()),
        "view_as_complex": lambda x: _Pairs(x[..., 0], x[..., 1]),
        "view_as_real": lambda x: torch.stack((x.real, x.imag), dim=-1),
    }
    before = {name: getattr(torch, name) for name in instead}
    for name, function in instead.items():
        setattr(torch, name, function)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(torch, name, function)
