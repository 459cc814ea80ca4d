"""A command that wants a model directory takes a source too, and imports it once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import EXPORTS

from mesh import cli
from mesh.commands.sources import model_directory
from mesh.errors import ConfigError, ModelNotFound
from mesh.importer.run import import_model
from mesh.model.manifest import Manifest

TOKENS = ["--tokens", "5,17,33", "--max-tokens", "4", "--json"]


def test_run_imports_a_source_once_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "tiny.onnx"
    shutil.copy(EXPORTS / "llama-dynamo.onnx", source)
    assert cli.main(["run", str(source), *TOKENS]) == 0
    first = capsys.readouterr()
    assert f"importing {source} into {tmp_path / 'tiny.mesh'}" in first.err
    assert cli.main(["run", str(source), *TOKENS]) == 0
    again = capsys.readouterr()
    assert "importing" not in again.err
    assert json.loads(again.out)["tokens"] == json.loads(first.out)["tokens"]
    os.utime(source, (2e9, 2e9))
    assert model_directory(source) == tmp_path / "tiny.mesh"
    assert "is newer than" in capsys.readouterr().err


def test_what_is_no_model_is_refused_with_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"give an \.onnx or \.gguf file, or a Hugging Face directory"):
        model_directory(tmp_path / "nothing")
    with pytest.raises(ModelNotFound, match=r"has no \.onnx, no \.gguf and no config\.json"):
        model_directory(tmp_path)


def test_an_import_makes_the_folders_above_its_model_directory(tmp_path: Path) -> None:
    import_model(EXPORTS / "llama-dynamo.onnx", tmp_path / "a" / "b" / "tiny")
    assert Manifest.load(tmp_path / "a" / "b" / "tiny").layers == 3
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        import_model(EXPORTS / "llama-dynamo.onnx", tmp_path / "file" / "tiny")


def hub(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the library reads its environment when it is imported."""
    command = [sys.executable, "-m", "mesh.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_model_of_the_hub_is_imported_from_its_cache(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("transformers")
    from tiny_models import LLAMA, make_model

    repository = tmp_path / "hub" / "models--acme--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    make_model("Llama", LLAMA).save_pretrained(snapshot)
    offline = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "MESH_CACHE_DIR": str(tmp_path / "cache")}
    done = hub("import", "hf:acme/tiny", tmp_path / "models" / "tiny", "--quiet", **offline)
    assert done.returncode == 0, done.stderr
    assert Manifest.load(tmp_path / "models" / "tiny").layers == LLAMA["num_hidden_layers"]
    missing = hub("import", "hf:acme/other", tmp_path / "other", **offline)
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1
    assert "is not in the cache, and the hub does not answer" in missing.stderr and "give their directory" in missing.stderr
    wrong = hub("run", "hf:acme", "hello", **offline)
    assert wrong.returncode == 2 and "write hf:ORG/NAME" in wrong.stderr


def test_a_hub_that_cannot_be_reached_is_one_clear_line(tmp_path: Path) -> None:
    pytest.importorskip("huggingface_hub")
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "0", "HF_HUB_ETAG_TIMEOUT": "1"}
    done = hub("import", "hf:acme/tiny", tmp_path / "out", **closed)
    assert done.returncode == 2 and "the hub does not answer" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()
