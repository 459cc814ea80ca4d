"""JSON Web Tokens: issue and verify them. A token says who sends a request and what it may ask for.

The configuration chooses the algorithm, never the token: `none` and other algorithms are refused, and a key of one kind is never used as
one of another. HS256 has one secret on both sides. RS256 and EdDSA sign with a private key, and verifying needs only the public one.

Claims: `sub` the holder, `exp` valid until, `iat` issued at, `jti` the token's id, `scope` words of SCOPES, and the holder's quota, where
each part is optional: `rpm` (requests a minute), `tpm` (tokens a minute), `sessions` (generations at once), `batch` (requests in a batch).
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key

from mesh.errors import ConfigError, Denied

__all__ = [
    "ALGORITHMS",
    "MAX_SUBJECT",
    "SCOPES",
    "Algorithm",
    "Checks",
    "Claims",
    "Issuer",
    "Quota",
    "Verifier",
    "check_scopes",
    "peek",
    "read_secret",
]

Algorithm = Literal["HS256", "RS256", "EdDSA"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

SCOPES = ("generate", "batch", "admin")
"""generate: inference and the list of models. batch: batches as well. admin: everything, including figures of the mesh."""

MAX_SUBJECT = 256
"""The longest name of a holder, in characters."""

_MIN_SECRET_BYTES = 32
_MIN_RSA_BITS = 2048
_MAX_TOKEN_CHARS = 8192
_LEEWAY_S = 30  # clocks differ


@dataclass(frozen=True, slots=True)
class Quota:
    """What a subject may use. None: no limit. requests_per_batch: of one batch."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_sessions: int | None = None
    requests_per_batch: int | None = None

    def over(self, other: Quota) -> Quota:
        """This quota, with the limits of `other` where this one has none."""
        names = [field.name for field in fields(Quota)]
        return Quota(*(getattr(other, name) if getattr(self, name) is None else getattr(self, name) for name in names))


_CLAIMS = {"rpm": "requests_per_minute", "tpm": "tokens_per_minute", "sessions": "concurrent_sessions", "batch": "requests_per_batch"}
"""Claim -> the field of Quota."""


@dataclass(frozen=True, slots=True)
class Claims:
    """The claims of a token that was verified."""

    subject: str
    scopes: frozenset[str]
    quota: Quota = Quota()
    expires_unix_s: int | None = None  # None: never

    def allows(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class Checks(Protocol):
    """What checks the bearer tokens of requests."""

    def verify(self, token: str) -> Claims:
        """The claims of a token. Denied, with the reason: it is not valid."""


class Issuer:
    """Signs tokens. `key`: the secret of HS256, or the PEM text of a private key."""

    def __init__(self, algorithm: Algorithm, key: bytes) -> None:
        self._algorithm = algorithm
        self._key: Any
        if algorithm == "HS256":
            self._key = _secret(key)
        else:
            try:
                self._key = load_pem_private_key(key, password=None)
            except (ValueError, TypeError) as error:
                raise ConfigError(f"{algorithm} signs with a private key in PEM form: {_first_line(error)}") from None
            _check_kind(algorithm, self._key, RSAPrivateKey, Ed25519PrivateKey)

    def issue(
        self,
        subject: str,
        scopes: Iterable[str],
        *,
        now_unix_s: float,
        expiry_s: float,
        quota: Quota = Quota(),
    ) -> str:
        """A signed token. ConfigError: a claim makes no sense."""
        chosen = check_scopes(scopes)
        if not subject or len(subject) > MAX_SUBJECT:
            raise ConfigError(f"the subject says who the token is for: give a name of at most {MAX_SUBJECT} characters")
        if expiry_s <= 0:
            raise ConfigError(f"a token that lasts {expiry_s:g} s: give a longer time, such as 24h")
        claims: dict[str, Any] = {
            "sub": subject,
            "scope": " ".join(chosen),
            "iat": int(now_unix_s),
            "exp": int(now_unix_s + expiry_s),
            "jti": secrets.token_hex(8),
        }
        for name, field in _CLAIMS.items():
            limit = getattr(quota, field)
            if limit is not None:
                if limit < 1:
                    raise ConfigError(f"{field} {limit}: give at least 1, or leave it out for no limit")
                claims[name] = limit
        return jwt.encode(claims, self._key, algorithm=self._algorithm)


class Verifier:
    """Checks tokens. `key`: the secret of HS256, or the PEM text of a public key."""

    def __init__(self, algorithm: Algorithm, key: bytes) -> None:
        self._algorithm = algorithm
        self._key: Any
        if algorithm == "HS256":
            self._key = _secret(key)
        else:
            try:
                self._key = load_pem_public_key(key)
            except ValueError as error:
                raise ConfigError(f"{algorithm} is checked with a public key in PEM form: {_first_line(error)}") from None
            _check_kind(algorithm, self._key, RSAPublicKey, Ed25519PublicKey)

    def verify(self, token: str) -> Claims:
        """The token's claims. Denied, with the reason: it is not genuine, or not valid now. PyJWT compares signatures in constant time."""
        if len(token) > _MAX_TOKEN_CHARS:
            raise Denied(f"the token has {len(token)} characters: more than {_MAX_TOKEN_CHARS} are not read")
        try:
            claims = jwt.decode(token, self._key, algorithms=[self._algorithm], leeway=_LEEWAY_S, options={"require": ["exp", "sub"]})
        except jwt.ExpiredSignatureError:
            raise Denied("the token has expired: get a new one") from None
        except jwt.ImmatureSignatureError:
            raise Denied("the token is not valid yet: compare the clocks of this machine and the issuer's") from None
        except jwt.InvalidAlgorithmError:
            raise Denied(f"the token is not signed with {self._algorithm}") from None
        except jwt.InvalidSignatureError:
            raise Denied("the token's signature is not that of this mesh") from None
        except jwt.MissingRequiredClaimError as error:
            raise Denied(f"the token lacks the claim {error.claim}") from None
        except jwt.PyJWTError:
            raise Denied("the token is not a JSON Web Token") from None
        return _claims(claims)


def peek(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(header, claims) of a token, without verifying it; only for showing to people. Denied: it is no JSON Web Token."""
    try:
        return jwt.get_unverified_header(token), jwt.decode(token, options={"verify_signature": False})
    except jwt.PyJWTError as error:
        raise Denied(f"this is not a JSON Web Token ({_first_line(error)})") from None


def read_secret(value: str | None, file: str | None, key: str) -> bytes | None:
    """A secret from the configuration: `value` itself (from the environment), or the content of `file`. `key` names it in errors."""
    if value is not None and file is not None:
        raise ConfigError(f"{key} and {key}_file are both given: keep one")
    if value is not None:
        return value.encode()
    if file is None:
        return None
    try:
        data = Path(file).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{key}_file {file}: {error.strerror}: give a file this user may read") from None
    return data.strip()


def _claims(claims: dict[str, Any]) -> Claims:
    scope, subject = claims.get("scope", ""), claims["sub"]
    if not isinstance(scope, str) or not isinstance(subject, str):
        raise Denied("the token's sub and scope are not texts")
    if not subject or len(subject) > MAX_SUBJECT:
        raise Denied(f"the token's sub is empty, or has more than {MAX_SUBJECT} characters")
    limits: dict[str, int | None] = {}
    for name, field in _CLAIMS.items():
        limit = claims.get(name)
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
            raise Denied(f"the token's {name} is not a whole number of at least 1")
        limits[field] = limit
    return Claims(subject, frozenset(scope.split()), Quota(**limits), int(claims["exp"]))


def check_scopes(scopes: Iterable[str]) -> list[str]:
    """The scopes, sorted, each once. ConfigError: there is none, or one that does not exist."""
    chosen = sorted(set(scopes))
    unknown = [scope for scope in chosen if scope not in SCOPES]
    if unknown or not chosen:
        raise ConfigError(f"scope {', '.join(unknown) or 'is empty'}: give one or more of {', '.join(SCOPES)}")
    return chosen


def _secret(key: bytes) -> bytes:
    if b"-----BEGIN" in key:
        raise ConfigError("HS256 is signed with a secret, and this is a PEM key: set authentication.algorithm to RS256 or EdDSA")
    if len(key) < _MIN_SECRET_BYTES:
        raise ConfigError(
            f"the secret of HS256 has {len(key)} bytes: give at least {_MIN_SECRET_BYTES} random ones, such as `openssl rand -hex 32`"
        )
    return key


def _check_kind(algorithm: Algorithm, key: object, rsa: type, ed25519: type) -> None:
    wanted = rsa if algorithm == "RS256" else ed25519
    if not isinstance(key, wanted):
        raise ConfigError(f"the key is {type(key).__name__.strip('_')}, which does not go with {algorithm}: RS256 takes RSA, EdDSA Ed25519")
    if algorithm == "RS256" and key.key_size < _MIN_RSA_BITS:  # type: ignore[attr-defined]
        raise ConfigError(f"the RSA key has {key.key_size} bits: give at least {_MIN_RSA_BITS}")  # type: ignore[attr-defined]


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
