"""What a manifest from elsewhere may say, and what the files of a model directory may be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import CorruptModel
from mesh.host.paths import inside
from mesh.model.manifest import MAX_MANIFEST_BYTES, Manifest, file_info
from mesh.types import LayerRange


def document() -> dict[str, Any]:
    """A manifest of one layer, as it is written."""

    def block(name: str) -> dict[str, Any]:
        files = [{"name": f"{name}.onnx", "bytes": 10, "sha256": "0" * 64}]
        return {"name": name, "files": files, "weight_bytes": 0, "parameters": 0}

    return {
        "name": "tiny",
        "architecture": "llama",
        "source": "onnx",
        "layers": 1,
        "vocab_size": 8,
        "context_length": 16,
        "hidden": {"size": 4, "dtype": "float32"},
        "cache": [{"kv_heads": 1, "key_dim": 2, "value_dim": 2}],
        "cache_dtype": "float32",
        "weights": {"bits": 32},
        "blocks": [block("embed"), block("layer_000"), block("head")],
        "extra_files": [{"name": "tokenizer.json", "bytes": 3, "sha256": "1" * 64}],
    }


def parse(value: dict[str, Any]) -> Manifest:
    return Manifest.parse(json.dumps(value).encode(), "manifest.json")


def test_a_manifest_reads() -> None:
    assert parse(document()).layers == 1


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", ".hidden", "", "a\\b", "x\n", "\0", "evil.py", "manifest.json", "a" * 200, "C:x"],
)
def test_no_file_of_a_manifest_is_named_otherwise_than_its_place(name: str) -> None:
    for where in ("blocks", "extra_files"):
        value = document()
        file = value["blocks"][1]["files"][0] if where == "blocks" else value["extra_files"][0]
        file["name"] = name
        with pytest.raises(CorruptModel):
            parse(value)


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("layers", 10**30),
        ("layers", 10**9),
        ("layers", -1),
        ("vocab_size", 2**63),
        ("context_length", 10**20),
        ("name", "x" * 10_000),
        ("blocks", []),
        ("cache", [{"kv_heads": 10**30, "key_dim": 1, "value_dim": 1}]),
        ("cache", [{"kv_heads": 0, "key_dim": 1, "value_dim": 1}]),
        ("extra_files", [{"name": "tokenizer.json", "bytes": -1, "sha256": "1" * 64}]),
        ("extra_files", [{"name": "tokenizer.json", "bytes": 1, "sha256": "../../x"}]),
        ("extra_files", [{"name": "tokenizer.json", "bytes": 1, "sha256": "1" * 64}] * 2),
        ("tokenizer", {"eos_ids": list(range(100_000))}),
    ],
)
def test_a_number_or_list_without_measure_is_refused_by_its_key(key: str, wrong: Any) -> None:
    with pytest.raises(CorruptModel):
        parse(document() | {key: wrong})


def test_what_is_no_manifest_is_refused() -> None:
    for data in (b"", b"[]", b"\xff", b"{" * 5000, b" " * (MAX_MANIFEST_BYTES + 1)):
        with pytest.raises(CorruptModel):
            Manifest.parse(data, "manifest.json")


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    directory, secret = tmp_path / "model", tmp_path / "secret"
    directory.mkdir()
    secret.write_bytes(b"s")
    (directory / "out").symlink_to(secret)
    (directory / "real").write_bytes(b"r")
    (directory / "in").symlink_to(directory / "real")
    (tmp_path / "alias").symlink_to(directory)
    assert inside(directory, "in").read_bytes() == b"r"
    assert inside(tmp_path / "alias", "real").read_bytes() == b"r"
    for name in ("out", "../secret", str(secret), ".", "..", ""):
        with pytest.raises(CorruptModel):
            inside(directory, name)


def test_a_block_behind_a_link_is_refused(tmp_path: Path) -> None:
    directory, secret = tmp_path / "model", tmp_path / "secret"
    directory.mkdir()
    secret.write_bytes(b"0123456789")
    (directory / "embed.onnx").symlink_to(secret)
    value = document()
    value["blocks"][0]["files"][0] = file_info(secret).model_dump() | {"name": "embed.onnx"}
    manifest = parse(value)
    with pytest.raises(CorruptModel, match="own directory"):
        manifest.verify_files(directory, LayerRange(0, 0), checksums=True, embed=True)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_regular_files_of_the_directory_are_read(kind: str, tmp_path: Path) -> None:
    """A pipe in a block's place would make its reader wait for ever."""
    directory, secret = tmp_path / "model", tmp_path / "secret"
    directory.mkdir()
    secret.write_text(json.dumps(document()))
    for name in ("manifest.json", "embed.onnx", "tokenizer.json"):
        path = directory / name
        if kind == "link":
            path.symlink_to(secret)
        elif kind == "pipe":
            os.mkfifo(path)
        else:
            path.mkdir()
    manifest = parse(document())
    for read in (
        lambda: Manifest.load(directory),
        lambda: manifest.verify_files(directory, LayerRange(0, 0), checksums=True, embed=True),
        lambda: manifest.read_extra(directory, "tokenizer.json"),
    ):
        with pytest.raises(CorruptModel, match=r"own directory|no regular file|cannot be"):
            read()


def test_a_tokenizer_of_any_size_or_content_but_the_listed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"abc")
    value = document()
    value["extra_files"] = [file_info(path).model_dump()]
    assert parse(value).read_extra(tmp_path, "tokenizer.json") == b"abc"
    path.write_bytes(b"abd")
    with pytest.raises(CorruptModel, match="checksum"):
        parse(value).read_extra(tmp_path, "tokenizer.json")
    value["extra_files"][0]["bytes"] = 2**40
    with pytest.raises(CorruptModel, match="the most"):
        parse(value).read_extra(tmp_path, "tokenizer.json")
    with pytest.raises(CorruptModel, match="does not list"):
        parse(value).read_extra(tmp_path, "chat_template.jinja")


@pytest.mark.parametrize("report", ['{"a": 1' + "0" * 30 + "}", '{"a": ' + "[" * 240 + "]" * 240 + "}"], ids=["a long number", "deep"])
def test_a_report_that_cannot_be_written_again_is_refused(report: str) -> None:
    data = json.dumps(document())[:-1] + f', "report": {report}}}'
    with pytest.raises(CorruptModel):
        Manifest.parse(data.encode(), "manifest.json")
