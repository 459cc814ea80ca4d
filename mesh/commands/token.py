"""`mesh token`: issue and inspect bearer tokens for HTTP, and make API keys."""

from __future__ import annotations

import argparse
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import ConfigError

if TYPE_CHECKING:
    from mesh.http.tokens import Quota
    from mesh.settings.schema import AuthenticationSection

__all__ = ["add_parser"]

_DESCRIPTION = """\
Issue a token, or inspect one. The key comes from a configuration file's authentication section (--config), from a file, or from
MESH_AUTHENTICATION_SECRET_KEY. It is never given on the command line, where other users of the machine could read it."""


_KEY_DESCRIPTION = """\
Make an API key: a bearer token that lasts until its entry is removed from the file. The key is printed once and kept nowhere; the file
gets its hash. Gateways read a changed file again within a second."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("token", help="issue and inspect tokens for HTTP", description=_DESCRIPTION)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    issue = actions.add_parser("issue", help="print a new token", description=_DESCRIPTION)
    issue.add_argument("--subject", required=True, metavar="NAME", help="name of the token's holder")
    issue.add_argument("--scope", default="generate", metavar="SCOPE,...", help="generate, batch, admin (default generate)")
    issue.add_argument("--expiry", metavar="TIME", help="how long it lasts, such as 24h (default: authentication.token_expiry, 24h)")
    _add_quota(issue)
    issue.add_argument("--private-key-file", metavar="FILE", help="PEM, for RS256 and EdDSA")
    issue.set_defaults(run=issue_command)
    key = actions.add_parser("key", help="make an API key, and print it", description=_KEY_DESCRIPTION)
    key.add_argument("--subject", required=True, metavar="NAME", help="name of the key's holder")
    key.add_argument("--scope", default="generate", metavar="SCOPE,...", help="generate, batch, admin (default generate)")
    key.add_argument("--keys-file", metavar="FILE", help="the file that gets its hash (default: authentication.api_keys_file)")
    key.add_argument("--config", type=Path, metavar="FILE", help="config.yaml of a coordinator or gateway")
    _add_quota(key)
    key.set_defaults(run=key_command)
    inspect = actions.add_parser("inspect", help="show a token's claims, and whether it is valid", description=_DESCRIPTION)
    inspect.add_argument("token", nargs="?", default="-", metavar="-", help="nothing, or -: the token is read from standard input")
    inspect.add_argument("--public-key-file", metavar="FILE", help="PEM, for RS256 and EdDSA")
    inspect.set_defaults(run=inspect_command)
    for action in (issue, inspect):
        action.add_argument("--config", type=Path, metavar="FILE", help="config.yaml of a coordinator or gateway")
        action.add_argument("--algorithm", choices=("HS256", "RS256", "EdDSA"), help="default: authentication.algorithm, or HS256")
        action.add_argument("--secret-key-file", metavar="FILE", help="the secret of HS256")


def issue_command(args: argparse.Namespace) -> int:
    from mesh.http.tokens import Issuer
    from mesh.settings.units import parse_seconds

    section = _section(args)
    key = _key(section, section.private_key_file, "private_key")
    if key is None:
        wanted = "--secret-key-file" if section.algorithm == "HS256" else "--private-key-file"
        raise ConfigError(f"there is no key to sign with: give --config or {wanted}, or set MESH_AUTHENTICATION_SECRET_KEY")
    token = Issuer(section.algorithm, key).issue(
        args.subject,
        _scopes(args),
        now_unix_s=time.time(),
        expiry_s=section.token_expiry if args.expiry is None else parse_seconds(args.expiry),
        quota=_quota(args),
    )
    print(token)
    return 0


def key_command(args: argparse.Namespace) -> int:
    from mesh.http.keys import add_key

    path = args.keys_file or _section(args).api_keys_file
    if path is None:
        raise ConfigError("there is no file for the key's hash: give --keys-file, or --config with authentication.api_keys_file")
    print(add_key(path, args.subject, _scopes(args), _quota(args)))
    return 0


def inspect_command(args: argparse.Namespace) -> int:
    """Exit code 0 for a valid token, 1 if it is not valid or its key is not here."""
    import orjson

    from mesh.errors import Denied
    from mesh.http.tokens import Verifier, peek

    if args.token != "-":
        raise ConfigError("other users of this machine see what is on a command line: give the token on standard input, `inspect < FILE`")
    token = sys.stdin.read().strip()
    header, claims = peek(token)
    section = _section(args)
    key = _key(section, section.public_key_file, "public_key")
    if key is None:
        verdict, genuine = "not checked: give --config, or the key's file", False
    else:
        try:
            Verifier(section.algorithm, key).verify(token)
            verdict, genuine = "genuine", True
        except Denied as error:
            verdict, genuine = f"refused: {error}", False
    expiry = claims.get("exp")
    shown: dict[str, Any] = {"algorithm": header.get("alg"), "claims": claims, "verdict": verdict}
    if isinstance(expiry, (int, float)):
        shown["expires"] = datetime.fromtimestamp(expiry).astimezone().isoformat()
    sys.stdout.buffer.write(orjson.dumps(shown, option=orjson.OPT_INDENT_2) + b"\n")
    return 0 if genuine else 1


def _add_quota(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quota", "limits of the holder; the default is the configuration's")
    group.add_argument("--requests-per-minute", type=int, metavar="N", help="generations that begin within a minute")
    group.add_argument("--tokens-per-minute", type=int, metavar="N", help="tokens of prompts and answers together")
    group.add_argument("--concurrent-sessions", type=int, metavar="N", help="generations at the same time")
    group.add_argument("--requests-per-batch", type=int, metavar="N", help="requests in one batch")


def _quota(args: argparse.Namespace) -> Quota:
    from mesh.http.tokens import Quota

    return Quota(args.requests_per_minute, args.tokens_per_minute, args.concurrent_sessions, args.requests_per_batch)


def _scopes(args: argparse.Namespace) -> list[str]:
    return [scope.strip() for scope in args.scope.split(",") if scope.strip()]


def _section(args: argparse.Namespace) -> AuthenticationSection:
    """The authentication section: what the file or the environment says, with the flags over it."""
    from pydantic import ValidationError

    from mesh.settings.files import load_environment, read_mapping
    from mesh.settings.schema import AuthenticationConfig, AuthenticationSection, CoordinatorConfig, GatewayConfig, load_config

    if args.config is None:
        base = load_environment(AuthenticationConfig).authentication
    elif "gateway" in read_mapping(args.config):
        base = load_config(args.config, GatewayConfig).authentication
    else:
        base = load_config(args.config, CoordinatorConfig).authentication
    names = ("algorithm", "secret_key_file", "public_key_file", "private_key_file")
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    values: dict[str, Any] = {name: getattr(base, name) for name in base.model_fields_set}
    if given.keys() & {"secret_key_file"}:
        values.pop("secret_key", None)
    try:
        return AuthenticationSection(**{**values, **given})
    except ValidationError as error:
        message = error.errors(include_url=False, include_input=False)[0]["msg"]
        raise ConfigError(f"authentication: {message.removeprefix('Value error, ')}") from None


def _key(section: AuthenticationSection, key_file: str | None, name: str) -> bytes | None:
    from mesh.http.tokens import read_secret

    if section.algorithm != "HS256":
        return read_secret(None, key_file, f"authentication.{name}")
    secret = None if section.secret_key is None else section.secret_key.get_secret_value()
    return read_secret(secret, section.secret_key_file, "authentication.secret_key")
