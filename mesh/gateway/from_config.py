"""From the sections of a configuration file to the settings of an HTTP edge: a gateway's or a coordinator's."""

from __future__ import annotations

from mesh.gateway.settings import GatewaySettings, Limits
from mesh.http.from_config import tls_of, verifier_of
from mesh.http.listener import ListenerOptions
from mesh.http.tokens import Quota
from mesh.settings.schema import AuthenticationSection, HttpSection, QuotaSection, TlsSection, TracingSection
from mesh.telemetry.from_config import sampling_of

__all__ = ["gateway_settings"]


def gateway_settings(
    section: HttpSection, tls: TlsSection | None, authentication: AuthenticationSection, tracing: TracingSection, *, model: str | None
) -> GatewaySettings:
    """The settings that these sections describe. ConfigError: other machines can reach the listener, and the file does not set
    authentication."""
    listener = ListenerOptions(
        host=section.listen_host,
        port=section.listen_port,
        max_connections=section.max_connections,
        grace_s=section.drain_timeout,
        tls=tls_of(tls),
    )
    limits = Limits(
        max_body_bytes=section.max_body_bytes,
        max_prompt_chars=section.max_prompt_chars,
        request_timeout_s=section.request_timeout,
        quota=_quota(authentication),
        subjects={name: _quota(section) for name, section in authentication.subjects.items()},
    )
    return GatewaySettings(
        model=model,
        listener=listener,
        limits=limits,
        verifier=verifier_of(authentication, section.listen_host),
        probe_timeout_s=section.health_check_interval,
        cors_origins=tuple(section.cors_origins),
        sample_ratio=sampling_of(tracing).ratio,
        retries=section.retry_count,
    )


def _quota(section: QuotaSection) -> Quota:
    return Quota(section.requests_per_minute, section.tokens_per_minute, section.concurrent_sessions, section.requests_per_batch)
