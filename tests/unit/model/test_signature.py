"""Signatures of models: what a signature covers, whose it must be, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest

from mesh.cli import main
from mesh.errors import ConfigError, CorruptModel, UntrustedModel
from mesh.model.manifest import Manifest
from mesh.model.signature import Signers, load_trusted, make_key, sign, signing_key


@pytest.fixture
def signed(model: Path, tmp_path: Path) -> tuple[Path, Signers]:
    """A copy of the tiny model, signed, and its signers."""
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    public = make_key(tmp_path / "key.pem")
    sign(copy, signing_key(tmp_path / "key.pem"))
    return copy, Signers.load(public)


def test_a_signed_model_is_trusted_and_keeps_its_hash(signed: tuple[Path, Signers], model: Path) -> None:
    directory, signers = signed
    manifest = load_trusted(directory, signers)
    assert manifest.model_hash == Manifest.load(model).model_hash and manifest.digest == Manifest.load(model).digest
    signers.check(Manifest.parse(manifest.model_dump_json().encode(), "as it is pushed"), "the model")
    assert load_trusted(model, None).signature is None
    with pytest.raises(UntrustedModel, match="not signed"):
        load_trusted(model, signers)


@pytest.mark.parametrize(
    "path",
    [("name",), ("blocks", 1, "files", 0, "sha256"), ("extra_files", 0, "sha256"), ("extra_files", 1, "bytes"), ("tokenizer", "bos_id"),
     ("context_length",), ("blocks", 0, "weight_bytes"), ("report", "anything")],
)  # fmt: skip
def test_every_change_of_the_manifest_is_seen(signed: tuple[Path, Signers], path: tuple[Any, ...]) -> None:
    directory, signers = signed
    document = orjson.loads((directory / "manifest.json").read_bytes())
    place = document
    for key in path[:-1]:
        place = place[key]
    old = place.get(path[-1]) if isinstance(place, dict) else place[path[-1]]
    place[path[-1]] = "0" * 64 if path[-1] == "sha256" else f"{old}x" if isinstance(old, str) else (old or 0) + 1
    (directory / "manifest.json").write_bytes(orjson.dumps(document))
    with pytest.raises(UntrustedModel, match="changed after it was signed"):
        load_trusted(directory, signers)


def test_another_key_and_a_forged_signature_are_refused(signed: tuple[Path, Signers], tmp_path: Path) -> None:
    directory, _ = signed
    other = make_key(tmp_path / "other.pem")
    with pytest.raises(UntrustedModel, match="is not in"):
        load_trusted(directory, Signers.load(other))
    both = tmp_path / "both.pub"
    both.write_bytes(other.read_bytes() + (tmp_path / "key.pem.pub").read_bytes())
    load_trusted(directory, Signers.load(both))
    document = orjson.loads((directory / "manifest.json").read_bytes())
    document["signature"]["key"] = next(iter(Signers.load(other).keys))
    (directory / "manifest.json").write_bytes(orjson.dumps(document))
    with pytest.raises(UntrustedModel, match="changed"):
        load_trusted(directory, Signers.load(both))


def test_a_model_with_a_wrong_file_is_not_signed(signed: tuple[Path, Signers], tmp_path: Path) -> None:
    directory, _ = signed
    path = directory / "chat_template.jinja"
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(CorruptModel, match="chat_template"):
        sign(directory, signing_key(tmp_path / "key.pem"))


def test_a_key_that_is_none_or_not_private_is_an_error(tmp_path: Path) -> None:
    public = make_key(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="there already"):
        make_key(tmp_path / "key.pem")
    (tmp_path / "rubbish").write_bytes(b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    for path in (tmp_path / "key.pem", tmp_path / "rubbish", tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError):
            Signers.load(path)
    public.chmod(0o600)
    with pytest.raises(ConfigError, match="no private"):
        signing_key(public)
    (tmp_path / "key.pem").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        signing_key(tmp_path / "key.pem")


def test_the_command_makes_a_key_and_signs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy, key = tmp_path / "model", tmp_path / "key.pem"
    shutil.copytree(model, copy)
    assert main(["sign", "--make-key", str(key)]) == 0
    assert main(["sign", str(copy), "--key", str(key)]) == 0
    load_trusted(copy, Signers.load(tmp_path / "key.pem.pub"))
    assert "is signed by" in capsys.readouterr().out
    assert main(["sign", str(copy)]) == 2
    assert main(["sign", "--key", str(key)]) == 2
