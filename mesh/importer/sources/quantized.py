"""Checkpoints whose weights are quantized already: each quantized weight is shown under the name that it would have unquantized.

`open_checkpoint` reads the quantization from config.json and refuses one that is not supported. A weight is kept as codes, scales and zero
points (quantized_forms.py) where a block holds them; a matrix of 16 bits that is not quantized keeps its 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from mesh.errors import CorruptModel, UnsupportedModel, decoding, short
from mesh.importer.sources.quantized_forms import Packed, Parts, awq, four_bit_experts, four_bit_floats, gptq, packed_integers, plain
from mesh.importer.sources.safetensors_file import SafetensorsCheckpoint, read_json
from mesh.importer.write.kept import Kept, KeptForm

__all__ = ["SUPPORTED", "QuantizedCheckpoint", "open_checkpoint"]

Array = npt.NDArray[Any]
Config = Mapping[str, Any]

ADVICE = "import the unquantized model, or a GGUF of it"


def open_checkpoint(directory: Path) -> SafetensorsCheckpoint | QuantizedCheckpoint:
    """The weights of a Hugging Face directory. Errors as SafetensorsCheckpoint.open has them; UnsupportedModel: a quantization that is not
    supported, by its name."""
    checkpoint = SafetensorsCheckpoint.open(directory)
    with decoding(CorruptModel, f"{directory}: the configuration of the quantization"):
        found = _quantization(directory)
    if found is None:
        return checkpoint
    config, path = found
    with decoding(CorruptModel, f"{path}: quantization_config"):
        method = short(str(config.get("quant_method", "unknown")))
        known = _METHODS.get(method)
        if known is None:
            raise UnsupportedModel(f"{path}: weights quantized by {method} are not supported (supported: {', '.join(SUPPORTED)}): {ADVICE}")
        return QuantizedCheckpoint(checkpoint, known(config, path))


def _quantization(directory: Path) -> tuple[Config, Path] | None:
    """What says how the weights are quantized, and the file that it stands in."""
    path = directory / "config.json"
    config = read_json(path)
    for holder in (config, config.get("text_config") or {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                return {"quant_method": "compressed-tensors" if key == "compression_config" else "unknown", **holder[key]}, path
    beside = directory / "quantize_config.json"  # AutoGPTQ's own
    return ({"quant_method": "gptq", **read_json(beside)}, beside) if beside.is_file() else None


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one method lays weights out. `parts`: what stands after a module's name in the names of its tensors, first the two that are
    always there; `joint` stands between them. `ignored`: other such tensors, which say nothing about weights. `weight`: what stands after
    the module's name in the name of the unquantized weight. `note`: for the report."""

    parts: tuple[str, ...]
    make: Callable[[Parts], Packed]
    ignored: tuple[str, ...] = ()
    note: str | None = None
    joint: str = "."
    weight: str = ".weight"


class QuantizedCheckpoint:
    """The tensors of a quantized checkpoint, each weight as one of its usual name and shape."""

    def __init__(self, checkpoint: SafetensorsCheckpoint, schemes: tuple[Scheme, ...]) -> None:
        self._checkpoint = checkpoint
        self._schemes: dict[str, tuple[str, Scheme]] = {}  # by the name of the weight: its module, how it is laid out
        self._opened: dict[str, Packed] = {}
        parts: set[str] = set()
        for scheme in schemes:
            for name in checkpoint:
                module, _, part = name.rpartition(scheme.joint)
                weight = f"{module}{scheme.weight}"
                if part == scheme.parts[0] and weight not in self._schemes and self._is_of(module, scheme):
                    self._schemes[weight] = module, scheme
                    parts.update(f"{module}{scheme.joint}{each}" for each in (*scheme.parts, *scheme.ignored))
        self._plain = [name for name in checkpoint if name not in parts and name.rpartition(".")[2] not in _ACTIVATIONS]
        self._names = dict.fromkeys((*self._schemes, *self._plain))
        self._notes = dict.fromkeys(scheme.note for _, scheme in self._schemes.values() if scheme.note)

    def _is_of(self, module: str, scheme: Scheme) -> bool:
        return all(f"{module}{scheme.joint}{part}" in self._checkpoint for part in scheme.parts[:2])

    @property
    def note(self) -> str | None:
        """What the report says about how the weights are kept."""
        wide = [name for name in self._schemes if name in self._opened and self._opened[name].form is None]
        widened = f"{len(wide)} weights have groups of unequal size, and are held as numbers of 32 bits"
        return "; ".join(filter(None, (*self._notes, widened if wide else None))) or None

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._packed(name).shape if name in self._schemes else self._checkpoint.shape(name)

    def read(self, name: str) -> Array:
        """The numbers of a tensor; those of a quantized weight are float32."""
        return self._packed(name).numbers() if name in self._schemes else self._checkpoint.read(name)

    def read_wide(self, name: str) -> Array:
        """The same as float32."""
        return self._checkpoint.read_wide(name) if name not in self._schemes else self.read(name)

    def form(self, name: str) -> KeptForm | None:
        return self._packed(name).form if name in self._schemes else self._checkpoint.form(name)

    def kept(self, name: str) -> Kept:
        return self._packed(name).kept() if name in self._schemes else self._checkpoint.kept(name)

    def release(self) -> None:
        """Nothing is held between reads."""

    def _packed(self, name: str) -> Packed:
        if name not in self._opened:
            module, scheme = self._schemes[name]
            self._opened[name] = scheme.make(Parts(self._checkpoint, module, scheme.joint))
        return self._opened[name]


_ACTIVATIONS = frozenset((
    "activation_scale", "input_global_scale", "input_scale", "input_zero_point", "k_scale", "output_scale", "output_zero_point", "v_scale",
))  # fmt: skip
"""Scales for rounding activations, which stay as they are here."""

ACTIVATIONS_NOTE = "activations are not rounded, as the source's own engines may round them"


def _gptq(config: Config, path: Path) -> tuple[Scheme, ...]:
    bits, group = int(config["bits"]), int(config.get("group_size", 128))
    layout = short(str(config.get("checkpoint_format") or config.get("format") or "gptq"))
    if layout not in ("gptq", "gptq_v2"):
        raise UnsupportedModel(f"{path}: GPTQ weights in the layout {layout} are not supported, only gptq and gptq_v2 are: {ADVICE}")
    if bits not in (2, 4, 8):
        raise UnsupportedModel(f"{path}: GPTQ weights of {bits} bits are not supported, only 2, 4 and 8 are: {ADVICE}")
    _check_group(group, path)
    first_version = layout == "gptq"
    return (Scheme(("qweight", "scales", "qzeros", "g_idx"), lambda parts: gptq(parts, bits, group, first_version)),)


def _awq(config: Config, path: Path) -> tuple[Scheme, ...]:
    bits, group = int(config.get("bits", config.get("w_bit", 4))), int(config.get("group_size", config.get("q_group_size", 128)))
    layout = short(str(config.get("version") or config.get("format") or "gemm").lower())
    if layout != "gemm" or config.get("backend") == "llm-awq":
        raise UnsupportedModel(f"{path}: AWQ weights in the layout {layout} are not supported, only gemm is: {ADVICE}")
    if bits != 4:
        raise UnsupportedModel(f"{path}: AWQ weights of {bits} bits are not supported, only 4 are: {ADVICE}")
    _check_group(group, path)
    return (Scheme(("qweight", "scales", "qzeros"), lambda parts: awq(parts, group)),)


def _check_group(group: int, path: Path) -> None:
    if group != -1 and group < 1:
        raise CorruptModel(f"{path}: group_size is {group} where a positive number, or -1 for all inputs, is needed")


_LAYOUTS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized")


def _compressed_tensors(config: Config, path: Path) -> tuple[Scheme, ...]:
    groups = list((config.get("config_groups") or {}).values())
    layouts = {str(each.get("format") or config.get("format")) for each in groups if each.get("weights")} or {str(config.get("format"))}
    unknown = sorted(layouts - {*_LAYOUTS, "dense"})
    sparse = (config.get("sparsity_config") or {}).get("format", "dense")
    if unknown or sparse != "dense":
        what = short(", ".join([*unknown, *([] if sparse == "dense" else [str(sparse)])]))
        raise UnsupportedModel(f"{path}: compressed-tensors weights as {what} are not supported, only {', '.join(_LAYOUTS)} are: {ADVICE}")
    if str(config.get("quantization_status", "compressed")) != "compressed":
        raise UnsupportedModel(f"{path}: the weights are not compressed yet: save them compressed, or {ADVICE}")
    blocks = {tuple(each["weights"]["block_structure"]) for each in groups if (each.get("weights") or {}).get("block_structure")}
    if len(blocks) > 1:
        raise UnsupportedModel(f"{path}: scales of blocks of several sizes are not supported: {ADVICE}")
    block = next(iter(blocks), None)
    note = ACTIVATIONS_NOTE if any(each.get("input_activations") for each in groups) else None
    floats = any(each.startswith(("mxfp4", "nvfp4")) for each in layouts)
    packed = four_bit_floats if floats else packed_integers
    second = "weight_scale"
    rest = ("weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")
    return (
        Scheme(("weight_packed", second, *rest), packed, note=note),
        Scheme(("weight", second, "weight_zero_point"), lambda parts: plain(parts, second, block), note=note),
    )


def _fp8(config: Config, path: Path) -> tuple[Scheme, ...]:
    size = config.get("weight_block_size")
    block = None if size is None else (int(size[0]), int(size[1]))
    return (Scheme(("weight", "weight_scale_inv"), lambda parts: plain(parts, "weight_scale_inv", block), note=ACTIVATIONS_NOTE),)


def _fbgemm_fp8(config: Config, path: Path) -> tuple[Scheme, ...]:
    return (
        Scheme(("weight", "weight_scale"), lambda parts: plain(parts, "weight_scale"), ignored=("input_scale_ub",), note=ACTIVATIONS_NOTE),
    )


def _mxfp4(config: Config, path: Path) -> tuple[Scheme, ...]:
    return (Scheme(("blocks", "scales"), four_bit_experts, joint="_", weight=""),)


_METHODS: Mapping[str, Callable[[Config, Path], tuple[Scheme, ...]]] = {
    "awq": _awq,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "mxfp4": _mxfp4,
}
SUPPORTED: tuple[str, ...] = tuple(_METHODS)
