"""Signatures of models: ed25519 over a manifest, which holds the SHA-256 of every file of its model.

A signature says who made the model. Without it the checksums say only that the files are those of the manifest beside them, and
whoever can change a file can change the manifest as well.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from mesh.errors import ConfigError, UntrustedModel
from mesh.model.manifest import Manifest, SignatureInfo

__all__ = ["Signers", "load_trusted", "make_key", "sign", "signing_key"]

_MOST_KEY_BYTES: Final = 64 * 1024
_END: Final = b"-----END PUBLIC KEY-----"


@dataclass(frozen=True, slots=True)
class Signers:
    """Public keys of which one must have signed a model. `where`: the file they came from, for errors."""

    keys: frozenset[str]  # raw public keys, in hex
    where: str

    @classmethod
    def load(cls, path: Path) -> Signers:
        """The keys of a PEM file; several may stand one after another. ConfigError: it has none, or one that is not ed25519."""
        blocks = [block + _END for block in _read(path).split(_END)[:-1]]
        keys = set()
        for block in blocks:
            try:
                key = serialization.load_pem_public_key(block)
            except ValueError:
                raise _no_key(path, "public") from None
            if not isinstance(key, Ed25519PublicKey):
                raise _no_key(path, "public")
            keys.add(key.public_bytes_raw().hex())
        if not keys:
            raise _no_key(path, "public")
        return cls(frozenset(keys), str(path))

    def check(self, manifest: Manifest, what: str) -> None:
        """UntrustedModel unless one of the keys has signed `manifest`, which came from `what`."""
        signature = manifest.signature
        if signature is None:
            raise UntrustedModel(f"{what} is not signed, and a signature by a key of {self.where} is required: sign it with `mesh sign`")
        if signature.key not in self.keys:
            raise UntrustedModel(f"{what} is signed by the key {signature.key[:16]}..., which is not in {self.where}")
        try:
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.key))
            key.verify(bytes.fromhex(signature.value), manifest.signed_bytes())
        except (InvalidSignature, ValueError):
            raise UntrustedModel(f"{what} was changed after it was signed: fetch it again from where it was signed") from None


def load_trusted(directory: Path, signers: Signers | None) -> Manifest:
    """The manifest of a model directory. UntrustedModel: none of `signers` has signed it (None: no signature is asked for)."""
    manifest = Manifest.load(directory)
    if signers is not None:
        signers.check(manifest, str(directory))
    return manifest


def sign(directory: Path, key: Ed25519PrivateKey) -> Manifest:
    """Sign the model in `directory`, after every file of it was compared with its manifest. CorruptModel: one differs."""
    manifest = Manifest.load(directory)
    manifest.verify_all(directory)
    value = key.sign(manifest.signed_bytes()).hex()
    signed = manifest.model_copy(update={"signature": SignatureInfo(key=key.public_key().public_bytes_raw().hex(), value=value)})
    signed.save(directory)
    return signed


def signing_key(path: Path) -> Ed25519PrivateKey:
    """The private key in a PEM file. ConfigError: there is none, it is not ed25519, or other users can read it."""
    data = _read(path)
    if os.name == "posix" and path.stat().st_mode & 0o077:
        raise ConfigError(f"{path} can be read by other users: make it private with `chmod 600 {path}`")
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise _no_key(path, "private") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise _no_key(path, "private")
    return key


def make_key(path: Path) -> Path:
    """Make a private key at `path`, which only its owner can read, and the public key at `path`.pub, whose path is returned.
    ConfigError: one of the files is there already."""
    public = path.with_name(f"{path.name}.pub")
    key = Ed25519PrivateKey.generate()
    encoding = serialization.Encoding.PEM
    private = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write(path, private, 0o600)
    _write(public, key.public_key().public_bytes(encoding, serialization.PublicFormat.SubjectPublicKeyInfo), 0o644)
    return public


def _write(path: Path, data: bytes, mode: int) -> None:
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    except FileExistsError:
        raise ConfigError(f"{path} is there already: give another name, or remove it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror})") from None
    with os.fdopen(handle, "wb") as file:
        file.write(data)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MOST_KEY_BYTES)
    except OSError as error:
        raise ConfigError(f"the key {path} cannot be read ({error.strerror}): make one with `mesh sign --make-key FILE`") from None


def _no_key(path: Path, kind: str) -> ConfigError:
    return ConfigError(f"{path} holds no {kind} ed25519 key in PEM: make a pair with `mesh sign --make-key FILE`")
