"""How much memory a layer range takes, before anything of it is loaded.

The planner places layers with these figures and the runtime refuses a range with the same ones, so that a placement which
fits is a placement which loads. Weights and KV cache are exact; workspace is an upper estimate from what a manifest knows.

    weights     the blocks' `weight_bytes`: as stored, quantized ones at their stored width
    KV cache    rows * (context + slack) * kv_heads * (key_dim + value_dim) * itemsize, summed over the layers; of int8 each
                key and value has 4 bytes more, its scale. A layer with a sliding window holds the whole context too: its cache
                is addressed by absolute position. Without a cache: that of one row, and rows * context * (D * itemsize + 4)
                for the input of every row (4 alone on the first stage: tokens).
                A layer with states has (rows * STATE_PLACES + 2) times their bytes, whatever the context
    workspace   of the larger step, a decode batch (a token for each row) or a prefill chunk of `prefill_rows`:
                  activations   tokens * (4 D + 3 W) * 4 bytes: residual, normed, attention's in and out; gate, up and product
                  scores        2 * tokens * query_heads * context * 4 bytes: scores and probabilities of one layer
                  reads         rows of the step * context * kv_heads * (key_dim + value_dim) * 4 bytes: one layer's keys and
                                values as attention reads them. Neither scores nor reads where it goes through the cache in blocks, as on
                                a CPU: a block takes 3 MB
                and for either step
                  logits        8 * rows * vocab * 4 bytes (head only): the product and its copy, the changed logits, and what a draw
                                makes of them: penalties and counts, the scaled ones, their weights, noise
                  history       rows * (context + slack) * 4 bytes (head only): the tokens that penalties look at
                  widening      the largest matrix at the compute type, where weights are stored narrower than that and no kernels
                                read them so: XLA is expected to widen one matrix at a time
    process     what a shard takes without any model: the interpreter, libraries and their files (which the shards of a host
                share), and for each shape that a step can have a compiled program of a layer, and one of the head. Measured on
                a CPU with bench/memory.py

A manifest names neither query heads nor the MLP's width W. Query heads are taken as D / key_dim (never fewer than kv_heads);
W as what the layer's parameters leave for one up and one down matrix after attention, an upper bound for a gated MLP.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from mesh.dtypes import CACHE_DTYPES, NUMPY_DTYPES, cache_width
from mesh.errors import BadLayerRange, PlanError
from mesh.model.manifest import CacheInfo, Manifest
from mesh.types import CacheDType, LayerRange

__all__ = ["CACHE_SLACK", "DEFAULT_CHUNK", "SHARED_BYTES", "BlockShape", "MemoryNeed", "ModelShape", "predict", "stored_bytes"]

DEFAULT_CHUNK = 256
"""Tokens of a prefill chunk unless configured otherwise."""

CACHE_SLACK = 16
"""Positions that a row of the cache has beyond its context; also the smallest prefill chunk. Equal to mesh/runtime/cache.py's."""

STATE_PLACES = 4
"""How many positions of a row a stage keeps the states of: see mesh/runtime/row_states.py."""

SPARE_STATES = 2
"""Places of no row: the zeros before position 0, and where a step writes what it computes for rows that it leaves out."""

SHARED_BYTES = 145 << 20
"""The files of libraries in a shard's memory, which the shards of a host share."""
_PROCESS_BYTES = (141 << 20) + SHARED_BYTES
"""Of a shard on a CPU, without a model."""
_PROGRAM_BYTES = int(3.6 * 2**20)
_HEAD_PROGRAM_BYTES = int(4.5 * 2**20)
"""Of a compiled program of a layer, and of the head."""
_PREFILL_SHAPES = 3
_LOGITS = 8
"""Arrays of rows * vocab float32 that head and sampling hold at once."""

_FLOAT32 = 4
_TOKEN_BYTES = 4


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes one shard needs for one range."""

    weights_bytes: int
    cache_bytes: int
    workspace_bytes: int
    process_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.cache_bytes + self.workspace_bytes + self.process_bytes


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One block: the bytes its weights are stored in, and how many numbers they are."""

    weights_bytes: int
    parameters: int


@dataclass(frozen=True)
class ModelShape:
    """What a plan has to know about a model, imported or not. `bits` is the stored width of the weights; itemsizes are bytes."""

    name: str
    embed: BlockShape
    layers: tuple[BlockShape, ...]
    head: BlockShape
    cache: tuple[CacheInfo, ...]  # one a layer
    hidden_size: int
    vocab_size: int
    context_length: int
    bits: int
    compute_itemsize: int
    cache_dtype: CacheDType
    model_hash: str | None = None  # None: not imported
    notes: tuple[str, ...] = ()  # what was assumed

    @classmethod
    def of(cls, manifest: Manifest) -> ModelShape:
        """The shape of an imported model; exact."""
        embed, *layers, head = (BlockShape(block.weight_bytes, block.parameters) for block in manifest.blocks)
        return cls(
            name=manifest.name,
            embed=embed,
            layers=tuple(layers),
            head=head,
            cache=manifest.cache,
            hidden_size=manifest.hidden.size,
            vocab_size=manifest.vocab_size,
            context_length=manifest.context_length,
            bits=manifest.weights.bits,
            compute_itemsize=NUMPY_DTYPES[manifest.hidden.dtype].itemsize,
            cache_dtype=manifest.cache_dtype,
            model_hash=manifest.model_hash,
        )

    @classmethod
    def hypothetical(
        cls,
        *,
        name: str,
        parameters: int,
        layers: int,
        vocab_size: int,
        context_length: int,
        bits: int = 16,
        hidden_size: int | None = None,
        kv_heads: int | None = None,
        head_dim: int | None = None,
    ) -> ModelShape:
        """The shape of a decoder known only by its size.

        `parameters` count the embedding and the output matrix separately; the rest is spread evenly over the layers.
        Where `hidden_size` is not given it is that of a standard decoder, parameters = 12 layers D^2 + 2 vocab D, to the
        nearest multiple of 128; heads are 128 wide and every one has its own keys. Compute and cache are 16-bit, unless
        weights are stored in 32 bits.
        """
        notes = []
        if hidden_size is None:
            root = (math.sqrt(vocab_size**2 + 12 * layers * parameters) - vocab_size) / (12 * layers)
            hidden_size = max(128, 128 * round(root / 128)) if root >= 64 else max(8, round(root))
            notes.append(f"hidden_size {hidden_size} is estimated from the number of parameters")
        if head_dim is None:
            head_dim = min(128, hidden_size)
        if kv_heads is None:
            kv_heads = max(1, hidden_size // head_dim)
            notes.append(f"kv_heads {kv_heads} assumes that every attention head has its own keys and values")
        table = vocab_size * hidden_size
        inner = parameters - 2 * table
        if inner < layers:
            raise PlanError(
                f"{name}: {parameters:,} parameters are fewer than its embedding and output matrix alone "
                f"(2 x {vocab_size:,} x {hidden_size:,}): check total_parameters, vocab_size and hidden_size"
            )
        dtype: CacheDType = "float32" if bits == 32 else "bfloat16"
        itemsize = CACHE_DTYPES[dtype].itemsize
        per_layer = [inner // layers + (1 if i < inner % layers else 0) for i in range(layers)]
        return cls(
            name=name,
            embed=BlockShape(stored_bytes(table, bits, hidden_size), table),
            layers=tuple(BlockShape(stored_bytes(count, bits, hidden_size), count) for count in per_layer),
            head=BlockShape(stored_bytes(table, bits, hidden_size), table),
            cache=(CacheInfo(kv_heads=kv_heads, key_dim=head_dim, value_dim=head_dim),) * layers,
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            context_length=context_length,
            bits=bits,
            compute_itemsize=itemsize,
            cache_dtype=dtype,
            notes=tuple(notes),
        )

    def with_bits(self, bits: int) -> ModelShape:
        """The same model imported at other `bits`; the bytes of its blocks become estimates. The model itself if `bits` is its own."""
        if bits == self.bits:
            return self

        def at(block: BlockShape) -> BlockShape:
            return BlockShape(stored_bytes(block.parameters, bits, self.hidden_size), block.parameters)

        note = f"weight bytes at {bits} bits are estimated from the number of parameters"
        return replace(
            self,
            embed=at(self.embed),
            layers=tuple(at(block) for block in self.layers),
            head=at(self.head),
            bits=bits,
            model_hash=None,
            notes=(*self.notes, note) if self.model_hash else self.notes,
        )

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @property
    def parameters(self) -> int:
        return self.embed.parameters + self.head.parameters + sum(block.parameters for block in self.layers)

    @property
    def weights_bytes(self) -> int:
        """All weights, once."""
        return self.embed.weights_bytes + self.head.weights_bytes + self.layer_weights[-1]

    @cached_property
    def layer_weights(self) -> tuple[int, ...]:
        """Prefix sums of the layers' weight bytes: layers [a, b) take [b] - [a]."""
        return tuple(accumulate((block.weights_bytes for block in self.layers), initial=0))

    @cached_property
    def cache_per_token(self) -> tuple[int, ...]:
        """Prefix sums of the cache bytes of one token in one row."""
        size = CACHE_DTYPES[self.cache_dtype].itemsize
        widths = (sum(cache_width(self.cache_dtype, dim) for dim in (info.key_dim, info.value_dim)) for info in self.cache)
        return tuple(accumulate((info.kv_heads * width * size for info, width in zip(self.cache, widths, strict=True)), initial=0))

    @cached_property
    def query_heads(self) -> tuple[int, ...]:
        return tuple(max(info.kv_heads, math.ceil(self.hidden_size / info.key_dim)) if info.attends else 0 for info in self.cache)

    @cached_property
    def states_of_a_row(self) -> tuple[int, ...]:
        """Prefix sums of the bytes of a row's states at one position."""
        return tuple(accumulate((sum(state.bytes for state in info.states) for info in self.cache), initial=0))

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The widest activation of each layer, numbers a token; see the module's head."""
        widths = []
        for block, info, heads in zip(self.layers, self.cache, self.query_heads, strict=True):
            # A layer that does not attend has nothing taken off, so its states' projections count as a wider MLP.
            attention = self.hidden_size * (heads + info.kv_heads) * (info.key_dim + info.value_dim)
            mlp = (block.parameters - attention) // (2 * self.hidden_size)
            widths.append(max(mlp, heads * max(info.key_dim, info.value_dim), self.hidden_size))
        return tuple(widths)


def stored_bytes(parameters: int, bits: int, hidden_size: int) -> int:
    """Bytes of `parameters` weights at `bits`.

    At 8 bits there is one float32 scale an output channel (of at least `hidden_size` weights); at 4 bits one a group of 32.
    """
    scales = {8: _FLOAT32 / hidden_size, 4: _FLOAT32 / 32}.get(bits, 0.0)
    return math.ceil(parameters * (bits / 8 + scales))


def predict(
    model: Manifest | ModelShape,
    layers: LayerRange,
    *,
    embed: bool,
    head: bool,
    rows: int,
    context: int,
    chunk: int = DEFAULT_CHUNK,
    prefill_rows: int = 1,
    kv_cache: bool = True,
    widens: bool = False,
    in_blocks: bool = False,
) -> MemoryNeed:
    """What a shard that holds `layers` needs, with the embedding and the head where asked.

    `rows` sequences are held at once, each of up to `context` tokens; a prefill step takes `prefill_rows` of them by up to
    `chunk` tokens. Without `kv_cache` a row's input is kept instead, and one row at a time is computed from its beginning. `widens`:
    the process has no kernels for narrow weights. `in_blocks`: its attention goes through the cache in blocks. Bytes; formulas at the head
    of this file. BadLayerRange outside the model.
    """
    shape = model if isinstance(model, ModelShape) else ModelShape.of(model)
    first, stop = layers.start, layers.stop
    if not 0 <= first < stop <= shape.layer_count:
        raise BadLayerRange(f"layer range {layers} is not inside {shape.name}: give 0 <= start < stop <= {shape.layer_count}")
    weights = shape.layer_weights[stop] - shape.layer_weights[first]
    weights += shape.embed.weights_bytes if embed else 0
    weights += shape.head.weights_bytes if head else 0

    per_token, slots = shape.cache_per_token, context + CACHE_SLACK
    cache = (per_token[stop] - per_token[first]) * rows * slots
    largest = max(per_token[i + 1] - per_token[i] for i in layers)
    if not kv_cache:
        kept = rows * context * (_TOKEN_BYTES + (0 if embed else shape.hidden_size * shape.compute_itemsize))
        cache = (per_token[stop] - per_token[first]) * slots + kept
        rows = prefill_rows = 1

    states = shape.states_of_a_row
    cache += (states[stop] - states[first]) * (rows * STATE_PLACES + SPARE_STATES)

    width = max(shape.widths[first:stop])
    activations = (4 * shape.hidden_size + 3 * width) * _FLOAT32
    scores = 0 if in_blocks else 2 * max(shape.query_heads[first:stop]) * context * _FLOAT32
    reads = 0 if in_blocks else largest // CACHE_DTYPES[shape.cache_dtype].itemsize * context * _FLOAT32
    prefill_tokens = prefill_rows * max(CACHE_SLACK, min(chunk, context))
    steps = ((rows, rows), (prefill_tokens, prefill_rows))  # (tokens, rows)
    step = max(tokens * (activations + scores) + step_rows * reads for tokens, step_rows in steps)
    sampling = rows * (_LOGITS * shape.vocab_size + slots) * _FLOAT32 if head else 0
    widening = 0
    if widens and shape.bits < 8 * shape.compute_itemsize:
        columns = max(width, shape.vocab_size) if head else width
        widening = shape.hidden_size * columns * shape.compute_itemsize
    return MemoryNeed(weights, cache, step + sampling + widening, _process_bytes(rows, head=head))


def _process_bytes(rows: int, *, head: bool) -> int:
    """The process around the arrays; see the head of this file."""
    shapes = _PREFILL_SHAPES + math.ceil(math.log2(rows)) + 1
    return _PROCESS_BYTES + round(shapes * (_PROGRAM_BYTES + (_HEAD_PROGRAM_BYTES if head else 0)))
