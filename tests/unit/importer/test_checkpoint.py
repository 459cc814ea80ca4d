"""Safetensors files by tensor: types, damage, and what is in memory. Made with the library itself, so that torch is not needed."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel
from mesh.importer.sources import safetensors_file
from mesh.importer.sources.safetensors_file import INDEX, SINGLE, SafetensorsCheckpoint


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_tensor_is_read_as_it_was_written(dtype: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", 2 * 5 * 4)  # two of three rows
    tensors: dict[str, np.ndarray] = {
        "matrix": np.random.default_rng(0).standard_normal((3, 5)).astype(dtype),
        "scalar": np.array(2.5, dtype),
        "empty": np.empty((0, 4), dtype),
    }
    save_file(tensors, tmp_path / SINGLE)
    checkpoint = SafetensorsCheckpoint.open(tmp_path)
    assert sorted(checkpoint) == sorted(tensors)
    for name, tensor in tensors.items():
        got = checkpoint.read(name)
        assert checkpoint.shape(name) == tensor.shape
        assert got.dtype == tensor.dtype and np.array_equal(got, tensor)
        wide = checkpoint.read_wide(name)
        assert wide.dtype == np.float32 and wide.flags.writeable and np.array_equal(wide, tensor.astype(np.float32))


def test_a_tensor_of_a_type_that_is_no_weight_is_refused_when_it_is_read(tmp_path: Path) -> None:
    save_file({"ids": np.arange(3), "weight": np.ones(2, np.float32)}, tmp_path / SINGLE)
    checkpoint = SafetensorsCheckpoint.open(tmp_path)
    assert checkpoint.read("weight").sum() == 2
    with pytest.raises(UnsupportedModel, match="tensor ids has type I64: only F64, F32, F16, BF16 are supported"):
        checkpoint.read("ids")
    with pytest.raises(CorruptModel, match="no tensor other"):
        checkpoint.read("other")


def test_a_number_that_is_none_is_found_in_a_later_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", 16)
    weight = np.ones((5, 2), ml_dtypes.bfloat16)
    weight[4, 1] = np.nan
    save_file({"weight": weight}, tmp_path / SINGLE)
    with pytest.raises(CorruptModel, match="tensor weight holds NaN"):
        SafetensorsCheckpoint.open(tmp_path).read_wide("weight")


def damaged(whole: bytes) -> dict[str, bytes]:
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["weight"]["shape"] = [3, 5]
    text = json.dumps(header).encode()
    return {
        "nothing": b"",
        "half a header": whole[:20],
        "no header": b"{" * 5000,
        "short data": whole[:-4],
        "a shape that does not fit": len(text).to_bytes(8, "little") + text + whole[8 + length :],
    }


@pytest.mark.parametrize("how", ["nothing", "half a header", "no header", "short data", "a shape that does not fit"])
def test_a_damaged_file_is_named_with_its_size(how: str, tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file({"weight": np.ones((4, 4), np.float32)}, path)
    path.write_bytes(damaged(path.read_bytes())[how])
    with pytest.raises(CorruptModel, match=rf"{SINGLE} is not a whole safetensors file: it has {path.stat().st_size:,} bytes"):
        SafetensorsCheckpoint.open(tmp_path)


def test_several_files_are_found_by_their_index(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({f"w{number}": np.full(2, number, np.float32)}, tmp_path / f"part{number}.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"w{n}": f"part{n}.safetensors" for n in (1, 2)}}))
    checkpoint = SafetensorsCheckpoint.open(tmp_path)
    assert [checkpoint.read(name)[0] for name in ("w1", "w2")] == [1, 2]
    (tmp_path / "part2.safetensors").unlink()
    with pytest.raises(CorruptModel, match=r"part2.safetensors is missing"):
        SafetensorsCheckpoint.open(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ModelNotFound, match=r"neither model.safetensors nor"):
        SafetensorsCheckpoint.open(tmp_path)
