"""Import of exported ONNX decoders: any graph of the torch exporters, optimum or onnxruntime-genai, cut into blocks.

The file is read and rewritten to one form (onnx_file.py), analysed (mesh/importer/analysis), cut where its layers end, and each
part is emitted as a block (mesh/importer/write/emit.py).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx_ir as ir
import orjson
from onnx import TensorProto

from mesh.dtypes import NUMPY_DTYPES
from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel, decoding
from mesh.importer.analysis.attention import BATCH, CHUNK, PAST, AttentionPattern, find_attention
from mesh.importer.analysis.cut import Crossing, Cut, DataPath, find_cuts
from mesh.importer.analysis.layers import DecoderLayer, find_layers
from mesh.importer.analysis.mask import MaskReader, ScoreRule
from mesh.importer.analysis.positions import InputParts, context_limit
from mesh.importer.analysis.wide_cut import find_wide_cuts
from mesh.importer.graph.decoder import DecoderGraph, attribute, input_of
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import GraphProbe, state_shape
from mesh.importer.options import ImportOptions
from mesh.importer.sources.onnx_file import load
from mesh.importer.write.blocks import BlockWriter, GraphBuilder
from mesh.importer.write.emit import Emitter, Part
from mesh.model.manifest import BlockInfo, CacheInfo, FileInfo, StateInfo, TokenizerInfo, WeightsInfo, block_name
from mesh.types import DType, Progress

__all__ = ["OnnxSource", "open_source"]

DEFAULT_CONTEXT = 4096  # for a graph that has no table of positions and no config.json beside it
_CODE_BITS: dict[ir.DataType | None, int] = {ir.DataType.INT4: 4, ir.DataType.UINT4: 4, ir.DataType.INT8: 8, ir.DataType.UINT8: 8}
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length", "n_ctx", "context_length")


def open_source(path: Path) -> OnnxSource:
    """Open a .onnx file, or a directory with one.

    Errors: ModelNotFound, CorruptModel, UnsupportedModel (not a decoder, or of a form that cannot be cut).
    """
    return OnnxSource(_model_file(Path(path)))


class OnnxSource:
    """An exported decoder; see mesh/importer/sources/source.py for the attributes. `file` is the .onnx file."""

    kind: Literal["onnx", "safetensors", "gguf"] = "onnx"
    wide: ClassVar[bool] = False
    """Whether more than the hidden state may go from layer to layer. `part` has no form for that."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._open(lambda: load(file), _read_config(file))

    def _open(self, graph: Callable[[], DecoderGraph], config: dict[str, Any]) -> None:
        try:
            with decoding(CorruptModel, str(self.file)):
                self._analyse(graph(), config)
        except NotConcrete as error:
            raise UnsupportedModel(
                f"{self.file}: {error} depends on the tokens: export without data-dependent shapes (experts as batched products, "
                "such as experts_implementation='batched_mm' of transformers)"
            ) from None

    def _analyse(self, graph: DecoderGraph, config: dict[str, Any]) -> None:
        file, self.graph, self._config = self.file, graph, config
        self.patterns: list[AttentionPattern] = find_attention(self.graph)
        self._layers = find_layers(self.graph, self.patterns)
        self._path = DataPath(self.graph, self.patterns)
        probe = GraphProbe(self.graph, BATCH, CHUNK, PAST if self.graph.has_past else 0)
        self.context_length = self._context_length()
        reader = MaskReader(self.graph, self.context_length)
        self.rules: list[ScoreRule] = [reader.read(pattern) for pattern in self.patterns]
        self._cut = self._cuts(probe)
        self._inputs = InputParts(self.graph, self.context_length)
        logits = probe.shape(self.graph.logits)
        if len(logits) != 3 or logits[:2] != (BATCH, CHUNK):
            raise UnsupportedModel(
                f"{file}: the logits have shape {list(logits)} for {BATCH} rows of {CHUNK} tokens: export the logits of every position"
            )
        self.vocab_size = logits[2]
        self.hidden_size = self._cut.size
        self._type = probe.dtype(self._cut.values[0])

    def _cuts(self, probe: GraphProbe) -> Cut:
        """Where the graph is cut: at single values where there are some, else, if it may be, at as many as cross."""
        try:
            return find_cuts(self._path, self._layers, probe)
        except UnsupportedModel:
            if not self.wide:
                raise
            past = PAST if self.graph.has_past else 0
            return find_wide_cuts(self._path, self._layers, [probe, GraphProbe(self.graph, BATCH + 3, CHUNK + 4, past)])

    @property
    def name(self) -> str:
        stem = self.file.stem
        return self.file.parent.name if stem in ("model", "decoder_model", "decoder_with_past_model", "decoder_model_merged") else stem

    @property
    def architecture(self) -> str:
        found = self._config.get("model_type")
        return str(found) if isinstance(found, str) else "onnx"

    @property
    def arithmetic(self) -> DType:
        """The type of the source's own arithmetic; what has more bits than float32 counts as that."""
        return next((name for name, dtype in NUMPY_DTYPES.items() if dtype == self._type), "float32")

    @property
    def layers(self) -> int:
        return len(self._layers)

    @property
    def kept_weights(self) -> WeightsInfo | None:
        """Weights that an export has quantized are re-emitted as its graph has them."""
        found = [node for node in self.graph.nodes if node.op_type == "DequantizeLinear" and input_of(node, 0).dtype in _CODE_BITS]
        if not found:
            return None
        bits = [_CODE_BITS[code] for node in found if (code := input_of(node, 0).dtype) is not None]
        group = int(attribute(found[0], "block_size", 0))
        names = ", ".join(f"{each} bits" for each in sorted(set(bits)))
        return WeightsInfo(bits=4 if sum(bits) < 6 * len(bits) else 8, group_size=group or None, kept=names)

    @property
    def cache(self) -> tuple[CacheInfo, ...]:
        return tuple(map(self._kept, self._layers))

    def _kept(self, layer: DecoderLayer) -> CacheInfo:
        states = tuple(StateInfo(shape=state_shape(state.before)) for state in layer.states)
        pattern, rule = layer.pattern, self._rule(layer)
        if pattern is None or rule is None:
            return CacheInfo(kv_heads=0, key_dim=0, value_dim=0, states=states)
        widths = {"key_dim": pattern.k.layout.width, "value_dim": pattern.v.layout.width}
        return CacheInfo(kv_heads=pattern.kv_heads, **widths, window=rule.most, states=states)

    def _rule(self, layer: DecoderLayer) -> ScoreRule | None:
        return None if layer.pattern is None else self.rules[layer.pattern.number]

    @property
    def owners(self) -> tuple[int, ...]:
        """For each layer the first that has its keys and values; nothing where all have their own."""
        first: dict[tuple[ir.Value, ir.Value], int] = {}
        found = tuple(first.setdefault((each.k.value, each.v.value), each.number) for each in self.patterns)
        return found if len(first) < len(found) else ()

    def _context_length(self) -> int:
        config = self._config.get("text_config") or self._config
        said = next((int(config[key]) for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None)
        limits = [limit for limit in (said, context_limit(self.graph)) if limit is not None]
        return max(1, min(limits)) if limits else DEFAULT_CONTEXT

    def write_blocks(self, writer: BlockWriter, options: ImportOptions, progress: Progress) -> tuple[BlockInfo, ...]:
        """See mesh/importer/sources/source.py. Weights are read from the source's file while their block is written."""
        cuts, size, total = self._cut.crossings, self._cut.size, self.layers + 2
        logits = (Crossing(self.graph.logits, (0, 1, 2), (self.vocab_size,)),)
        parts = [Part(block_name("embed"), (), cuts[0], size)]
        parts += [Part(block_name(i), cuts[i], cuts[i + 1], size, self._rule(each), each.states) for i, each in enumerate(self._layers)]
        parts.append(Part(block_name("head"), cuts[-1], logits, size))
        blocks = []
        for done, part in enumerate(parts):
            progress(part.name, done, total)
            blocks.append(self.build(part, options).write(writer))
            self._release()
        progress("done", total, total)
        return tuple(blocks)

    def _release(self) -> None:
        """Unmap the weights: pages of a mapped file that were read count as memory until then."""
        for value in self.graph.model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                with suppress(BufferError):  # the analysis still uses this table
                    value.const_value.release()

    def build(self, part: Part, options: ImportOptions) -> GraphBuilder:
        """The graph of one block, with its inputs and outputs declared."""
        builder = GraphBuilder(part.name, options)
        emitter = Emitter(self._path, self._inputs, builder, part, self._type)
        hidden: list[int | str] = ["batch", "chunk", self.hidden_size]
        out = "logits" if part.end[0].value is self.graph.logits else "hidden_out"
        emitter.emit(out)
        if not part.start:
            builder.input("input_ids", ["batch", "chunk"], TensorProto.INT64)
        else:
            builder.input("hidden_in", hidden)
        if part.rule is not None or emitter.uses_positions:
            if out == "logits":
                raise UnsupportedModel(f"{self.file}: the head needs positions: not supported")
            builder.input("position_ids", ["batch", "chunk"], TensorProto.INT64)
        builder.output(out, ["batch", "chunk", self.vocab_size] if out == "logits" else hidden)
        for number, state in enumerate(part.states):
            for value, declare in ((f"past_state_{number}", builder.input), (f"present_state_{number}", builder.output)):
                declare(value, ["batch", *state_shape(state.before)], TensorProto.FLOAT)
        if part.rule is not None:
            cache = self.cache[self._cut.crossings.index(part.start)]
            builder.input("write_indices", ["batch"], TensorProto.INT64)
            for which, width in (("key", cache.key_dim), ("value", cache.value_dim)):
                shape: list[int | str] = ["batch", cache.kv_heads, "cache", width]
                builder.input(f"past_{which}", shape)
                builder.output(f"present_{which}", shape)
        return builder

    def part(self, index: int) -> tuple[bytes, str | None, str]:
        """The source's own nodes of one block as a model: (its bytes, its hidden input, its output).

        Part 0 is embed, which has no hidden input (None); the last part is the head. The weights stay in the source's files.
        """
        cuts = self._cut.values
        start = cuts[index - 1] if index else None
        end = cuts[index] if index < len(cuts) else self.graph.logits
        inputs, stack, seen = ([start] if start is not None else []), [end], {start}
        while stack:
            value = stack.pop()
            if value in seen:
                continue
            seen.add(value)
            if value in self.graph.roles:
                inputs.append(value)
            elif (node := value.producer()) is not None:
                stack.extend(v for v in node.inputs if v is not None)
        graph = ir.convenience.extract(self.graph.model.graph, inputs, [end])
        for number, node in enumerate(graph):
            node.name = f"part{index}_{number}"  # rewritten nodes may share a name, which onnxruntime refuses
            if node.op_type == "Attention" and node.domain == "":
                for past in range(4, min(6, len(node.inputs))):  # empty here, and onnxruntime wants the present with it
                    node.replace_input_with(past, None)
        for value in graph.outputs:
            value.dtype = value.dtype or ir.DataType.FLOAT
        for value in graph.inputs:
            if start is not None and value.name == start.name:
                value.dtype, value.shape = value.dtype or ir.DataType.FLOAT, ir.Shape(["batch", "chunk", self.hidden_size])
        model = ir.Model(graph, ir_version=max(self.graph.model.ir_version, 10))
        return ir.to_proto(model).SerializeToString(), None if start is None else start.name, str(end.name)

    def write_tokenizer(self, directory: Path) -> tuple[TokenizerInfo | None, tuple[FileInfo, ...]]:
        """From the Hugging Face files beside the .onnx file."""
        from mesh.importer.sources.tokenizer import write_huggingface_tokenizer

        return write_huggingface_tokenizer(self.file.parent, directory)


def _model_file(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise ModelNotFound(f"{path} does not exist: give an .onnx file or a directory with one")
    for folder in (path, path / "onnx"):
        for name in ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx", "decoder_model.onnx"):
            if (folder / name).is_file():
                return folder / name
    found = sorted(path.glob("*.onnx"))
    if len(found) != 1:
        what = "no .onnx file" if not found else f"{len(found)} .onnx files"
        raise ModelNotFound(f"{path} has {what}, none named model.onnx: give the file itself")
    return found[0]


def _read_config(file: Path) -> dict[str, Any]:
    for folder in (file.parent, file.parent.parent):
        for name in ("config.json", "genai_config.json"):
            path = folder / name
            if not path.is_file():
                continue
            try:
                config = orjson.loads(path.read_bytes())
            except orjson.JSONDecodeError:
                raise CorruptModel(f"{path} is not valid JSON: download it again or remove it") from None
            if isinstance(config, dict):
                return config.get("model", config) if name == "genai_config.json" else config
    return {}
