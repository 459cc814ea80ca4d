"""Rotary frequencies from the settings of a config.json: default, linear, dynamic, llama3, yarn and longrope.

Frequencies are fixed at import: slot s of a cache row must hold the same key whenever it is written. Two kinds change theirs
with the length of the sequence (longrope, dynamic): they get those that hold up to the length the model was trained with,
and the context of the model ends there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.errors import UnsupportedModel, short
from mesh.importer.families.spec import Rotary

__all__ = ["CHANGES", "frequencies", "rope_settings", "rotary_from_config", "shorter_context", "trained_context"]

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")

Settings = Mapping[str, Any]


def rope_settings(config: Settings, *, layer_type: str | None = None, theta: float = 10000.0) -> dict[str, Any]:
    """The settings of one layer type, whichever generation of config.json they come from.

    `theta` is the architecture's default. Keys present in the result: rope_type, rope_theta, partial_rotary_factor,
    original_max_position_embeddings.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if layer_type is not None and isinstance(given.get(layer_type), Mapping):
        given = given[layer_type]
    settings = {key: value for key, value in given.items() if value is not None and not isinstance(value, Mapping)}
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    settings["rope_type"] = "longrope" if kind == "su" else kind
    settings.setdefault("rope_theta", config.get("rope_theta") or theta)
    settings.setdefault("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if config.get("original_max_position_embeddings"):
        settings["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    settings.setdefault("original_max_position_embeddings", config.get("max_position_embeddings"))
    if settings["rope_type"] not in KINDS:
        raise UnsupportedModel(f"rotary scaling {short(kind)!r} is not supported: only {', '.join(KINDS)} are")
    return settings


def trained_context(settings: Settings, context_length: int) -> int:
    """The most positions for which `rotary_from_config` is right; context_length unless the kind depends on the length."""
    if settings["rope_type"] == "longrope":
        return min(context_length, int(settings["original_max_position_embeddings"]))
    return context_length


CHANGES = "the rotary frequencies change with the length of the sequence"


def shorter_context(context: int, whole: int, why: str = CHANGES) -> str | None:
    """What is said at import of a context that ends before the model's; None where it does not. `why`: what is so beyond it."""
    return None if context >= whole else f"the context ends at {context:,} of {whole:,} tokens: beyond that {why}"


def rotary_from_config(settings: Settings, *, head_dim: int, context_length: int) -> Rotary:
    """Frequencies of `rope_settings`; `context_length` is max_position_embeddings."""
    dim = int(head_dim * settings["partial_rotary_factor"])
    base = float(settings["rope_theta"])
    kind = settings["rope_type"]
    plain = frequencies(dim, base)
    try:
        if kind == "linear":
            return _rotary(plain / float(settings["factor"]))
        if kind == "llama3":
            return _rotary(_llama3(plain, settings))
        if kind == "yarn":
            return _yarn(plain, settings, dim, base, context_length)
        if kind == "longrope":
            return _longrope(plain, settings, context_length)
    except KeyError as error:
        raise UnsupportedModel(f"rotary scaling {short(kind)!r} lacks the setting {error}") from None
    return _rotary(plain)


def frequencies(dim: int, base: float) -> npt.NDArray[np.float64]:
    """base ** (-2 i / dim) for i in [0, dim / 2)."""
    return np.asarray(base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim))


def _rotary(values: npt.NDArray[np.float64], factor: float = 1.0) -> Rotary:
    return Rotary(values.astype(np.float32), factor)


def _llama3(plain: npt.NDArray[np.float64], settings: Settings) -> npt.NDArray[np.float64]:
    """Long wavelengths divided by the factor, short ones kept, smooth in between."""
    factor, low, high = float(settings["factor"]), float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    turns = float(settings["original_max_position_embeddings"]) * plain / (2 * math.pi)  # over the trained context
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray((1 - smooth) * plain / factor + smooth * plain)


def _yarn(plain: npt.NDArray[np.float64], settings: Settings, dim: int, base: float, context_length: int) -> Rotary:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, and sharpen attention by `factor`."""
    trained = float(settings["original_max_position_embeddings"])
    factor = float(settings.get("factor") or context_length / trained)

    def dimension(turns: float) -> float:
        return dim * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(settings.get("beta_fast") or 32), dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 0.001), 0, 1)
    mscale, mscale_all = settings.get("mscale"), settings.get("mscale_all_dim")
    attention = settings.get("attention_factor")
    if attention is None:
        attention = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor, 1.0)
    return _rotary(plain / factor * ramp + plain * (1 - ramp), float(attention))


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _longrope(plain: npt.NDArray[np.float64], settings: Settings, context_length: int) -> Rotary:
    """LongRoPE's short factors; its attention factor depends on how far the context was extended."""
    trained = float(settings["original_max_position_embeddings"])
    factor = float(settings.get("factor") or context_length / trained)
    attention = settings.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    short = np.asarray(settings["short_factor"], np.float64)
    if short.shape != plain.shape:
        raise UnsupportedModel(f"rotary scaling 'longrope': short_factor has {len(short)} entries where {len(plain)} are needed")
    return _rotary(plain / short, float(attention))
