"""Fourier transforms. Complex numbers are a last axis of 2, real ones a last axis of 1."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh.lowering.op_helpers import Array, axes_of
from mesh.lowering.registry import register


def _complex(x: Array) -> Array:
    return x[..., 0] if x.shape[-1] == 1 else x[..., 0] + 1j * x[..., 1]


def _parts(x: Array, kind: Any) -> Array:
    return jnp.stack([x.real, x.imag], axis=-1).astype(kind)


def _dft(x: Array, length: int | None, axis: int, inverse: bool, onesided: bool) -> Array:
    axis = axes_of(axis, x.ndim)[0]
    kind, signal = x.dtype, _complex(x)
    if inverse and onesided:
        return jnp.fft.irfft(signal, n=length, axis=axis)[..., None].astype(kind)
    if inverse:
        return _parts(jnp.fft.ifft(signal, n=length, axis=axis), kind)
    y = jnp.fft.fft(signal, n=length, axis=axis)
    if onesided:
        y = y[(slice(None),) * axis + (slice(0, y.shape[axis] // 2 + 1),)]
    return _parts(y, kind)


@register(since=20, static=(1, 2))
def DFT(input: Array, dft_length: Array | None = None, axis: Array | None = None, *, inverse: int = 0, onesided: int = 0) -> Array:
    length = None if dft_length is None else int(np.asarray(dft_length).reshape(()))
    return _dft(input, length, -2 if axis is None else int(np.asarray(axis).reshape(())), bool(inverse), bool(onesided))


@register("DFT", since=17, static=(1,))
def DFT_17(input: Array, dft_length: Array | None = None, *, axis: int = 1, inverse: int = 0, onesided: int = 0) -> Array:
    length = None if dft_length is None else int(np.asarray(dft_length).reshape(()))
    return _dft(input, length, axis, bool(inverse), bool(onesided))


@register(since=17, static=(1, 3))
def STFT(signal: Array, frame_step: Array, window: Array | None = None, frame_length: Array | None = None, *, onesided: int = 1) -> Array:
    """signal [B, L, 1 or 2] -> [B, frames, bins, 2]."""
    step = int(np.asarray(frame_step).reshape(()))
    length = int(np.asarray(frame_length).reshape(())) if frame_length is not None else window.shape[0] if window is not None else 0
    frames = (signal.shape[1] - length) // step + 1
    places = np.arange(frames)[:, None] * step + np.arange(length)  # [frames, length]
    cut = signal[:, places]  # [B, frames, length, 1 or 2]
    if window is not None:
        cut = cut * window[:, None]
    return _dft(cut, None, 2, False, bool(onesided))
