"""X.509: a private authority, and certificates of servers and clients that it signs. Pure functions: time is passed in.

Keys are ECDSA on P-256, which every TLS library knows. An authority signs end certificates alone (path length 0).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from mesh.errors import BadRequest, ConfigError

__all__ = [
    "AUTHORITY_DAYS",
    "KINDS",
    "LEAF_DAYS",
    "Facts",
    "Keyed",
    "Kind",
    "facts",
    "is_signed_by",
    "issue",
    "new_authority",
    "read_certificates",
    "read_key",
]

Kind = Literal["server", "client", "both"]
KINDS: Final[tuple[Kind, ...]] = ("server", "client", "both")
AUTHORITY_DAYS: Final = 3650
LEAF_DAYS: Final = 90

_SKEW: Final = timedelta(minutes=5)  # clocks differ
_USES: Final = {
    "server": [ExtendedKeyUsageOID.SERVER_AUTH],
    "client": [ExtendedKeyUsageOID.CLIENT_AUTH],
    "both": [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH],
}
_HOST: Final = re.compile(r"(\*\.)?([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")


@dataclass(frozen=True, slots=True)
class Keyed:
    """A certificate with its private key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def certificate_pem(self) -> bytes:
        return self.certificate.public_bytes(serialization.Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


@dataclass(frozen=True, slots=True)
class Facts:
    """What a certificate says of itself."""

    name: str
    kind: Kind | Literal["authority"]
    hosts: tuple[str, ...]
    begins: datetime
    ends: datetime
    issuer: str


def new_authority(name: str, *, now: datetime, days: int = AUTHORITY_DAYS) -> Keyed:
    """An authority that signs itself. Two authorities of one name are told apart by their keys."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = _name(name)
    made = (
        _builder(subject, subject, key.public_key(), key.public_key(), now, days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Keyed(made, key)


def issue(authority: Keyed, name: str, *, kind: Kind, hosts: Sequence[str] = (), now: datetime, days: int = LEAF_DAYS) -> Keyed:
    """A certificate of `name`, signed by `authority`, for at most as long as the authority itself. `hosts`: names and addresses at which a
    server is reached. BadRequest: a server without hosts, or one that is neither a host name nor an address."""
    if kind != "client" and not hosts:
        raise BadRequest("a server is known by its hosts: give each name and address under which it is reached with --host", field="host")
    if days < 1:
        raise BadRequest(f"days is {days}: give at least 1", field="days")
    key = ec.generate_private_key(ec.SECP256R1())
    signer = authority.certificate
    builder = _builder(
        _name(name), signer.subject, key.public_key(), authority.key.public_key(), now, days, latest=signer.not_valid_after_utc
    )
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName([_general(host) for host in dict.fromkeys(hosts)]), critical=False)
    made = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USES[kind]), critical=False)
        .add_extension(_usage(signs=False), critical=True)
        .sign(authority.key, hashes.SHA256())
    )
    return Keyed(made, key)


def facts(certificate: x509.Certificate) -> Facts:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    issuers = certificate.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    hosts: tuple[str, ...] = ()
    kind: Kind | Literal["authority"] = "both"
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectAlternativeName):
            hosts = (*value.get_values_for_type(x509.DNSName), *map(str, value.get_values_for_type(x509.IPAddress)))
        elif isinstance(value, x509.ExtendedKeyUsage) and kind != "authority":
            uses = set(value)
            kind = next((each for each in KINDS if uses == set(_USES[each])), "both")
        elif isinstance(value, x509.BasicConstraints) and value.ca:
            kind = "authority"
    return Facts(
        str(names[0].value) if names else "",
        kind,
        hosts,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        str(issuers[0].value) if issuers else "",
    )


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # a wrong name, a wrong signature, another kind of key: it is not signed by this authority
        return False
    return True


def read_certificates(data: bytes, where: str) -> list[x509.Certificate]:
    """The certificates of a PEM file. ConfigError: there is none in it."""
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise ConfigError(f"{where}: no certificate in PEM form is in it") from None


def read_key(data: bytes, where: str) -> ec.EllipticCurvePrivateKey:
    """ConfigError: not a private key as this program writes it."""
    try:
        key = serialization.load_pem_private_key(data, password=None)
    except (ValueError, TypeError):
        raise ConfigError(f"{where}: no unencrypted private key in PEM form is in it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{where}: not a key of this program: certificates of your own authority are renewed with its own tools")
    return key


def _name(name: str) -> x509.Name:
    if not 1 <= len(name) <= 64:
        raise BadRequest(f"name {name[:80]!r}: give 1 to 64 characters", field="name")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    if len(host) > 253 or not _HOST.fullmatch(host) or host.replace(".", "").isdigit():
        raise BadRequest(f"host {host[:80]!r} is neither a host name nor an address", field="host")
    return x509.DNSName(host)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    signer: ec.EllipticCurvePublicKey,
    now: datetime,
    days: int,
    *,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    ends = now + timedelta(days=days)
    ends = ends if latest is None else min(ends, latest)
    by = x509.SubjectKeyIdentifier.from_public_key(signer)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now - _SKEW, ends - _SKEW))
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(by), critical=False)
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
