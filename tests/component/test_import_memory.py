"""How much memory an import takes, measured in a process of its own. The models are larger than the memory that is allowed."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import handmade_graph
import numpy as np
import onnx
import pytest
import random_llama
from onnx import TensorProto, helper, numpy_helper

HIDDEN, HEADS, INNER, VOCAB, LAYERS = 512, 8, 10240, 64, 10
BLOCK_BYTES = 4 * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * INNER)
LIBRARIES_BYTES = 64 << 20
"""What the compiler and onnxruntime may need beyond what a tiny model makes them need."""

PEAK = """
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
"""
"""Bytes. Not ru_maxrss, which begins with that of the process that has started this one."""

IMPORT = """
import resource, sys
from pathlib import Path
from mesh.importer import run
from mesh.importer.verify import outside
from mesh.host.process import give_memory_back
give_memory_back()
outside.WHOLE_SOURCE_BYTES = 0
report = run.import_model(Path(sys.argv[1]), Path(sys.argv[2])).report
assert report["oracle_error"] < 1e-4 and report["source_error"] < 1e-4, report
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""

IMPORT_CHECKPOINT = """
import sys
from pathlib import Path
from mesh.importer import run
from mesh.importer.verify import outside
from mesh.host.process import give_memory_back
give_memory_back()
outside.WHOLE_CHECKPOINT_BYTES = 0
report = run.import_model(Path(sys.argv[1]), Path(sys.argv[2])).report
assert report["source_error"] < 1e-4 and report["source_engine"].startswith("transformers"), report
print(peak())
"""

WRITE_BLOCKS = """
import sys
from pathlib import Path
from mesh.importer.write.blocks import BlockWriter
from mesh.importer.sources.onnx import open_source
from mesh.importer.options import ImportOptions
source = open_source(Path(sys.argv[1]))
before = peak()
source.write_blocks(BlockWriter(Path(sys.argv[2])), ImportOptions(), lambda *_: None)
print(before, peak())
"""


def write_decoder(path: Path, layers: int, inner: int) -> int:
    """A decoder without a cache, weights as external data, each layer's the same; bytes of its graph."""
    rng = np.random.default_rng(0)
    nodes: list[onnx.NodeProto] = []
    small: dict[str, np.ndarray] = {}
    large: list[TensorProto] = []

    def op(op_type: str, *inputs: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op_type, inputs, [f"v{len(nodes)}"], f"n{len(nodes)}", **attributes))
        return f"v{len(nodes) - 1}"

    def const(value: object) -> str:
        small[f"c{len(small)}"] = np.array(value)
        return f"c{len(small) - 1}"

    def weight(*dims: int) -> str:
        tensor = TensorProto(name=f"w{len(large)}", data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
        values = rng.standard_normal(dims, np.float32) * np.float32(0.7 / dims[0] ** 0.5)
        entries = {"location": data.name, "offset": str(file.tell()), "length": str(values.nbytes)}
        for key, value in entries.items():
            tensor.external_data.add(key=key, value=value)
        file.write(values.data)
        large.append(tensor)
        return str(tensor.name)

    data = path.with_suffix(".data")
    with data.open("wb") as file:
        x = op("Gather", const(rng.standard_normal((VOCAB, HIDDEN), np.float32)), "input_ids")
        length = op("Squeeze", op("Gather", op("Shape", "input_ids"), const([1])))
        positions = op("Range", const(0), length, const(1))
        later = op("Greater", op("Unsqueeze", positions, const([0])), op("Unsqueeze", positions, const([1])))
        mask = op("Where", later, const(np.float32(-1e9)), const(np.float32(0)))
        for _ in range(layers):
            split = [op("Reshape", op("MatMul", x, weight(HIDDEN, HIDDEN)), const([0, 0, HEADS, HIDDEN // HEADS])) for _ in range(3)]
            q, k, v = (op("Transpose", part, perm=[0, 2, 1, 3]) for part in split)
            scores = op("Div", op("MatMul", q, op("Transpose", k, perm=[0, 1, 3, 2])), const(np.float32(8)))
            context = op("MatMul", op("Softmax", op("Add", scores, mask), axis=3), v)
            merged = op("Reshape", op("Transpose", context, perm=[0, 2, 1, 3]), const([0, 0, HIDDEN]))
            x = op("Add", x, op("MatMul", merged, weight(HIDDEN, HIDDEN)))
            x = op("Add", x, op("MatMul", op("Tanh", op("MatMul", x, weight(HIDDEN, inner))), weight(inner, HIDDEN)))
        nodes.append(helper.make_node("MatMul", [x, const(rng.standard_normal((HIDDEN, VOCAB), np.float32) / 20)], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "decoder",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "t"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "t", VOCAB])],
        [numpy_helper.from_array(array, name) for name, array in small.items()] + large,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8), path)
    return path.stat().st_size


def said(code: str, source: Path, out: Path) -> str:
    """What a process that runs the code prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", PEAK + code, source, out], capture_output=True, text=True, env=environment, timeout=600)
    assert run.returncode == 0, run.stderr[-2000:]
    return run.stdout


def peak_bytes(source: Path, out: Path) -> int:
    return int(said(IMPORT, source, out))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
def test_an_import_takes_twice_the_largest_block_plus_the_graph(tmp_path: Path) -> None:
    tiny, whole = tmp_path / "tiny.onnx", tmp_path / "large.onnx"
    write_decoder(tiny, 2, 64)
    graph_bytes = write_decoder(whole, LAYERS, INNER)
    assert whole.with_suffix(".data").stat().st_size == LAYERS * BLOCK_BYTES
    libraries = peak_bytes(tiny, tmp_path / "a")
    peak = peak_bytes(whole, tmp_path / "b")
    print(f"libraries {libraries >> 20} MiB, peak {peak >> 20} MiB, block {BLOCK_BYTES >> 20} MiB")
    assert peak < libraries + 2 * BLOCK_BYTES + graph_bytes + LIBRARIES_BYTES
    assert LAYERS * BLOCK_BYTES > 2 * BLOCK_BYTES + LIBRARIES_BYTES  # what holding all of it would fail


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux counts it")
def test_a_checkpoint_takes_its_largest_table_once(tmp_path: Path) -> None:
    """Tables of 16 bits that are 32 bits wide in the blocks, more of them together than may be in memory: they are written, loaded by a
    stage and by transformers one at a time, and none of it in two copies."""
    pytest.importorskip("torch", reason="what it is compared with (the fixtures extra)")
    wide = random_llama.Size(layers=2, hidden=2048, inner=512, heads=8, kv_heads=8, vocabulary=40_000, dtype="bfloat16")
    rng = np.random.default_rng(0)
    random_llama.write_huggingface(tmp_path / "tiny", replace(wide, vocabulary=500), rng)
    random_llama.write_huggingface(tmp_path / "wide", wide, rng)
    table_bytes = 4 * wide.vocabulary * wide.hidden
    libraries = int(said(IMPORT_CHECKPOINT, tmp_path / "tiny", tmp_path / "a"))
    peak = int(said(IMPORT_CHECKPOINT, tmp_path / "wide", tmp_path / "b"))
    print(f"libraries {libraries >> 20} MiB, peak {peak >> 20} MiB, table {table_bytes >> 20} MiB")
    assert peak < libraries + 1.6 * table_bytes  # the rest is logits


def test_weights_are_streamed_block_by_block(tmp_path: Path) -> None:
    """A model of 16 blocks of 32 MiB: importing it takes the memory of a few, not of all. Mapped file pages count as well."""
    g = handmade_graph.Graph()
    x = g.embedding()
    size, layers = 2048, 8
    data = tmp_path / "m.data"
    external: list[onnx.TensorProto] = []
    with data.open("wb") as file:
        file.truncate(layers * 2 * handmade_graph.HIDDEN * 4 * size * 128)
    for layer in range(layers):
        x = g.attention(x)
        inner = x
        for name, dims in ((f"up{layer}", (handmade_graph.HIDDEN, size * 128)), (f"down{layer}", (size * 128, handmade_graph.HIDDEN))):
            inner = g.op("MatMul", inner, name)
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=dims, data_location=TensorProto.EXTERNAL)
            nbytes = 4 * dims[0] * dims[1]
            for key, value in (("location", "m.data"), ("offset", str(len(external) * nbytes)), ("length", str(nbytes))):
                tensor.external_data.add(key=key, value=value)
            external.append(tensor)
        x = g.op("Add", x, inner)
    path = g.save(tmp_path / "m.onnx", x)
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer.extend(external)
    onnx.save(model, path)
    out = tmp_path / "out"
    out.mkdir()
    before, after = map(int, said(WRITE_BLOCKS, path, out).split())
    block_bytes = 2 * handmade_graph.HIDDEN * 4 * size * 128
    assert data.stat().st_size == layers * block_bytes
    assert after - before < 2 * block_bytes
