"""Families that no import serves, by what a config.json says, without torch; then by the configuration that transformers makes of it.

A configuration of the library has its defaults too, so that it may refuse what the file alone does not. What only a model without weights
shows is refused in model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mesh.errors import UnsupportedModel

__all__ = ["INDEXERS", "Said", "refuse_config_file", "refuse_described", "runs_again"]

Said = Callable[[str], Any]
"""The value of a setting; None where the configuration has none."""

INDEXERS = "has indexers that choose what its attention reads, of a form that is not known"
_DISTANCES = "adds to its scores a number that each query has for each distance"
_ASSISTANT = "drafts tokens for another model, whose keys and values it reads"
_OTHER_STATE = "keeps a state in a form of its own in place of a list of positions"

NOT_SERVED: Mapping[str, str] = {
    "blt": "divides bytes into patches, whose lengths another model finds",
    "cpmant": "puts a prompt of its own before the text, and keeps no key and value for each position",
    "deepseek_v4": "keeps one entry for many positions, beside the keys and values of the last ones",
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "inkling_text": _DISTANCES,
    "inkling2_text": _DISTANCES,
    "inkling2_loop_text": _DISTANCES,
    "prophetnet": "predicts several tokens ahead, each by a stream of its own beside the text",
    "qwen4_exp_text": INDEXERS,
    "reformer": "attends to the positions whose hashes are equal",
    "rwkv": _OTHER_STATE,
    "xlm": "fills in a mask token that is put after the text",
    "xlnet": "fills in a token that is put after the text and sees the text in another order",
    "xlstm": _OTHER_STATE,
}
"""By model_type, of the whole model or of the language model in it: what it does that a block has no form for."""
TIMES: Mapping[str, Mapping[str, int]] = {"dory": {"n_recurrent_loops": 2}, "hrm_text": {"H_cycles": 2, "L_cycles": 3}}
"""Settings whose product says how often layers run for each token, with the library's defaults."""
PREFIXES = ("paligemma",)
"""Families that read their prompt in both directions where they do not say otherwise."""
TEXT = ("decoder", "generator", "text_config")
"""Where a configuration has that of the language model, as the library looks for it."""


def refuse_config_file(path: Path, settings: Mapping[str, Any]) -> None:
    """UnsupportedModel: `settings`, read from the config.json `path`, are those of a family that is not served."""
    inner = next((each for name in TEXT if isinstance(each := settings.get(name), dict)), settings)
    refuse_described(path, settings.get, inner.get)


def refuse_described(path: Path, whole: Said, text: Said) -> None:
    """UnsupportedModel: a model with the settings `whole`, and the language model in it with `text`, is not served."""
    kind = whole("model_type")
    architectures = whole("architectures")
    if whole("is_encoder_decoder") is True and not (isinstance(architectures, list) and "CausalLM" in " ".join(map(str, architectures))):
        raise UnsupportedModel(f"{path}: {kind} is an encoder with a decoder: only decoders alone are served")
    both = text("use_bidirectional_attention")
    if both in (True, "all") or (both is None and kind in PREFIXES):
        raise UnsupportedModel(f"{path}: {kind} attends to later positions of its prompt (use_bidirectional_attention): not served")
    for named in (str(kind), str(text("model_type"))):
        if named in NOT_SERVED:
            raise UnsupportedModel(f"{path}: {kind} {NOT_SERVED[named]}: not served")
        times = _times(named, text)
        if times > 1:
            raise runs_again(path, kind, times)
    if kind == "doge" and whole("is_moe") is True:
        raise UnsupportedModel(f"{path}: doge chooses experts for a token by the numbers of other tokens: not served")


def runs_again(path: Path, kind: str, times: int) -> UnsupportedModel:
    """The error for layers that run more than once."""
    return UnsupportedModel(
        f"{path}: the layers of {kind} run {times} times for each token, on what the last time has made: they cannot be divided between "
        "shards"
    )


def _times(kind: str, said: Said) -> int:
    """How often some layers of a family run; 1 where a setting is no number, which the library refuses."""
    times = 1
    for name, default in TIMES.get(kind, {}).items():
        value = said(name)
        times *= default if value is None else value if isinstance(value, int) else 1
    return times
