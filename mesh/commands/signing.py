"""`mesh sign`, and the flag of the commands that ask for a signature."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import ConfigError

if TYPE_CHECKING:
    from mesh.model.signature import Signers

__all__ = ["add_parser", "add_signature_argument", "sign_command", "signers_of"]

_DESCRIPTION = """\
Sign a model: its manifest, and so the SHA-256 of every file of it, with an ed25519 key. Every file is compared with the manifest first.
Commands that read a model take the public key with --require-signature and refuse a model that is not signed by it.
--make-key makes such a key in FILE, and the public key in FILE.pub."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("sign", help="sign a model", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, nargs="?", help="the model directory to sign")
    parser.add_argument("--key", metavar="FILE", type=Path, help="private ed25519 key (PEM)")
    parser.add_argument("--make-key", metavar="FILE", type=Path, help="make a key pair first, and sign with it if a model is given")
    parser.set_defaults(run=sign_command)


def add_signature_argument(parser: argparse.ArgumentParser) -> None:
    """Add --require-signature."""
    text = "refuse a model that none of the public ed25519 keys in FILE (PEM) has signed"
    parser.add_argument("--require-signature", metavar="FILE", type=Path, help=text)


def signers_of(args: argparse.Namespace, configured: str | None = None) -> Signers | None:
    """The keys of --require-signature, else those of the file's model.require_signature, else None."""
    path = args.require_signature or (Path(configured).expanduser() if configured else None)
    if path is None:
        return None
    from mesh.model.signature import Signers

    return Signers.load(path)


def sign_command(args: argparse.Namespace) -> int:
    from mesh.model.signature import make_key, sign, signing_key

    if (args.key is None) == (args.make_key is None):
        raise ConfigError("give --key FILE to sign with a key, or --make-key FILE to make one")
    if args.make_key is not None:
        public = make_key(args.make_key)
        print(f"{args.make_key} is the private key: keep it secret. {public} is the public key, for --require-signature")
    elif args.model is None:
        raise ConfigError("MODEL_DIR is missing: give the model directory to sign")
    if args.model is not None:
        manifest = sign(args.model, signing_key(args.key or args.make_key))
        assert manifest.signature is not None
        print(f"{manifest.name} in {args.model} is signed by the key {manifest.signature.key[:16]}")
    return 0
