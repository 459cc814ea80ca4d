"""Decoders whose layers share more than the hidden state."""

from __future__ import annotations

from pathlib import Path

import handmade_graph
import numpy as np
import onnxruntime
import pytest
from handmade_graph import HEADS, HIDDEN, VOCAB
from ort_chain import Chain, relative_error

from mesh.errors import UnsupportedModel
from mesh.importer.options import ImportOptions
from mesh.importer.sources.onnx import OnnxSource
from mesh.importer.write.blocks import BlockWriter
from mesh.types import no_progress


class WideSource(OnnxSource):
    """As what is traced is cut."""

    wide = True


def write_decoder(path: Path) -> Path:
    """Three layers: the last reads the keys and values of the first, and each takes its own part of a second embedding."""
    g = handmade_graph.Graph()
    x = g.embedding()
    parts = g.op("Reshape", g.op("Gather", g.normal(VOCAB, 3 * HIDDEN), "input_ids"), g.const([0, 0, 3, HIDDEN]))
    first: tuple[str, str] | None = None
    for layer in range(3):
        x = g.op("Add", x, g.op("Gather", parts, g.const(layer), axis=2))
        k, v = first if layer == 2 and first else tuple(g.op("Transpose", g.heads(x), perm=[0, 2, 1, 3]) for _ in range(2))
        first = first or (k, v)
        q = g.op("Transpose", g.heads(x), perm=[0, 2, 1, 3])
        scores = g.op("Add", g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])), g.mask())
        context = g.op("Transpose", g.op("MatMul", g.op("Softmax", scores, axis=3), v), perm=[0, 2, 1, 3])
        x = g.op("Add", x, g.op("MatMul", g.op("Reshape", context, g.const([0, 0, HIDDEN])), g.normal(HIDDEN, HIDDEN)))
    return g.save(path, x)


def test_everything_that_crosses_goes_along_side_by_side(tmp_path: Path) -> None:
    path = write_decoder(tmp_path / "m.onnx")
    source = WideSource(path)
    assert source.layers == 3 and source.owners == (0, 1, 0)
    assert [sum(each.width for each in cut) for cut in source._cut.crossings] == [each * HIDDEN for each in (4, 6, 3, 1)]
    assert source.hidden_size == 6 * HIDDEN  # the state, three parts of the embedding, keys and values
    source.write_blocks(BlockWriter(tmp_path), ImportOptions(), no_progress)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 11)
    chain = Chain(tmp_path, source.cache)
    got = np.concatenate([chain(tokens[:4].tolist()), chain(tokens[4:].tolist())])
    (want,) = onnxruntime.InferenceSession(str(path)).run(["logits"], {"input_ids": tokens[None]})
    assert relative_error(got, want[0]) < 1e-5
    assert [(each.kv_heads, each.key_dim) for each in source.cache] == [(HEADS, HIDDEN // HEADS)] * 3


def test_an_export_is_cut_at_single_values_alone(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="the first layer takes more than the embedded tokens"):
        OnnxSource(write_decoder(tmp_path / "m.onnx"))
