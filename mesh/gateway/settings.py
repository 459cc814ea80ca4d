"""The values that an HTTP edge is made with. mesh/gateway/from_config.py makes them from a configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from mesh.http.listener import ListenerOptions
from mesh.http.tokens import Checks, Quota

__all__ = ["GatewaySettings", "Limits"]


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one request. quota: for bearer tokens without limits of their own. subjects: the quotas of subjects, by name; they come
    before `quota`.

    body_timeout_s: the time for a whole body to arrive. request_timeout_s: the time for a whole generation. keep_alive_s: after this
    time without an event, a stream sends a comment.
    """

    max_body_bytes: int = 4 * 1024 * 1024
    max_prompt_chars: int = 1_000_000
    max_choices: int = 16
    max_batch: int = 256
    batch_concurrency: int = 8
    default_max_tokens: int = 1024
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    keep_alive_s: float = 10.0
    quota: Quota = field(default_factory=Quota)
    subjects: Mapping[str, Quota] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """model: the model of a request without a model's name (None: the only one that is served). verifier None: every caller that can
    reach the listener may do everything. health_fresh_s: a probe is made if the last step is older. cors_origins: the origins whose pages
    may call; none by default. sample_ratio: of the traces that begin here, so many are kept for a collector. retries: how often a request
    is sent to the mesh again after a loss."""

    model: str | None = None
    listener: ListenerOptions = field(default_factory=ListenerOptions)
    limits: Limits = field(default_factory=Limits)
    verifier: Checks | None = None
    health_fresh_s: float = 2.0
    probe_timeout_s: float = 5.0
    cors_origins: tuple[str, ...] = ()
    sample_ratio: float = 0.0
    retries: int = 3
