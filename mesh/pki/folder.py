"""A private authority in a folder, and the certificates that it has issued.

    ca.crt       what every process trusts: the authority, and while it changes its predecessor too
    ca.key       the authority's private key; it belongs on one machine alone, which need not be one of the mesh
    NAME.crt     a certificate; NAME.key its private key

An authority changes in three steps, with the files given out and the servers told (SIGHUP) after each: `new_authority` puts a new one
beside the old one, and all trust both; `renew` issues every certificate anew, signed by the new one; `finish` drops the old one. At no
moment does a process meet a certificate that it does not trust.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509

from mesh.errors import BadRequest, ConfigError
from mesh.pki.certificates import (
    AUTHORITY_DAYS,
    LEAF_DAYS,
    Facts,
    Keyed,
    Kind,
    facts,
    is_signed_by,
    issue,
    new_authority,
    read_certificates,
    read_key,
)
from mesh.pki.private import private_folder, write_file
from mesh.protocol.subjects import check_token

__all__ = ["SOON_DAYS", "PkiFolder", "Shown"]

SOON_DAYS: Final = 21
"""A certificate with so many days left is to be renewed."""
_AUTHORITY: Final = "ca"


@dataclass(frozen=True, slots=True)
class Shown:
    """A certificate of the folder. `days`: left, negative when it has expired. `advice`: empty where nothing is to be done."""

    file: Path
    facts: Facts
    days: float
    advice: str

    @property
    def expired(self) -> bool:
        return self.days <= 0


class PkiFolder:
    """The folder at `path`; it need not exist before `init`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def ca(self) -> Path:
        """What every process trusts."""
        return self.path / f"{_AUTHORITY}.crt"

    def certificate(self, name: str) -> Path:
        return self.path / f"{name}.crt"

    def key(self, name: str) -> Path:
        return self.path / f"{name}.key"

    @property
    def names(self) -> list[str]:
        """Of the certificates that were issued, sorted."""
        return sorted(file.stem for file in self.path.glob("*.crt") if file.stem != _AUTHORITY)

    def init(self, *, name: str = "mesh", days: int = AUTHORITY_DAYS, now: datetime | None = None) -> None:
        """Make the authority. ConfigError: there is one."""
        for file in (self.ca, self.key(_AUTHORITY)):
            if file.exists():
                raise ConfigError(f"{file} is there already: nothing was written. `mesh pki rotate --ca` makes another authority")
        private_folder(self.path)
        made = new_authority(f"{name} authority {secrets.token_hex(4)}", now=now or datetime.now(UTC), days=days)
        write_file(self.key(_AUTHORITY), made.key_pem, secret=True)
        write_file(self.ca, made.certificate_pem, secret=False)

    def issue(
        self,
        name: str,
        *,
        kind: Kind,
        hosts: Sequence[str] = (),
        days: int = LEAF_DAYS,
        replace: bool = False,
        now: datetime | None = None,
    ) -> None:
        """A new certificate and key. ConfigError: there is one of this name, and it is not to be replaced."""
        if check_token(name, "name") == _AUTHORITY:
            raise BadRequest("the name ca is the authority's: give another one", field="name")
        for file in (self.certificate(name), self.key(name)):
            if file.exists() and not replace:
                raise ConfigError(
                    f"{file} is there already: nothing was written. Give --replace, or renew it with `mesh pki rotate {name}`"
                )
        made = issue(self._authority(), name, kind=kind, hosts=hosts, now=now or datetime.now(UTC), days=days)
        self._write(name, made)

    def renew(self, names: Sequence[str] = (), *, days: int | None = None, now: datetime | None = None) -> list[str]:
        """Issue certificates anew, with new keys, the same hosts and use, and `days` (None: as long as before), signed by the present
        authority. Returns their names; without `names` they are all. ConfigError: one is not there."""
        authority = self._authority()
        chosen = list(names) or self.names
        for name in chosen:
            (old, *_) = self._read(self.certificate(name))
            before = facts(old)
            kind: Kind = "both" if before.kind == "authority" else before.kind
            kept = days if days is not None else max(round((before.ends - before.begins) / timedelta(days=1)), 1)
            self._write(name, issue(authority, name, kind=kind, hosts=before.hosts, now=now or datetime.now(UTC), days=kept))
        return chosen

    def new_authority(self, *, days: int = AUTHORITY_DAYS, now: datetime | None = None) -> None:
        """A new authority beside the present one, which every process trusts as well. No certificate changes. ConfigError: a change is
        under way."""
        present = self._read(self.ca)
        if len(present) > 1:
            raise ConfigError(
                f"{self.ca} has {len(present)} authorities: a change is under way. Finish it with `mesh pki rotate`, then "
                "`mesh pki rotate --finish`"
            )
        name = facts(present[0]).name.rpartition(" authority ")[0] or "mesh"
        made = new_authority(f"{name} authority {secrets.token_hex(4)}", now=now or datetime.now(UTC), days=days)
        # the bundle first: a key whose certificate is not there would be of no use
        write_file(self.ca, made.certificate_pem + _pem(present[0]), secret=False)
        write_file(self.key(_AUTHORITY), made.key_pem, secret=True)

    def finish(self) -> None:
        """Trust the present authority alone. ConfigError: a certificate is still signed by the one before."""
        present, *_ = self._authorities()
        left = [name for name in self.names if not is_signed_by(self._read(self.certificate(name))[0], present)]
        if left:
            raise ConfigError(
                f"{', '.join(left)}: still signed by the authority before. Renew with `mesh pki rotate`, give the files out, then finish"
            )
        write_file(self.ca, _pem(present), secret=False)

    def show(self, *, now: datetime | None = None) -> list[Shown]:
        """Every certificate, authorities first, and what to do about it."""
        now = now or datetime.now(UTC)
        present, *before = self._authorities()
        shown = [self._shown(self.ca, present, now, "mesh pki rotate --ca")]
        leaves = [(name, self._read(self.certificate(name))[0]) for name in self.names]
        old = [name for name, leaf in leaves if not is_signed_by(leaf, present)]
        for each in before:
            advice = f"renew {', '.join(old)} with `mesh pki rotate`" if old else "once all have the new files: `mesh pki rotate --finish`"
            shown.append(Shown(self.ca, facts(each), _days(each, now), f"being replaced: {advice}"))
        for name, leaf in leaves:
            trusted = any(is_signed_by(leaf, each) for each in (present, *before))
            one = self._shown(self.certificate(name), leaf, now, f"mesh pki rotate {name}")
            shown.append(
                one if trusted else Shown(one.file, one.facts, one.days, f"not signed by this authority: `mesh pki rotate {name}`")
            )
        return shown

    def _shown(self, file: Path, certificate: x509.Certificate, now: datetime, command: str) -> Shown:
        days = _days(certificate, now)
        advice = f"expired: `{command}`" if days <= 0 else f"renew it soon: `{command}`" if days < SOON_DAYS else ""
        return Shown(file, facts(certificate), days, advice)

    def _authorities(self) -> list[x509.Certificate]:
        """The present authority, then the one before if processes trust it still. The present one is that whose key is here."""
        found = self._read(self.ca)
        if not self.key(_AUTHORITY).exists():
            return found
        public = read_key(self._bytes(self.key(_AUTHORITY)), str(self.key(_AUTHORITY))).public_key()
        return sorted(found, key=lambda each: each.public_key() != public)

    def _authority(self) -> Keyed:
        certificate, *_ = self._authorities()
        file = self.key(_AUTHORITY)
        key = read_key(self._bytes(file), str(file))
        if key.public_key() != certificate.public_key():
            raise ConfigError(f"{file} is not the key of {self.ca}: give the folder in which both were made")
        return Keyed(certificate, key)

    def _write(self, name: str, made: Keyed) -> None:
        write_file(self.key(name), made.key_pem, secret=True)
        write_file(self.certificate(name), made.certificate_pem, secret=False)

    def _read(self, file: Path) -> list[x509.Certificate]:
        return read_certificates(self._bytes(file), str(file))

    def _bytes(self, file: Path) -> bytes:
        try:
            return file.read_bytes()
        except OSError as error:
            raise ConfigError(
                f"{file}: {error.strerror}: make an authority with `mesh pki init`, or give its folder with --folder"
            ) from None


def _pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _days(certificate: x509.Certificate, now: datetime) -> float:
    return (certificate.not_valid_after_utc - now) / timedelta(days=1)
