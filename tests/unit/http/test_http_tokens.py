"""Issued tokens are accepted, and no other token is."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any, cast

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as elliptic
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from mesh.errors import ConfigError, Denied
from mesh.http.tokens import Algorithm, Issuer, Quota, Verifier, peek, read_secret

SECRET = b"0123456789abcdef0123456789abcdef"
DAY_S = 86400.0


def pem(key: RSAPrivateKey | Ed25519PrivateKey) -> tuple[bytes, bytes]:
    """(private, public)"""
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), public


RSA = pem(rsa(public_exponent=65537, key_size=2048))
ED = pem(Ed25519PrivateKey.generate())
PAIRS = {"HS256": (SECRET, SECRET), "RS256": RSA, "EdDSA": ED}


def segment(data: object) -> str:
    raw = data if isinstance(data, bytes) else json.dumps(data).encode()
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def signed_by_hand(header: dict[str, Any], claims: dict[str, Any], key: bytes | None) -> str:
    """A token that no library would make. key None: without a signature."""
    text = f"{segment(header)}.{segment(claims)}"
    signature = b"" if key is None else hmac.new(key, text.encode(), hashlib.sha256).digest()
    return f"{text}.{segment(signature)}"


def good_claims() -> dict[str, Any]:
    return {"sub": "a", "exp": int(time.time() + DAY_S), "scope": "admin"}


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "EdDSA"])
def test_an_issued_token_is_accepted(algorithm: Algorithm) -> None:
    private, public = PAIRS[algorithm]
    now = time.time()
    token = Issuer(algorithm, private).issue("team", ["batch", "generate"], now_unix_s=now, expiry_s=DAY_S, quota=Quota(60))
    claims = Verifier(algorithm, public).verify(token)
    assert (claims.subject, claims.scopes, claims.expires_unix_s) == ("team", frozenset({"generate", "batch"}), int(now + DAY_S))
    assert claims.quota == Quota(requests_per_minute=60)
    assert claims.allows("batch") and not claims.allows("admin")
    header, shown = peek(token)
    assert header["alg"] == algorithm and shown["sub"] == "team"


def test_an_expired_token_is_refused() -> None:
    token = Issuer("HS256", SECRET).issue("a", ["generate"], now_unix_s=time.time() - 2 * DAY_S, expiry_s=DAY_S)
    with pytest.raises(Denied, match="expired"):
        Verifier("HS256", SECRET).verify(token)


@pytest.mark.parametrize("algorithm", ["HS256", "RS256", "EdDSA"])
@pytest.mark.parametrize("none", ["none", "None", "NONE", "nOnE"])
def test_a_token_without_a_signature_is_refused(algorithm: Algorithm, none: str) -> None:
    token = signed_by_hand({"alg": none, "typ": "JWT"}, good_claims(), None)
    with pytest.raises(Denied):
        Verifier(algorithm, PAIRS[algorithm][1]).verify(token)


@pytest.mark.parametrize("algorithm", ["RS256", "EdDSA"])
def test_a_public_key_is_never_taken_for_a_secret(algorithm: Algorithm) -> None:
    """Key confusion: an attacker signs with the public key as if it were the secret of HS256."""
    public = PAIRS[algorithm][1]
    token = signed_by_hand({"alg": "HS256", "typ": "JWT"}, good_claims(), public)
    with pytest.raises(Denied, match=f"not signed with {algorithm}"):
        Verifier(algorithm, public).verify(token)
    lying = signed_by_hand({"alg": algorithm, "typ": "JWT"}, good_claims(), public)
    with pytest.raises(Denied):
        Verifier(algorithm, public).verify(lying)


@pytest.mark.parametrize(("signs", "checks"), [("HS256", "RS256"), ("RS256", "HS256"), ("EdDSA", "RS256"), ("RS256", "EdDSA")])
def test_a_token_of_another_algorithm_is_refused(signs: Algorithm, checks: Algorithm) -> None:
    token = Issuer(signs, PAIRS[signs][0]).issue("a", ["admin"], now_unix_s=time.time(), expiry_s=DAY_S)
    with pytest.raises(Denied):
        Verifier(checks, PAIRS[checks][1]).verify(token)


def test_a_stronger_hash_than_configured_is_another_algorithm_too() -> None:
    with pytest.raises(Denied):
        Verifier("HS256", SECRET * 2).verify(jwt.encode(good_claims(), SECRET * 2, algorithm="HS512"))


def test_another_secret_and_every_changed_character_are_refused() -> None:
    token = Issuer("HS256", SECRET).issue("a", ["generate"], now_unix_s=time.time(), expiry_s=DAY_S)
    with pytest.raises(Denied, match="signature"):
        Verifier("HS256", b"x" * 32).verify(token)
    verifier = Verifier("HS256", SECRET)
    head, body, signature = token.split(".")
    for part in range(3):
        changed = [head, body, signature]
        changed[part] = ("A" if changed[part][0] != "A" else "B") + changed[part][1:]
        with pytest.raises(Denied):
            verifier.verify(".".join(changed))


@pytest.mark.parametrize("token", ["", ".", "..", "a.b.c", "é.é.é", "a" * 10_000, "Bearer x", "\x00", "{}"])
def test_an_invalid_token_is_refused(token: str) -> None:
    with pytest.raises(Denied):
        Verifier("HS256", SECRET).verify(token)


@pytest.mark.parametrize(
    "change",
    [
        {"exp": None},
        {"sub": None},
        {"sub": 7},
        {"scope": ["admin"]},
        {"rpm": 0},
        {"tpm": "many"},
        {"rpm": True},
        {"nbf": 4e9},
        {"exp": "soon"},
    ],
)
def test_claims_of_the_wrong_kind_are_refused(change: dict[str, Any]) -> None:
    claims = {name: value for name, value in {**good_claims(), **change}.items() if value is not None}
    token = signed_by_hand({"alg": "HS256", "typ": "JWT"}, claims, SECRET)
    with pytest.raises(Denied):
        Verifier("HS256", SECRET).verify(token)


def test_a_key_that_does_not_go_with_the_algorithm_is_refused() -> None:
    for algorithm, key, says in [
        ("HS256", b"short", "at least 32"),
        ("HS256", RSA[1], "is a PEM key"),
        ("RS256", ED[1], "does not go with RS256"),
        ("EdDSA", RSA[1], "does not go with EdDSA"),
        ("RS256", SECRET, "PEM form"),
        ("RS256", pem(rsa(public_exponent=65537, key_size=1024))[1], "1024 bits"),
        ("EdDSA", elliptic(SECP256R1()).public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo), "does not go"),
    ]:
        with pytest.raises(ConfigError, match=says):
            Verifier(cast(Algorithm, algorithm), key)
    with pytest.raises(ConfigError, match="private key"):
        Issuer("RS256", RSA[1])


def test_claims_that_make_no_sense_are_not_issued() -> None:
    issuer = Issuer("HS256", SECRET)
    good: dict[str, Any] = {"subject": "a", "scopes": ["admin"], "expiry_s": 1.0, "quota": Quota(1)}
    changes: list[dict[str, Any]] = [{"scopes": []}, {"scopes": ["root"]}, {"subject": ""}, {"expiry_s": 0.0}, {"quota": Quota(0)}]
    for change in changes:
        with pytest.raises(ConfigError):
            issuer.issue(**{**good, **change}, now_unix_s=0.0)


def test_a_secret_is_read_from_one_place(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    assert read_secret(None, str(file), "k") == SECRET
    assert read_secret("text", None, "k") == b"text"
    assert read_secret(None, None, "k") is None
    with pytest.raises(ConfigError, match="keep one"):
        read_secret("text", str(file), "k")
    with pytest.raises(ConfigError, match=r"k_file .*nowhere"):
        read_secret(None, str(tmp_path / "nowhere"), "k")
