"""Blocks: building their graphs and writing them to disk, for every importer. See docs/model-format.md for what a block is.

GraphBuilder      nodes and named weights of one block; a weight may be produced later, when it is written
attention_block   the one form of cached attention that blocks have
BlockWriter       streams a block to NAME.onnx and NAME.onnx.data, one tensor in memory at a time
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from mesh.dtypes import NUMPY_DTYPES
from mesh.importer.options import ImportOptions
from mesh.importer.precision import Rounding, fits
from mesh.importer.write.kept import UNQUANTIZED, Kept, KeptForm, SourceMatrix
from mesh.importer.write.narrow import Narrow, compensated, fit
from mesh.importer.write.narrow_nodes import narrow_matrix, narrow_rows
from mesh.importer.write.quantize import EXPERT_GROUP, exact_type, half_type, quantize_rows, quantize_weight
from mesh.importer.write.writer import INLINE_BYTES, BlockWriter, Weight, WeightValue, as_callable, block_model
from mesh.model.manifest import BlockInfo, block_name
from mesh.types import DType

Array = npt.NDArray[Any]
_PICKS = ("Gather", "GatherND", "Reshape", "Transpose")
_BFLOAT16, _FLOAT16 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)

__all__ = ["INLINE_BYTES", "BlockWriter", "GraphBuilder", "Weight", "WeightValue", "attention_block"]


def tensor_type(dtype: DType) -> int:
    """TensorProto type of a compute type."""
    return int(helper.np_dtype_to_tensor_dtype(NUMPY_DTYPES[dtype]))


class GraphBuilder:
    """Nodes and weights of one block in opset 24. Values are names; `prefix` begins every name it makes up."""

    def __init__(self, name: str, options: ImportOptions | None = None, *, prefix: str = "") -> None:
        self.name = name
        self.options = options or ImportOptions()
        self.prefix = prefix
        self.nodes: list[NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.weights: dict[str, WeightValue] = {}
        self.kept: list[KeptForm] = []
        self._rounding: set[str] = set()  # values of weights whose products round their inputs
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._count = 0

    def input(self, name: str, shape: Sequence[int | str], dtype: int | None = None) -> str:
        """Declare a graph input; dtype is a TensorProto type, None the compute type."""
        self.inputs.append(helper.make_tensor_value_info(name, self._type(dtype), list(shape)))
        return name

    def output(self, name: str, shape: Sequence[int | str], dtype: int | None = None) -> None:
        """Declare the value `name` a graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, self._type(dtype), list(shape)))

    def op(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Add a node with one output and return that output's name. An input left out is ''."""
        return self.ops(op_type, *inputs, out=[out or self._fresh(op_type)], **attributes)[0]

    def ops(self, op_type: str, *inputs: str, out: int | Sequence[str], **attributes: Any) -> list[str]:
        """Add a node with several outputs (their number or their names) and return the names."""
        outputs = [self._fresh(op_type) for _ in range(out)] if isinstance(out, int) else list(out)
        attributes = {name: value for name, value in attributes.items() if value is not None}
        self.nodes.append(helper.make_node(op_type, list(inputs), outputs, name=f"{self.prefix}{op_type}_{len(self.nodes)}", **attributes))
        return outputs

    def const(self, value: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> str:
        """A constant (a Constant node; equal ones are shared). dtype None: int64 or the compute type, as the value is."""
        array = np.asarray(value)
        if dtype is None:
            dtype = self.options.compute if array.dtype.kind == "f" else np.int64
        array = array.astype(dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.op("Constant", value=numpy_helper.from_array(array))
        return self._constants[key]

    def weight(self, name: str, value: WeightValue) -> str:
        """Add a weight that is stored as it is given. Returns its name."""
        if name in self.weights:
            raise ValueError(f"block {self.name} already has a weight {name}")
        self.weights[name] = value
        return name

    def parameter(self, name: str, value: WeightValue) -> str:
        """Add a weight stored in the compute type (norms, biases)."""
        return self.weight(name, Weight(as_callable(value), self.options.compute))

    def linear(self, x: str, name: str, weight: WeightValue, bias: WeightValue | None = None, *, out: str | None = None) -> str:
        """x [..., in] @ weight [in, out] + bias [out], the weight stored as the options say."""
        own = self._own(weight)
        if own is not None and own[0].order is not None:
            x = self.op("Gather", x, self.weight(f"{name}.order", Weight(as_callable(own[0].order), counted=0)), axis=-1)
        if bias is None:
            return self.op("MatMul", x, self.matrix(name, weight), out=out)
        product = self.op("MatMul", x, self.matrix(name, weight))
        return self.op("Add", product, self.parameter(f"{name}.bias", bias), out=out)

    def matrix(self, name: str, weight: WeightValue, *, experts: bool = False) -> str:
        """A MatMul weight [in, out], or [experts, in, out], stored as the options say; returns its value in the compute type."""
        options, produce = self.options, as_callable(weight)
        own = self._own(weight)
        if own is not None:
            value = self.op("Transpose", self._kept_outputs(name, *own), perm=[1, 0])
            return self._rounds(value) if own[0] == UNQUANTIZED[_BFLOAT16] else value
        if options.keep and experts:
            stored = exact_type if options.products is None else _BFLOAT16
            return self._rounds(self.op("Cast", self.weight(f"{name}.weight", Weight(produce, stored)), to=TensorProto.FLOAT))
        if options.bits == 32:
            return self.weight(f"{name}.weight", Weight(produce, options.compute, narrows=True))
        if options.bits == 16:
            if options.dtype != "float32":
                return self.parameter(f"{name}.weight", weight)
            stored = half_type if options.products is None else _BFLOAT16
            return self._rounds(self.op("Cast", self.weight(f"{name}.weight", Weight(produce, stored)), to=TensorProto.FLOAT))
        if options.bits == 4:
            choice = self._choice(name, produce, axis=-2)
            if choice.bits != 8:
                perm = [0, 2, 1] if experts else [1, 0]
                return self.op("Transpose", self._narrow_outputs(name, choice, produce), perm=perm)
            options = options.eight_bits()
        quantized = _Once(lambda: quantize_weight(produce(), options), uses=2)
        values = self.weight(f"{name}.weight", lambda: quantized.get().values)
        scale = self.weight(f"{name}.scale", lambda: quantized.get().scale)
        if experts:
            return self.op("DequantizeLinear", values, scale, axis=1, block_size=options.group_size or EXPERT_GROUP)
        if options.group_size is not None:
            return self.op("DequantizeLinear", values, scale, axis=0, block_size=options.group_size)
        return self.op("DequantizeLinear", values, scale, axis=1)

    def experts(self, name: str, weight: WeightValue) -> tuple[str, bool]:
        """The weights of experts that a gather chooses from, and whether they are [experts, out, in] in place of [experts, in, out]: those
        that are kept."""
        own = self._own(weight)
        if own is None or not isinstance(weight, SourceMatrix) or weight.experts is None:
            if self.options.bits == 4:
                choice = self._choice(name, as_callable(weight), axis=-2)
                if choice.bits != 8:
                    return self._narrow_outputs(name, choice, as_callable(weight)), True
            return self.matrix(name, weight, experts=True), False
        value = self.op("Reshape", self._kept_outputs(name, *own), self.const(weight.experts))
        return self._rounds(value) if own[0] == UNQUANTIZED[_BFLOAT16] else value, True

    def embedding(self, ids: str, name: str, table: WeightValue, *, out: str | None = None) -> str:
        """Rows `ids` [...] of table [vocab, width]: [..., width]. At 8 bits rows are int8 with a scale each.

        Only the rows asked for are converted: a table is large and a step reads few rows of it.
        """
        options = self.options
        if isinstance(table, SourceMatrix):
            own = self._own(table)
            if own is not None and own[0].has_rows:
                return self._kept_rows(ids, name, *own, out)
            table = table.read
        produce = as_callable(table)
        if options.bits == 32 or (options.bits == 16 and options.dtype != "float32"):
            return self.op("Gather", self.weight(f"{name}.weight", Weight(produce, options.compute, narrows=True)), ids, out=out)
        if options.bits == 16:
            rows = self.op("Gather", self.weight(f"{name}.weight", Weight(produce, half_type)), ids)
            return self.op("Cast", rows, to=TensorProto.FLOAT, out=out)
        if options.bits == 4:
            choice = self._choice(name, produce, axis=-1)
            if choice.bits != 8:
                return narrow_rows(self, ids, name, choice.bits, self._group, choice.shape[-1], self._rounded(choice, produce), out)
        quantized = _Once(lambda: quantize_rows(produce(), options), uses=2)
        codes = self.op("Gather", self.weight(f"{name}.weight", lambda: quantized.get()[0]), ids)
        scale = self.op("Gather", self.weight(f"{name}.scale", lambda: quantized.get()[1]), ids)
        return self.op("Mul", self.op("Cast", codes, to=self._type(None)), scale, out=out)

    def _choice(self, name: str, produce: Callable[[], Array], *, axis: int) -> Rounding:
        """How a weight is rounded. axis: of its inputs."""
        known = self.options.choices.get((self.name, name))
        if known is not None:
            return known
        shape = np.shape(produce())
        wide = self.name in (block_name("embed"), block_name("head")) and fits(shape[axis], self._group, 6)
        return Rounding(6 if wide else 4 if fits(shape[axis], self._group, 4) else 8, shape)

    def _narrow_outputs(self, name: str, choice: Rounding, produce: Callable[[], Array]) -> str:
        """A weight of 4 or 6 bits, stored [out, in]; returns its value [out, in], or [experts, out, in]."""
        assert choice.bits != 8
        *lead, depth, out = choice.shape
        rows = self._rounded(choice, lambda: _outputs_first(produce()))
        value = narrow_matrix(self, name, choice.bits, self._group, (int(np.prod(lead, dtype=int)) * out, depth), rows)
        return self.op("Reshape", value, self.const([*lead, out, depth])) if lead else value

    def _rounded(self, choice: Rounding, produce: Callable[[], Array]) -> Callable[[], Narrow]:
        """What rounds a weight [out, in], once for the arrays that it is stored as."""
        bits, step = choice.bits, self.options.compute
        assert bits != 8

        def rounded() -> Narrow:
            weight = produce()
            narrow = fit(weight, bits, self._group, step, choice.importance)
            return narrow if choice.moments is None else compensated(weight, narrow, choice.moments)

        return _Once(rounded, uses=5 if bits == 4 else 4).get

    @property
    def _group(self) -> int:
        assert self.options.group_size is not None  # at 4 bits
        return self.options.group_size

    @property
    def compute_type(self) -> int:
        """TensorProto type of the compute type."""
        return tensor_type(self.options.dtype)

    def _own(self, weight: WeightValue) -> tuple[KeptForm, Callable[[], Kept]] | None:
        """How the source quantized the weight, and what reads it so, if that is to be kept."""
        if not self.options.keep or not isinstance(weight, SourceMatrix) or weight.form is None or weight.keep is None:
            return None
        if self.options.products is not None and weight.form == UNQUANTIZED[_FLOAT16]:
            return None
        return weight.form, weight.keep

    def _rounds(self, weight: str) -> str:
        """The value of a weight, whose products round their inputs if the options say so."""
        if self.options.products is not None:
            self._rounding.add(weight)
        return weight

    def _with_rounding(self) -> list[NodeProto]:
        """The nodes, with two Casts before each input that products round: to bfloat16 and back."""
        nodes: list[NodeProto] = []
        rounding = set(self._rounding)  # with what is picked from such weights
        rounded: dict[str, str] = {}
        for node in self.nodes:
            if node.op_type in _PICKS and node.input[0] in rounding:
                rounding.update(node.output)
            others = [each for each in node.input if each not in rounding]
            if node.op_type == "MatMul" and len(others) == 1:
                [x] = others
                if x not in rounded:
                    rounded[x] = f"{x}.rounded"
                    nodes.append(helper.make_node("Cast", [x], [f"{x}.bfloat16"], to=TensorProto.BFLOAT16))
                    nodes.append(helper.make_node("Cast", [f"{x}.bfloat16"], [rounded[x]], to=TensorProto.FLOAT))
                inputs = [rounded[x] if each == x else each for each in node.input]
                node = helper.make_node("MatMul", inputs, node.output, name=node.name)
            nodes.append(node)
        return nodes

    def _kept_outputs(self, name: str, form: KeptForm, keep: Callable[[], Kept]) -> str:
        """A weight as its source has quantized it, stored [out, in]; returns its value [out, in]."""
        stored = self._stored(name, form, keep)
        if stored.scale is None:
            return self.op("Cast", stored.codes, to=TensorProto.FLOAT)
        zero = [] if stored.zero is None else [stored.zero]
        axis, group = (1, form.group) if form.group else (0, None)
        values = self.op("DequantizeLinear", stored.codes, self._factors(form, *stored.scale), *zero, axis=axis, block_size=group)
        if stored.minimum is not None:
            lifted = self.op("Unsqueeze", self._factors(form, *stored.minimum), self.const([2]))
            grouped = self.op("Reshape", values, self.const([0, -1, form.group]))
            shifted = self.op("Add" if form.minimum == "add" else "Sub", grouped, lifted)
            values = self.op("Reshape", shifted, self.const([0, -1]))
        return values

    def _kept_rows(self, ids: str, name: str, form: KeptForm, keep: Callable[[], Kept], out: str | None) -> str:
        """Rows `ids` of a table as its source has quantized it. Its codes are bytes: Gather has no smaller ones everywhere."""
        if not form.scaled:
            taken = self.op("Gather", self._stored(name, form, keep).codes, ids)
            return self.op("Cast", taken, to=TensorProto.FLOAT, out=out)
        stored = self._stored(name, form, keep, codes=np.dtype(np.int8 if form.codes.name.startswith("int") else np.uint8))
        assert stored.scale is not None

        def rows(each: str, last: int) -> str:
            taken = self.op("Cast", self.op("Gather", each, ids), to=TensorProto.FLOAT)
            return self.op("Reshape", taken, self.const([0, 0, -1, last]))

        def factors(data: str, step: str | None) -> str:
            if step is None or form.each is None:
                return rows(data, 1)
            return self.op("Reshape", self.op("Mul", rows(data, form.each), rows(step, 1)), self.const([0, 0, -1, 1]))

        values = self.op("Mul", rows(stored.codes, form.group), factors(*stored.scale))
        if stored.minimum is not None:
            values = self.op("Add" if form.minimum == "add" else "Sub", values, factors(*stored.minimum))
        return self.op("Reshape", values, self.const([0, 0, -1]), out=out)

    def _stored(self, name: str, form: KeptForm, keep: Callable[[], Kept], codes: np.dtype[Any] | None = None) -> _Stored:
        """The weights of a kept tensor. It is read once for all of them."""
        steps = 1 if form.each is None else 2
        source = _Once(keep, uses=1 + steps * ((1 if form.scaled else 0) + (0 if form.minimum is None else 1)) + (1 if form.zero else 0))
        self.kept.append(form)

        def factors(what: str) -> tuple[str, str | None]:
            data = self.weight(f"{name}.{what}", Weight(lambda: getattr(source.get(), what)[0], counted=0))
            if form.each is None:
                return data, None
            return data, self.weight(f"{name}.{what}_step", Weight(lambda: getattr(source.get(), what)[1], counted=0))

        return _Stored(
            codes=self.weight(f"{name}.weight", Weight(lambda: source.get().codes, codes, counted=1)),
            scale=factors("scale") if form.scaled else None,
            minimum=None if form.minimum is None else factors("minimum"),
            zero=self.weight(f"{name}.zero", Weight(lambda: source.get().zero, counted=0)) if form.zero else None,
        )

    def _factors(self, form: KeptForm, data: str, step: str | None) -> str:
        """Numbers of groups [out, groups] as float32."""
        if step is None:
            return self.op("Cast", data, to=TensorProto.FLOAT)
        return self.op("DequantizeLinear", data, self.op("Cast", step, to=TensorProto.FLOAT), axis=1, block_size=form.each)

    def model(self) -> ModelProto:
        """The graph without its weights, which BlockWriter adds."""
        return block_model(helper.make_graph(self._with_rounding(), self.name, self.inputs, self.outputs))

    def write(self, writer: BlockWriter) -> BlockInfo:
        """Write the block under its name."""
        return writer.write(self.name, self.model(), self.weights)

    def _type(self, dtype: int | None) -> int:
        return tensor_type(self.options.dtype) if dtype is None else dtype

    def _fresh(self, op_type: str) -> str:
        self._count += 1
        return f"{self.prefix}{op_type.lower()}_{self._count}"


def attention_block(
    builder: GraphBuilder,
    q: str,
    k: str,
    v: str,
    *,
    position_ids: str = "position_ids",
    write_indices: str = "write_indices",
    past_key: str = "past_key",
    past_value: str = "past_value",
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
    chunk: int | None = None,
    alibi_slopes: npt.ArrayLike | None = None,
    sinks: npt.ArrayLike | None = None,
    mask: str | None = None,
    present: tuple[str, str] = ("present_key", "present_value"),
) -> tuple[str, str, str]:
    """Write new keys and values to the cache and attend over it: (context [B, Hq, T, Dv], present_key, present_value).

    q [B, Hq, T, Dk], k [B, Hkv, T, Dk], v [B, Hkv, T, Dv] are values of the compute type. `window`: tokens seen, the own one
    included. `chunk`: positions are seen from the last multiple of it on. `alibi_slopes` [Hq] adds slope * (slot - position); `mask`
    names a further additive bias [B or 1, Hq or 1, T, S]. `sinks` [Hq] are one more logit of each head's softmax, without a value.
    """
    present_key = builder.op("TensorScatter", past_key, k, write_indices, axis=-2, mode="linear", out=present[0])
    present_value = builder.op("TensorScatter", past_value, v, write_indices, axis=-2, mode="linear", out=present[1])
    slots, positions = cache_slots(builder, position_ids, past_key)
    attn_mask = builder.op("LessOrEqual", slots, positions)
    if window is not None:
        recent = builder.op("Greater", slots, builder.op("Sub", positions, builder.const(window)))
        attn_mask = builder.op("And", attn_mask, recent)
    if chunk is not None:
        begin = builder.op("Mul", builder.op("Div", positions, builder.const(chunk)), builder.const(chunk))
        attn_mask = builder.op("And", attn_mask, builder.op("GreaterOrEqual", slots, begin))
    bias = mask
    if alibi_slopes is not None:
        distance = builder.op("Cast", builder.op("Sub", slots, positions), to=tensor_type(builder.options.dtype))
        slopes = np.asarray(alibi_slopes, np.float32).reshape(1, -1, 1, 1)
        alibi = builder.op("Mul", distance, builder.const(slopes))
        bias = alibi if bias is None else builder.op("Add", bias, alibi)
    if bias is not None:
        attn_mask = builder.op("Where", attn_mask, bias, builder.const(-np.inf))
    keys, values = present_key, present_value
    if sinks is not None:
        keys, values, attn_mask = with_sinks(builder, keys, values, attn_mask, sinks, additive=bias is not None)
    context = builder.op("Attention", q, keys, values, attn_mask, is_causal=0, scale=float(scale), softcap=float(softcap))
    return context, present_key, present_value


def with_sinks(builder: GraphBuilder, keys: str, values: str, mask: str, sinks: npt.ArrayLike, *, additive: bool) -> tuple[str, str, str]:
    """Keys, values and mask with one more position, whose key and value are zeros and whose bias is the sink of each head [Hq]."""
    own = np.asarray(sinks, np.float32).reshape(1, -1, 1, 1)
    zeros = builder.const(np.zeros(own.shape, np.float32))
    bias = builder.op("Add", mask, zeros) if additive else builder.op("Where", mask, zeros, builder.const(-np.inf))  # [B, Hq, T, S]
    size = builder.op("Concat", builder.op("Shape", bias, start=0, end=3), builder.const([1]), axis=0)
    column = builder.op("Expand", builder.parameter("attention.sinks", Weight(lambda: own)), size)
    one = builder.const([0, 0, 0, 0, 0, 0, 1, 0])
    return builder.op("Pad", keys, one), builder.op("Pad", values, one), builder.op("Concat", bias, column, axis=-1)


def cache_slots(builder: GraphBuilder, position_ids: str, past_key: str) -> tuple[str, str]:
    """(slot numbers int64 [S], positions int64 [B, 1, T, 1]): compared, they broadcast to a mask [B, 1, T, S]."""
    length = builder.op("Squeeze", builder.op("Shape", past_key, start=2, end=3), builder.const([0]))
    slots = builder.op("Range", builder.const(0), length, builder.const(1))
    return slots, builder.op("Unsqueeze", position_ids, builder.const([1, 3]))


@dataclass(frozen=True, slots=True)
class _Stored:
    """The names of a kept tensor's weights; of a scale and a minimum also that of their step, where they have one."""

    codes: str
    scale: tuple[str, str | None] | None
    minimum: tuple[str, str | None] | None
    zero: str | None


def _outputs_first(weight: Array) -> Array:
    """[in, out] -> [out, in], [experts, in, out] -> [experts * out, in]"""
    turned = weight.swapaxes(-1, -2)
    return turned if turned.ndim == 2 else turned.reshape(-1, turned.shape[-1])


class _Once:
    """A computation whose result several weights share. It runs at the first use, and the result is dropped after the last."""

    def __init__(self, produce: Callable[[], Any], uses: int) -> None:
        self._produce = produce
        self._uses = uses
        self._left = 0
        self._result: Any = None

    def get(self) -> Any:
        if self._left == 0:
            self._result, self._left = self._produce(), self._uses
        result = self._result
        self._left -= 1
        if self._left == 0:
            self._result = None
        return result
