"""From nats-py's errors to ours; the only place that does so."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

import nats.errors as ne
import nats.js.errors as je

from mesh.errors import BadRequest, DeadlineExceeded, Denied, MeshError, NobodyListens, PayloadTooLarge, ServiceError, Unavailable

__all__ = ["is_refusal", "mapped", "mapped_error"]


def is_refusal(error: BaseException) -> bool:
    """Whether the server refused the user, so that trying again cannot help."""
    kinds = (ne.AuthorizationError, ne.InvalidUserCredentialsError, ne.SecureConnRequiredError, ne.SecureConnWantedError, ssl.SSLError)
    return isinstance(error, kinds) or (isinstance(error, ne.Error) and "authorization violation" in str(error).lower())


def mapped_error(error: BaseException, what: str) -> MeshError | None:
    """Our error for `error`, which happened while doing `what`; None if it is not one of NATS's."""
    match error:
        case MeshError():
            return error
        case ne.NoRespondersError() | je.NoStreamResponseError():
            return NobodyListens(f"{what}: nobody listens there")
        case ne.MaxPayloadError():
            return PayloadTooLarge(f"{what}: more than the server takes in one message", size_bytes=0, limit_bytes=0)
        case ne.SecureConnFailedError() | ne.SecureConnRequiredError() | ne.SecureConnWantedError():
            return Denied(f"{what}: the NATS server and this side do not agree on TLS ({error})")
        case ne.AuthorizationError() | ne.InvalidUserCredentialsError():
            return Denied(f"{what}: the NATS server refuses these credentials")
        case ne.Error() if is_refusal(error):  # in the handshake nats-py has only the server's text
            return Denied(f"{what}: the NATS server refuses these credentials")
        case ssl.SSLCertVerificationError():
            return Denied(
                f"{what}: the NATS server's certificate is not to be trusted ({error.verify_message}): give the authority that signed it "
                "with nats.tls_ca_file or --nats-ca, and the name that stands in it as the address"
            )
        case ssl.SSLError():
            return Denied(
                f"{what}: TLS with the NATS server failed ({error.reason or error}): does it want a certificate of this side "
                "(nats.tls_cert_file and nats.tls_key_file, --nats-cert and --nats-key)?"
            )
        case ne.NoServersError():
            return Unavailable(f"{what}: no NATS server answers")
        case (
            ne.ConnectionClosedError()
            | ne.ConnectionDrainingError()
            | ne.ConnectionReconnectingError()
            | ne.OutboundBufferLimitError()
            | ne.StaleConnectionError()
        ):
            return Unavailable(f"{what}: not connected to a NATS server")
        case ne.BadSubjectError() | ne.BadHeaderError():
            return BadRequest(f"{what}: not a name NATS takes", field="subject")
        case je.ServiceUnavailableError():
            return Unavailable(f"{what}: JetStream is not available on this NATS server; enable it (nats/README.md)")
        case je.APIError():
            return ServiceError(f"{what}: {error.description or error.err_code}")
        case TimeoutError() | asyncio.TimeoutError():
            return DeadlineExceeded(f"{what}: no answer in time")
        case ne.Error():
            return ServiceError(f"{what}: {error}")
        case OSError():
            return Unavailable(f"{what}: {error.strerror or error}")
    return None


@contextmanager
def mapped(what: str) -> Iterator[None]:
    """Errors of NATS inside this context are raised as ours, with `what` in front of the message."""
    try:
        yield
    except Exception as error:
        ours = mapped_error(error, what)
        if ours is None or ours is error:
            raise
        raise ours from None
