"""The model of a Hugging Face directory as transformers builds it, without weights in memory; what cannot be served is refused here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.importer.trace.attention_forms import positions_kept
from mesh.importer.trace.indexers import INDEXED, positions_chosen
from mesh.importer.trace.latent import caches_of
from mesh.importer.trace.library import quiet, torch_and_transformers
from mesh.importer.trace.python_forms import python_forms
from mesh.importer.trace.recurrences import recurrences
from mesh.importer.trace.refused import INDEXERS, refuse_described, runs_again
from mesh.importer.trace.states import LayerKeeps, cache_argument, kept_by

__all__ = ["TracedModel", "cache_shapes", "compute_experts", "model_of", "open_model"]

ATTENTION = frozenset(
    ("full_attention", "sliding_attention", "chunked_attention", "attention", "hybrid", "hybrid_sliding", "moe", "dense", "sparse")
)
"""Entries of `layer_types` whose state is a list of positions."""
CARRYING = frozenset(("conv", "linear_attention", "mamba", "mlp"))
"""Entries of `layer_types` whose state has a fixed size (states.py), or of layers beside these that keep nothing."""


DECIDES = ("Tensor.item()", "torch.nonzero()", "Cannot copy out of meta tensor")
"""What torch says of a model that asks for a number where there are none."""


@dataclass(frozen=True, eq=False)
class TracedModel:
    """`module`: every parameter and buffer on the meta device. `config` is its own, `text` that of the language model in it. `path`: the
    file that says what the model is. `finish` changes buffers that no configuration describes. `alone`: of a model of images or sounds the
    language model is all that is served."""

    path: Path
    module: Any
    config: Any
    text: Any
    finish: Callable[[Any], None] = field(default=lambda _: None)
    alone: bool = False

    @property
    def kind(self) -> str:
        return str(self.config.model_type)

    @property
    def context(self) -> int | None:
        """The most positions for which the graph is right, where the rotary frequencies change with the length; None if they do not."""
        return _fixed_rotary(self.text)

    @property
    def chosen(self) -> int | None:
        """The same where an indexer chooses what attention reads."""
        return positions_chosen(self.module)

    @property
    def shown(self) -> int | None:
        """The same where attention hides the positions with the lowest scores."""
        return positions_kept(self.module)

    @property
    def language(self) -> str | None:
        """The language whose adapters are traced; None where the model has no adapters."""
        return getattr(self.config, "default_language", None)

    @cached_property
    def real(self) -> Any:
        """A second construction, whose parameters alone have no memory: buffers have their values."""
        with _parameters_on_meta(), quiet():
            module = _build(self.config)
        self.finish(module)
        return module


def open_model(directory: Path, trust_remote_code: bool = False) -> TracedModel:
    """The model of `directory`. UnsupportedModel: transformers does not know it, or it is no decoder with a cache of positions."""
    return model_of(directory / "config.json", _unquantized(_config(directory, trust_remote_code)))


def model_of(path: Path, config: Any, finish: Callable[[Any], None] = lambda _: None) -> TracedModel:
    """The model with the configuration that `path` says. UnsupportedModel as `open_model`."""
    text = config.get_text_config(decoder=True)
    alone = text is not config
    _refuse_by_config(path, config, text)
    module, config = _built(config, text)
    _refuse_attention(path, config, text, module)
    _fix_rotary(module)
    return TracedModel(path, module, config, text, finish, alone)


def _config(directory: Path, trust_remote_code: bool) -> Any:
    _, transformers = torch_and_transformers()
    path = directory / "config.json"
    try:
        with quiet():
            return transformers.AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the libraries raise whatever a wrong value leads to
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise UnsupportedModel(
                f"{path}: the model is code of its own directory, which is not run: read it, then give --trust-remote-code"
            ) from None
        if "does not recognize this architecture" in text or "model type" in text:
            named = re.search(r"model type `([^`]*)`", text)
            raise UnsupportedModel(
                f"{path}: transformers {transformers.__version__} does not know the model_type {named[1] if named else 'of this file'}: "
                "install a version that does, or export the model to ONNX and import that"
            ) from None
        raise CorruptModel(f"{path} is refused by transformers ({type(error).__name__}: {text[:300]})") from None


def _unquantized(config: Any) -> Any:
    """The configuration of the same model with weights of numbers, which mesh/importer/sources/quantized.py reads."""
    for each in (config, config.get_text_config(decoder=True)):
        if hasattr(each, "quantization_config"):
            del each.quantization_config
    return config


CHANGING = ("longrope", "dynamic")


def _fixed_rotary(text: Any) -> int | None:
    settings = getattr(text, "rope_parameters", None) or {}
    limits = []
    for each in (settings, *(value for value in settings.values() if isinstance(value, dict))):
        if each.get("rope_type") in CHANGING:
            trained = each.get("original_max_position_embeddings") if each["rope_type"] == "longrope" else None
            limits.append(int(trained or text.max_position_embeddings))
    return min(limits) if limits else None


def _fix_rotary(module: Any) -> None:
    """Keep the frequencies that hold up to `context`: a graph, and a cache, has one set of them."""
    for each in module.modules():
        kind = getattr(each, "rope_type", None)
        if isinstance(kind, dict):
            each.rope_type = {key: "default" if value in CHANGING else value for key, value in kind.items()}
        elif kind in CHANGING:
            each.rope_type = "default"


def _refuse_by_config(path: Path, config: Any, text: Any) -> None:
    refuse_described(path, lambda name: getattr(config, name, None), lambda name: getattr(text, name, None))
    state = sorted({str(each) for each in getattr(text, "layer_types", None) or ()} - ATTENTION - CARRYING - {INDEXED})
    if state:
        raise _stateful(path, config.model_type, f"its layers are {', '.join(state)}")


def _refuse_attention(path: Path, config: Any, text: Any, module: Any) -> None:
    """Kinds of attention that a block has no form for, and other parts; a trace would find them too, only later."""
    if (getattr(text, "num_kv_shared_layers", None) or 0) >= (getattr(text, "num_hidden_layers", None) or 1):
        raise UnsupportedModel(
            f"{path}: no layer of {config.model_type} makes keys and values of its own: it drafts tokens for another model, and reads "
            "those of that: not served"
        )
    if INDEXED in (getattr(text, "layer_types", None) or ()) and positions_chosen(module) is None:
        raise UnsupportedModel(f"{path}: {config.model_type} {INDEXERS}: not served")


def _stateful(path: Path, kind: str, seen: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"{path}: {kind} keeps recurrent or convolution state, not a list of positions ({seen}): such layers are not served"
    )


def _built(config: Any, text: Any) -> tuple[Any, Any]:
    """The module without memory, and its configuration: the language model alone where transformers cannot build what is around it."""
    torch, _ = torch_and_transformers()
    with torch.device("meta"), quiet():
        try:
            return _build(config), config
        except UnsupportedModel:
            if text is config:
                raise
            with suppress(UnsupportedModel):
                return _build(text), text
            raise


def _build(config: Any) -> Any:
    """A module with that configuration: the causal language model, or the multimodal model around one."""
    torch, transformers = torch_and_transformers()
    compute_experts(config, "batched_mm")  # the one whose shapes do not depend on the tokens
    last: Exception | None = None
    autos = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
    known = [auto.from_config for auto in autos if type(config) in auto._model_mapping or getattr(config, "auto_map", None)]
    for make in known or [each._from_config for each in _causal_models(type(config))]:
        try:
            return make(config, attn_implementation="eager", dtype=torch.float32).eval()
        except Exception as error:  # the libraries raise whatever a wrong value leads to
            last = error
    if last is None:
        raise UnsupportedModel(f"{config.model_type} is no causal language model of transformers {transformers.__version__}")
    raise UnsupportedModel(
        f"{config.model_type}: transformers cannot build it ({type(last).__name__}: {' '.join(str(last).split())[:300]})"
    )


def compute_experts(config: Any, form: str) -> None:
    """Let transformers compute experts in the form of that name wherever a module has this configuration."""
    for each in (config, config.get_text_config(decoder=True)):
        each._experts_implementation = form


def _causal_models(config: type) -> list[Any]:
    """The causal language models beside a configuration that no list of the library has: it is a part of another one."""
    if not config.__module__.startswith("transformers.models."):  # nothing of a directory's own code is imported here
        return []
    home = import_module(config.__module__.replace(".configuration_", ".modeling_"))
    named = [each for name, each in vars(home).items() if name.endswith("ForCausalLM")]
    return [each for each in named if getattr(each, "config_class", None) is config]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters that are registered meanwhile get no memory; buffers keep their values."""
    torch, _ = torch_and_transformers()
    register = torch.nn.Module.register_parameter

    def on_meta(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = type(parameter)(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def cache_shapes(model: TracedModel) -> list[LayerKeeps]:
    """What each layer keeps, from a run without numbers. Nothing where the model has no cache: its graph is then one of whole sequences."""
    torch, transformers = torch_and_transformers()
    path, kind = model.path, model.kind
    try:
        with (
            torch.device("meta"),
            torch.no_grad(),
            quiet(),
            python_forms(model.module),
            recurrences(model.module),
            caches_of(model.module) as new_cache,
            _attentions(model.module) as calls,
        ):
            cache = new_cache(())
            ids, mask = torch.ones(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long)
            model.module(input_ids=ids, attention_mask=mask, use_cache=True, **{cache_argument(model.module): cache})
    except Exception as error:
        if any(each in str(error) for each in DECIDES):
            raise UnsupportedModel(
                f"{path}: {kind} asks for numbers while it runs, to decide what it computes ({_first(error)[:120]}): it cannot be traced"
            ) from None
        raise UnsupportedModel(f"{path}: {kind} does not run on token ids and a cache ({_first(error)})") from None
    if max(calls.values(), default=0) > 1:
        raise runs_again(path, kind, max(calls.values()))
    library = transformers.cache_utils
    served = (library.DynamicLayer, library.LinearAttentionLayer, library.LinearAttentionAndFullAttentionLayer)
    shapes = [kept_by(layer) for layer in cache.layers]
    for layer, kept in zip(cache.layers, shapes, strict=True):
        if kept.anything and type(layer) not in served:
            raise _stateful(path, kind, f"its cache has a {type(layer).__name__}")
        keys = getattr(layer, "keys", None)
        lacking = type(layer) is library.DynamicLayer if keys is None else keys.ndim != 4 or keys.shape[2] != 3
        if lacking or (type(layer) is not library.DynamicLayer and not kept.states and type(layer) in served):
            raise UnsupportedModel(f"{path}: the cache of {kind} is no key and value for each position: such a model is not served")
    return shapes


@contextmanager
def _attentions(module: Any) -> Iterator[Counter[Any]]:
    """How often each attention with a place in the cache is called within the block."""
    calls: Counter[Any] = Counter()
    found = [each for each in module.modules() if hasattr(each, "layer_idx") and type(each).__name__.endswith("Attention")]
    hooks = [each.register_forward_pre_hook(lambda called, _: calls.update([called])) for each in found]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
