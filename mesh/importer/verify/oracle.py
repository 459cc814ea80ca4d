"""Outside oracles: stock onnxruntime, on a model's source and on its blocks. Needs the `import` extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from mesh.errors import ConfigError, CorruptModel, UnsupportedModel
from mesh.model.manifest import CacheInfo

__all__ = ["OrtBlock", "OrtParts", "OrtSource", "open_oracle", "session"]

Array = npt.NDArray[Any]
Roles = Mapping[str, tuple[str, int | None]]
"""By the name of a graph's input: input_ids, attention_mask, position_ids, cache_position, token_type_ids or past; and the last axis of a
past, where it is known."""


def session(model: Path | bytes, *, data: Path | None = None, fold: bool = True, widen: bool = False) -> Any:
    """An onnxruntime session on the CPU. Weights stay mapped files: no packed copies. `data` is the folder of the external data of a
    model given as bytes. `fold`: compute what follows from weights alone once, and not at every run; while it does, it has a widened weight
    in memory twice, beside the weight itself. `widen`: quantized weights too, which it would widen at every run. UnsupportedModel if it
    cannot run the model."""
    try:
        import onnxruntime as ort
    except ImportError:
        raise ConfigError("this needs onnxruntime: install it with `pip install 'stagemesh[import]'`") from None
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry("session.disable_prepacking", "1")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")  # activations stay float32
    if widen:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    if data is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data.resolve()))
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    try:
        return ort.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=None if fold else ["ConstantFolding"],
        )
    except Exception as error:  # onnxruntime raises a class of its own for each status; each says why in its first line
        reason = str(error).splitlines()[0]
        raise UnsupportedModel(f"onnxruntime cannot run {model if isinstance(model, Path) else 'the graph'}: {reason}") from None


class OrtBlock:
    """One block in stock onnxruntime, with what a layer keeps of one row: a static cache of `slots` positions, and states."""

    def __init__(
        self, directory: Path, name: str, *, slots: int = 0, cache: CacheInfo | None = None, dtype: Any = None, widen: bool = False
    ) -> None:
        fold = name != "head"  # the largest weight, and it runs few times
        self._session = session(Path(directory) / f"{name}.onnx", fold=fold, widen=widen and fold)
        self.inputs = {item.name for item in self._session.get_inputs()}
        self.output = "logits" if name == "head" else "hidden_out"
        self.also: dict[str, Array] = {}
        self._past: dict[str, Array] = {}
        if cache is not None and cache.attends:
            for which, width in (("key", cache.key_dim), ("value", cache.value_dim)):
                self._past[which] = np.zeros((1, cache.kv_heads, slots, width), dtype)
        for number, state in enumerate(() if cache is None else cache.states):
            self._past[f"state_{number}"] = np.zeros((1, *state.shape), np.float32)

    def preset(self, key: Array, value: Array) -> None:
        """Fill the first slots of the cache with keys and values [heads, slots, width]."""
        for which, array in (("key", key), ("value", value)):
            self._past[which][0, :, : array.shape[1]] = array

    def forget(self) -> None:
        """Begin another row: its states are zeros. Slots of the cache that it has not written are hidden from it."""
        for which in [each for each in self._past if each.startswith("state_")]:
            self._past[which] = np.zeros_like(self._past[which])

    def run(self, x: Array, start: int, *, also: Sequence[str] = ()) -> Array:
        """x: token ids [T] for embed, hidden [T, D] otherwise, at positions from `start` -> hidden [T, D] or logits [T, V]. `also`: other
        values that the block gives out; they are in the attribute of that name then."""
        positions = np.arange(start, start + len(x), dtype=np.int64)[None]
        given = {
            "input_ids": x[None],
            "hidden_in": x[None],
            "position_ids": positions,
            "write_indices": np.array([start], np.int64),
            **{f"past_{which}": array for which, array in self._past.items()},
        }
        names = [self.output, *(f"present_{which}" for which in self._past)]
        asked = [name for name in also if name not in self.inputs]
        try:
            results = self._session.run([*names, *asked], {name: given[name] for name in self.inputs})
        except Exception as error:  # some kernels are found missing only when a session first runs
            raise UnsupportedModel(f"onnxruntime cannot run the block: {str(error).splitlines()[0]}") from None
        for which, array in zip(self._past, results[1 : len(names)], strict=True):
            self._past[which] = array
        self.also = dict(zip(asked, results[len(names) :], strict=True))
        return np.asarray(results[0][0])


class OrtSource:
    """An exported decoder in stock onnxruntime, one row, its own cache if it has one."""

    def __init__(self, file: Path, roles: Roles, logits: str) -> None:
        model = _with_whole_caches(file)
        self._session = session(model, data=file.parent if isinstance(model, bytes) else None)
        self._logits = logits
        self._roles = roles
        self._inputs = self._session.get_inputs()
        self._outputs = [item.name for item in self._session.get_outputs()]
        self.has_past = any(role == "past" for role, _ in roles.values())

    def logits(self, tokens: Array) -> Array:
        """The whole sequence at once, no past: tokens [T] -> [T, V] float32."""
        results = self._session.run([self._logits], self._feed(tokens))
        return np.asarray(results[0][0], np.float32)

    def greedy(self, prompt: Array, count: int) -> Array:
        """prompt [T] and the `count` tokens that greedy decoding adds -> [T + count]."""
        tokens = np.asarray(prompt, np.int64)
        for _ in range(count):
            tokens = np.append(tokens, self.logits(tokens)[-1].argmax())
        return tokens

    def _feed(self, tokens: Array) -> dict[str, Array]:
        return _feed(self._inputs, self._roles, tokens)


def _with_whole_caches(file: Path) -> Path | bytes:
    """The model with caches that keep every position: one of a window alone cannot be run without a past. It computes the same."""
    model = onnx.load(str(file), load_external_data=False)
    windowed = [(node, each) for node in model.graph.node for each in node.attribute if each.name == "sliding_window_cache"]
    for node, each in windowed:
        node.attribute.remove(each)
    return model.SerializeToString() if windowed else file


class OrtParts:
    """A source cut where its blocks are cut, each part run alone. Used if the source is too large to run whole, and to name a layer.

    `parts[i]` makes part i: a model as bytes, its hidden input (None for the first) and its output.
    """

    def __init__(self, parts: Sequence[Callable[[], tuple[bytes, str | None, str]]], roles: Roles, data: Path) -> None:
        self._parts = parts
        self._roles = roles
        self._data = data

    def run(self, index: int, tokens: Sequence[Array], rows: Sequence[Array]) -> list[Array]:
        """Rows of tokens [T] or hidden [T, D] through part `index`, whole sequences without a past -> [T, D] or logits [T, V]."""
        model, start, end = self._parts[index]()
        runner = session(model, data=self._data)
        results = []
        for ids, row in zip(tokens, rows, strict=True):
            feed = _feed([item for item in runner.get_inputs() if item.name != start], self._roles, ids)
            if start is not None:
                feed[start] = row[None]
            results.append(np.asarray(runner.run([end], feed)[0][0]))
        return results


def _feed(inputs: Sequence[Any], roles: Roles, tokens: Array) -> dict[str, Array]:
    """The inputs of a source for a whole sequence of one row without a past."""
    length = len(tokens)
    feed = {}
    for item in inputs:
        role, width = roles.get(item.name, (None, None))
        dtype = _ORT_TYPES.get(item.type)
        if role is None and item.name in _SWITCHES and dtype is not None:
            feed[item.name] = np.full([dim if isinstance(dim, int) else 1 for dim in item.shape], _SWITCHES[item.name], dtype)
            continue
        if role is None or dtype is None:
            raise UnsupportedModel(f"input {item.name} of the source ({item.type}) is of no known use")
        if role == "past":
            shape = [dim if isinstance(dim, int) else 1 if axis == 0 else 0 for axis, dim in enumerate(item.shape)]
            shape[-1] = width or shape[-1]
            feed[item.name] = np.zeros(shape, dtype)
            continue
        value = {
            "input_ids": tokens[None],
            "attention_mask": np.ones((1, length)),
            "position_ids": np.arange(length)[None],
            "cache_position": np.arange(length),
            "token_type_ids": np.zeros((1, length)),
        }.get(role)
        if value is None:
            raise UnsupportedModel(f"input {item.name} of the source has the unknown role {role}")
        feed[item.name] = value.astype(dtype)
    return feed


def open_oracle(file: Path, roles: Roles, logits: str) -> OrtSource:
    """OrtSource, CorruptModel if onnxruntime refuses the file."""
    try:
        return OrtSource(file, roles, logits)
    except UnsupportedModel as error:
        raise CorruptModel(f"{error}; check that the source runs in onnxruntime before importing it") from None


# Inputs of optimum's merged decoders: the branch with a past, the logits of every position.
_SWITCHES = {"use_cache_branch": 1, "num_logits_to_keep": 0, "logits_to_keep": 0}

_ORT_TYPES: dict[str, Any] = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bool)": np.bool_,
    "tensor(double)": np.float64,
}
