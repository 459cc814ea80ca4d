"""From the sections of a configuration file to a listener's options and the verifier of its tokens."""

from __future__ import annotations

from mesh.errors import ConfigError
from mesh.http.keys import Credentials, KeyFile
from mesh.http.listener import Tls, is_loopback
from mesh.http.tokens import Checks, Verifier, read_secret
from mesh.settings.schema import AuthenticationSection, TlsSection

__all__ = ["tls_of", "verifier_of"]


def tls_of(section: TlsSection | None) -> Tls | None:
    """The TLS files that a `tls` section names, or None where it is missing or off."""
    if section is None or not section.enabled:
        return None
    return Tls(section.cert_file, section.key_file, section.ca_file, required=section.require_client_certificate)


def verifier_of(section: AuthenticationSection, host: str) -> Checks | None:
    """What checks tokens and API keys at a listener on `host`, or None where none is asked for. Unless the section says otherwise,
    tokens are asked for wherever other machines reach the listener. ConfigError: tokens are to be checked and the key is missing."""
    enabled = not is_loopback(host) if section.enabled is None else section.enabled
    if not enabled:
        return None
    if section.algorithm == "HS256":
        secret = None if section.secret_key is None else section.secret_key.get_secret_value()
        key = read_secret(secret, section.secret_key_file, "authentication.secret_key")
        wanted = "authentication.secret_key: ${JWT_SECRET} or secret_key_file"
    else:
        key = read_secret(None, section.public_key_file, "authentication.public_key")
        wanted = "authentication.public_key_file"
    keys = None if section.api_keys_file is None else KeyFile(section.api_keys_file)
    if keys is not None:
        return Credentials(None if key is None else Verifier(section.algorithm, key), keys)
    if key is None:
        why = "is on" if section.enabled else f"is on because {host} is not loopback"
        raise ConfigError(
            f"authentication {why}, and has no key: set {wanted} or api_keys_file, or authentication.enabled: false where others guard it"
        )
    return Verifier(section.algorithm, key)
