"""What `--bits 4` knows before rounding: the shape of every weight, and the activations of a calibration text that it is multiplied with.

    choices                 how each weight is rounded (mesh/importer/precision.py)
    read_calibration        the text, as tokens

A survey goes through the source's blocks as an import does, but writes no model: without a text it asks for shapes, which costs no reading
where a source is mapped. With a text each block is written with weights of 32 bits, run in onnxruntime, and removed before the next one, so
that one block is held at a time. The mean products of inputs wait in files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, helper

from mesh.errors import ConfigError
from mesh.importer.options import ImportOptions
from mesh.importer.precision import Rounding, Surveyed, choose
from mesh.importer.sources.source import Source
from mesh.importer.verify.oracle import OrtBlock
from mesh.importer.verify.size import equal
from mesh.importer.write.writer import BlockWriter, Weight, WeightValue, as_callable
from mesh.model.manifest import BlockInfo, block_name
from mesh.model.tokenizer import TOKENIZER_FILE, Tokenizer
from mesh.model.tokenizer_file import read_backend
from mesh.types import Progress

__all__ = ["choices", "read_calibration"]

Array = npt.NDArray[Any]

SEQUENCE = 512  # tokens that are run together
MOST_SEQUENCES = 8
LEAST_TOKENS = 64
MOST_BYTES = 1 << 20
MOST_MOMENTS = 4096  # inputs; of more only the mean squares are used: mean products take the square of them in memory


def choices(source: Source, options: ImportOptions, scratch: Path, progress: Progress) -> Mapping[tuple[str, str], Rounding]:
    """How each weight of `source` is rounded under `options`, which have 4 bits. `scratch`: an empty folder. Errors: those of
    `write_blocks`, and ConfigError where the calibration text cannot be used."""
    text = None if options.calibrate is None else read_calibration(source, options.calibrate, scratch)
    surveyor = _Surveyor(scratch, source, options, text)
    source.write_blocks(surveyor, ImportOptions(bits=32, trust_remote_code=options.trust_remote_code), progress)
    assert options.group_size is not None
    return choose(
        surveyor.found,
        surveyor.others,
        layers=source.layers,
        group=options.group_size,
        step_bits=8 * options.compute.itemsize,
        tied=surveyor.tied,
    )


def read_calibration(source: Source, path: Path, scratch: Path) -> list[Array]:
    """The text as sequences of tokens [T]: the first MOST_SEQUENCES of SEQUENCE tokens. ConfigError says what is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES)
    except OSError as error:
        raise ConfigError(f"the calibration text {path} cannot be read ({error.strerror}): give a text file") from None
    try:
        text = data.decode("utf-8", "ignore" if len(data) == MOST_BYTES else "strict")
    except UnicodeDecodeError:
        raise ConfigError(f"the calibration text {path} is not UTF-8: give a text file") from None
    info, _ = source.write_tokenizer(scratch)
    if info is None:
        raise ConfigError("this model has no tokenizer, so that no text can be calibrated with: leave out --calibrate")
    stored = scratch / TOKENIZER_FILE
    tokens = np.asarray(Tokenizer(read_backend(stored.read_bytes(), stored), info).encode(text), np.int64)[: MOST_SEQUENCES * SEQUENCE]
    if len(tokens) < LEAST_TOKENS:
        raise ConfigError(f"the calibration text {path} has {len(tokens)} tokens: give at least {LEAST_TOKENS}, better some thousand")
    size = min(SEQUENCE, source.context_length)
    return [tokens[start : start + size] for start in range(0, len(tokens), size)]


class _Surveyor(BlockWriter):
    """Takes note of the weights of each block in place of writing it. `others`: the bits of weights that are not narrowed."""

    def __init__(self, scratch: Path, source: Source, options: ImportOptions, text: list[Array] | None) -> None:
        super().__init__(scratch)
        self.found: list[Surveyed] = []
        self.others = 0
        self.tied = False
        self._source, self._options = source, options
        self._rows = text
        self._table: WeightValue | None = None

    def write(self, name: str, model: ModelProto | GraphProto | Any, weights: Mapping[str, WeightValue] | None = None) -> BlockInfo:
        assert isinstance(model, ModelProto) and weights is not None
        narrowed = {key: value for key, value in weights.items() if isinstance(value, Weight) and value.narrows}
        seen = self._run(name, model, weights, narrowed)
        for key, value in weights.items():
            array = as_callable(value)()
            if key not in narrowed:
                wide = self._options.compute.itemsize if array.dtype.kind not in "iub" else array.itemsize
                self.others += 8 * wide * array.size
                continue
            role = self._role(name, model.graph, key, array.shape)
            layer = int(name.removeprefix("layer_")) if name.startswith("layer_") else None
            importance, moments = seen.get(key, (None, None))
            weight = Surveyed((name, key.removesuffix(".weight")), role, array.shape, layer, importance, moments)
            self.found.append(weight)
            if role == "tokens":
                self._table = value
            elif role == "head" and self._table is not None:
                self.tied = equal(as_callable(self._table)(), array.T)
        return BlockInfo(name=name, files=(), weight_bytes=0, parameters=0)

    def _role(self, name: str, graph: GraphProto, key: str, shape: Sequence[int]) -> Any:
        gathered = next((node.input[1] for node in graph.node if node.op_type == "Gather" and node.input[0] == key), None)
        if gathered is not None and len(shape) == 2:
            return "tokens" if gathered == "input_ids" else "positions"
        return "head" if name == block_name("head") and shape[-1] == self._source.vocab_size else "product"

    def _run(
        self, name: str, model: ModelProto, weights: Mapping[str, WeightValue], narrowed: Mapping[str, Weight]
    ) -> Mapping[str, tuple[Array, Array | None]]:
        """The mean squares and mean products of the inputs of each narrowed weight; nothing without a text."""
        if self._rows is None or name == block_name("head"):
            return {}
        info = super().write(name, model, weights)
        path = self.directory / f"{name}.onnx"
        graph = onnx.load(str(path), load_external_data=False)
        inputs = {node.input[1]: node.input[0] for node in graph.graph.node if node.op_type == "MatMul" and node.input[1] in narrowed}
        known = {value.name for value in (*graph.graph.output, *graph.graph.input)}
        graph.graph.output.extend(helper.make_empty_tensor_value_info(each) for each in sorted({*inputs.values()} - known))
        path.write_bytes(graph.SerializeToString())
        index = None if name == block_name("embed") else int(name.removeprefix("layer_"))
        cache = None if index is None else self._source.cache[index]
        block = OrtBlock(self.directory, name, slots=max(len(row) for row in self._rows), cache=cache, dtype=np.float32)
        sums = {each: _Sums() for each in inputs.values()}
        rows = []
        for row in self._rows:
            block.forget()
            rows.append(block.run(row, 0, also=list(sums)))
            for each, total in sums.items():
                total.add(row if each == "hidden_in" else block.also[each])
        self._rows = rows
        del block
        for file in info.files:
            (self.directory / file.name).unlink()
        means = {each: total.means(self.directory / f"{name}.{number}.moments") for number, (each, total) in enumerate(sums.items())}
        return {key: means[each] for key, each in inputs.items()}


class _Sums:
    """Mean squares and mean products of an input."""

    def __init__(self) -> None:
        self._count = 0
        self._squares: Any = 0
        self._products: Any = 0

    def add(self, values: Array) -> None:
        """values [..., in]"""
        flat = np.asarray(values, np.float32).reshape(-1, values.shape[-1])
        self._count += len(flat)
        if flat.shape[1] <= MOST_MOMENTS:
            self._products = self._products + flat.T @ flat
        else:
            self._squares = self._squares + np.square(flat).sum(0)

    def means(self, path: Path) -> tuple[Array, Array | None]:
        """(mean squares [in], mean products [in, in], read from `path` when they are needed; None where they are too many)."""
        if isinstance(self._products, int):
            return self._squares / self._count, None
        products = self._products / self._count
        products.tofile(path)
        return np.diag(products).copy(), np.memmap(path, products.dtype, "r", shape=products.shape)
