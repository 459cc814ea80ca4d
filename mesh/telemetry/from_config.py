"""From the section `tracing` of a configuration file, and the OTEL_* variables, to what a process does with its spans."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mesh.errors import ConfigError
from mesh.settings.schema import TracingSection
from mesh.telemetry.context import TraceSampling
from mesh.telemetry.export import SpanExport, exporters
from mesh.telemetry.otel_environment import sdk_disabled

__all__ = ["export_of", "sampling_of"]

_FIXED = {"always_on": 1.0, "parentbased_always_on": 1.0, "always_off": 0.0, "parentbased_always_off": 0.0}
_BY_RATIO = ("traceidratio", "parentbased_traceidratio")


def sampling_of(section: TracingSection, environment: Mapping[str, str] = os.environ) -> TraceSampling:
    """What the section says; where it does not say the ratio, OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG. The sender of a request
    decides for its own trace in any case. ConfigError: the variables are not valid."""
    ratio = section.sample_ratio
    if "sample_ratio" not in section.model_fields_set:
        ratio = _ratio(environment, ratio)
    enabled = section.enabled and not sdk_disabled(environment)
    return TraceSampling(ratio, section.slow_request, section.slow_first_token, section.content, enabled)


def _ratio(environment: Mapping[str, str], default: float) -> float:
    sampler, argument = environment.get("OTEL_TRACES_SAMPLER", ""), environment.get("OTEL_TRACES_SAMPLER_ARG", "")
    if sampler in _FIXED:
        return _FIXED[sampler]
    if sampler and sampler not in _BY_RATIO:
        raise ConfigError(f"OTEL_TRACES_SAMPLER is {sampler!r}: give one of {', '.join([*_FIXED, *_BY_RATIO])}")
    if not argument:
        return 1.0 if sampler else default  # the standard's default for these samplers
    try:
        ratio = float(argument)
    except ValueError:
        ratio = -1.0
    if not 0 <= ratio <= 1:
        raise ConfigError(f"OTEL_TRACES_SAMPLER_ARG is {argument!r}: give a number from 0 to 1")
    return ratio


def export_of(section: TracingSection) -> SpanExport | None:
    """Where spans go that leave the mesh; None: nowhere, for no collector is named. ConfigError as for `exporters`."""
    if not section.enabled:
        return None
    found = exporters(section.otlp_endpoint, section.otlp_protocol)
    return SpanExport(found) if found else None
