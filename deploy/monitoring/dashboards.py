"""Makes the Grafana dashboards: `python deploy/monitoring/dashboards.py` writes deploy/monitoring/dashboards/*.json.

A panel is one line below: its title, its unit, and its queries with their legends. Every query filters by the variables of its dashboard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).parent
DASHBOARDS: Final = HERE / "dashboards"
_WIDTH, _HEIGHT, _COLUMNS = 8, 8, 3


@dataclass(frozen=True)
class Panel:
    """queries: (PromQL, legend). needs: what must be there for it to have data, where that is not so in every mesh."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    help: str = ""
    stack: bool = False
    needs: str = ""


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def quantile(q: float, metric: str, by: str, selector: str) -> str:
    return f"histogram_quantile({q}, sum by (le, {by}) (rate({metric}_bucket{{{selector}}}[$__rate_interval])))"


def rate(metric: str, selector: str, by: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{selector}}}[$__rate_interval]))"


_M = 'model=~"$model"'
_G = 'gen_ai_request_model=~"$model"'
_S = 'model=~"$model", shard=~"$shard"'
_FIRST = "gen_ai_server_time_to_first_token_seconds"
_EACH = "gen_ai_server_time_per_output_token_seconds"
_WHOLE = "gen_ai_server_request_duration_seconds"
_STEP = "mesh_shard_step_seconds"
_HTTP = "http_server_request_duration_seconds"

OVERVIEW: Final = (
    Row(
        "Requests",
        (
            Panel("Request throughput", "reqps", ((rate("mesh_coordinator_requests_total", _M, "result"), "{{result}}"),)),
            Panel(
                "Token throughput",
                "short",
                (
                    (rate("mesh_coordinator_tokens_total", _M, "model"), "generated, {{model}}"),
                    (rate("mesh_coordinator_prompt_tokens_total", _M, "model"), "of prompts, {{model}}"),
                ),
                "Tokens a second.",
            ),
            Panel("Error rate by kind", "reqps", ((rate(f"{_WHOLE}_count", _G, "error_type"), "{{error_type}}"),), "No name: success."),
            Panel(
                "Time to first token",
                "s",
                tuple(
                    (quantile(q, _FIRST, "gen_ai_request_model", _G), f"p{q * 100:g} {{{{gen_ai_request_model}}}}")
                    for q in (0.5, 0.95, 0.99)
                ),
            ),
            Panel(
                "Time per output token",
                "s",
                tuple(
                    (quantile(q, _EACH, "gen_ai_request_model", _G), f"p{q * 100:g} {{{{gen_ai_request_model}}}}")
                    for q in (0.5, 0.95, 0.99)
                ),
            ),
            Panel(
                "First tokens after more than 2.5 s",
                "percentunit",
                (("mesh:first_token_late:ratio_rate5m", "5 min"), ("mesh:first_token_late:ratio_rate1h", "1 h")),
                "The SLO allows 1 %; see alerts.yml.",
            ),
        ),
    ),
    Row(
        "Failover",
        (
            Panel(
                "Failovers, restarts, suspicions",
                "short",
                tuple(
                    (f"sum (increase(mesh_coordinator_{name}_total{{{_M}}}[$__rate_interval]))", name)
                    for name in ("failovers", "restarts", "suspected", "resumed", "defects")
                ),
            ),
            Panel(
                "Shards",
                "short",
                (
                    (f"max by (model) (mesh_coordinator_shards{{{_M}}})", "there, {{model}}"),
                    (f"max by (model) (mesh_coordinator_expected_shards{{{_M}}})", "expected, {{model}}"),
                    (f"min by (model) (mesh_coordinator_unserved_layers{{{_M}}})", "layers without a shard, {{model}}"),
                ),
            ),
            Panel(
                "Shards of each range",
                "short",
                ((f"max by (model, range) (mesh_coordinator_range_shards{{{_M}}})", "{{model}} {{range}}"),),
            ),
            Panel("Age of leases", "s", ((f"max by (shard) (mesh_coordinator_lease_age_seconds{{{_M}}})", "{{shard}}"),)),
            Panel(
                "Processes started again",
                "short",
                (("sum by (role, process) (changes(process_start_time_seconds[1h]))", "{{role}} {{process}}"),),
            ),
            Panel("Retries by gateways", "short", (("sum (rate(mesh_gateway_retries_total[$__rate_interval]))", "a second"),)),
        ),
    ),
    Row(
        "Coordinators",
        (
            Panel("Sessions", "short", ((f"sum by (state) (mesh_coordinator_sessions{{{_M}}})", "{{state}}"),), stack=True),
            Panel(
                "Rows",
                "short",
                (
                    (f"max by (model) (mesh_coordinator_capacity_sessions{{{_M}}})", "sessions that fit, {{model}}"),
                    (f"min by (shard) (mesh_coordinator_shard_free_rows{{{_M}}})", "free, {{shard}}"),
                ),
            ),
            Panel("Wait for a row, p95", "s", ((quantile(0.95, "mesh_coordinator_queue_wait_seconds", "model", _M), "{{model}}"),)),
            Panel("Step through all stages, p95", "s", ((quantile(0.95, "mesh_coordinator_step_seconds", "phase", _M), "{{phase}}"),)),
            Panel(
                "Sessions in a decode step",
                "short",
                (
                    (
                        f"{rate('mesh_coordinator_decode_batch_rows_sum', _M)} / {rate('mesh_coordinator_decode_batch_rows_count', _M)}",
                        "mean",
                    ),
                    (quantile(0.95, "mesh_coordinator_decode_batch_rows", "model", _M), "p95 {{model}}"),
                ),
            ),
            Panel(
                "Where the time of decode steps goes",
                "percentunit",
                (
                    (
                        f"{rate('mesh_coordinator_decode_seconds_total', _M, 'part')} / ignoring (part) group_left "
                        f"{rate('mesh_coordinator_decode_seconds_total', _M)}",
                        "{{part}}",
                    ),
                ),
                stack=True,
            ),
            Panel(
                "Cost of a hop",
                "s",
                (
                    (
                        rate("mesh_coordinator_decode_seconds_total", f'{_M}, part=~"hop|codec"')
                        + " / "
                        + rate("mesh_coordinator_hops_total", _M),
                        "mean",
                    ),
                ),
                "Codec, NATS, the kernel and event loops, for each hop of a decode step.",
            ),
            Panel(
                "Unexpected errors",
                "short",
                (
                    (rate("mesh_coordinator_errors_total", _M, "place"), "{{place}}"),
                    ("sum by (kind) (rate(mesh_nats_errors_total[$__rate_interval]))", "NATS: {{kind}}"),
                ),
            ),
            Panel("Prompts", "short", ((rate("mesh_coordinator_prompts_total", _M, "result"), "{{result}}"),), "A second."),
        ),
    ),
    Row(
        "JetStream and batches",
        (
            Panel(
                "Reachable, writable",
                "short",
                (
                    (f"max by (model) (mesh_coordinator_jetstream_reachable{{{_M}}})", "JetStream answers"),
                    (f"min by (model) (mesh_coordinator_records_writable{{{_M}}})", "session records are written"),
                ),
            ),
            Panel("Size of streams", "bytes", ((f"max by (stream) (mesh_coordinator_stream_bytes{{{_M}}})", "{{stream}}"),)),
            Panel(
                "Session records",
                "short",
                (
                    (rate("mesh_coordinator_records_total", _M, "result"), "{{result}} a second"),
                    (f"sum (mesh_coordinator_pending_records{{{_M}}})", "changed and not written"),
                ),
            ),
            Panel(
                "Lag of session records", "s", ((f"max by (coordinator) (mesh_coordinator_record_lag_seconds{{{_M}}})", "{{coordinator}}"),)
            ),
            Panel(
                "Batches",
                "short",
                (
                    (f"max (mesh_coordinator_batch_backlog_requests{{{_M}}})", "requests that wait"),
                    (f"max (mesh_coordinator_batch_dead_messages{{{_M}}})", "dead messages"),
                ),
            ),
            Panel(
                "Requests of batches", "short", ((rate("mesh_coordinator_batch_requests_total", _M, "result"), "{{result}}"),), "A second."
            ),
        ),
    ),
    Row(
        "HTTP",
        (
            Panel("Requests by route", "reqps", ((rate(f"{_HTTP}_count", "", "http_route"), "{{http_route}}"),)),
            Panel(
                "Requests by status", "reqps", ((rate(f"{_HTTP}_count", "", "http_response_status_code"), "{{http_response_status_code}}"),)
            ),
            Panel("Duration by route, p95", "s", ((quantile(0.95, _HTTP, "http_route", ""), "{{http_route}}"),)),
            Panel(
                "Under way",
                "short",
                (
                    ("sum (http_server_active_requests)", "requests"),
                    ("sum (mesh_gateway_open_streams)", "streams"),
                    ("sum (mesh_gateway_connections)", "connections"),
                ),
            ),
            Panel("Spans dropped", "short", (("sum by (role) (rate(mesh_spans_dropped_total[$__rate_interval]))", "{{role}}"),)),
        ),
    ),
)

SHARDS: Final = (
    Row(
        "Latency of each shard",
        (
            Panel(
                "Compute of a decode step",
                "s",
                tuple((quantile(q, _STEP, "shard", f'{_S}, phase="decode"'), f"p{q * 100:g} {{{{shard}}}}") for q in (0.5, 0.95)),
            ),
            Panel("Compute of a prefill chunk, p95", "s", ((quantile(0.95, _STEP, "shard", f'{_S}, phase="prefill"'), "{{shard}}"),)),
            Panel("Wait for the compute thread, p95", "s", ((quantile(0.95, "mesh_shard_queue_wait_seconds", "shard", _S), "{{shard}}"),)),
            Panel(
                "Reading and writing a frame",
                "s",
                (
                    (
                        f"{rate('mesh_shard_codec_seconds_total', _S, 'shard')} / "
                        + rate("mesh_shard_frames_total", f'{_S}, direction="in"', "shard"),
                        "{{shard}}",
                    ),
                ),
            ),
            Panel(
                "Idle share",
                "percentunit",
                ((f"1 - rate(mesh_shard_busy_seconds_total{{{_S}}}[$__rate_interval])", "{{shard}}"),),
                "Bubbles.",
            ),
            Panel("Frames in the queue", "short", ((f"mesh_shard_queue_frames{{{_S}}}", "{{shard}}"),)),
        ),
    ),
    Row(
        "Memory",
        (
            Panel(
                "Resident memory",
                "bytes",
                (
                    (f"mesh_shard_resident_memory_bytes{{{_S}}}", "{{shard}}"),
                    (f"mesh_shard_memory_limit_bytes{{{_S}}}", "limit of {{shard}}"),
                ),
            ),
            Panel("Weights and caches", "bytes", ((f"mesh_shard_memory_bytes{{{_S}}}", "{{shard}} {{kind}}"),), stack=True),
            Panel(
                "Rows used",
                "percentunit",
                ((f"1 - mesh_shard_free_rows{{{_S}}} / mesh_shard_rows{{{_S}}}", "{{shard}}"),),
            ),
            Panel("Filled positions", "short", ((f"mesh_shard_filled_positions{{{_S}}}", "{{shard}}"),)),
            Panel(
                "GPU memory",
                "bytes",
                ((f"mesh_shard_device_memory_bytes{{{_S}}}", "{{shard}} {{device}} {{kind}}"),),
                "What JAX reports of accelerators.",
                needs="an accelerator",
            ),
            Panel(
                "GPU use",
                "percentunit",
                (
                    (
                        f"rate(mesh_shard_busy_seconds_total{{{_S}}}[$__rate_interval]) and on (shard) mesh_shard_device_memory_bytes",
                        "{{shard}}",
                    ),
                ),
                "The share of time in which the shard's compute thread had work for the GPU.",
                needs="an accelerator",
            ),
        ),
    ),
    Row(
        "Between shards",
        (
            Panel("Network bandwidth", "Bps", ((rate("mesh_shard_frame_bytes_total", _S, "shard, direction"), "{{shard}} {{direction}}"),)),
            Panel("Frames", "short", ((rate("mesh_shard_frames_total", _S, "shard, direction"), "{{shard}} {{direction}}"),), "A second."),
            Panel("Tokens computed", "short", ((rate("mesh_shard_tokens_total", _S, "shard, phase"), "{{shard}} {{phase}}"),), "A second."),
            Panel(
                "Rows not computed, by reason",
                "short",
                ((rate("mesh_shard_nacked_rows_total", _S, "reason"), "{{reason}}"),),
            ),
            Panel(
                "Refused frames and messages", "short", ((rate("mesh_shard_rejected_total", _S, "reason") + " or vector(0)", "{{reason}}"),)
            ),
            Panel(
                "Rows of mirrors",
                "short",
                (
                    (rate("mesh_shard_followed_rows_total", _S, "shard"), "computed, {{shard}}"),
                    (rate("mesh_shard_missed_rows_total", _S, "shard"), "missed, {{shard}}"),
                ),
            ),
        ),
    ),
    Row(
        "State",
        (
            Panel("State", "short", ((f"mesh_shard_info{{{_S}}}", "{{shard}} {{range}} {{state}}"),)),
            Panel(
                "Compiled programs",
                "short",
                ((f"mesh_shard_compiled_programs_total{{{_S}}}", "{{shard}}"),),
                "It should not rise while serving.",
            ),
            Panel("Leases that could not be written", "short", ((rate("mesh_shard_lease_failures_total", _S, "shard"), "{{shard}}"),)),
        ),
    ),
)

ALL: Final = {"mesh-overview": ("Mesh", OVERVIEW), "mesh-shards": ("Mesh: shards", SHARDS)}


def dashboard(uid: str, title: str, rows: tuple[Row, ...]) -> dict[str, Any]:
    """One dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for row in rows:
        panels.append(
            {"id": len(panels) + 1, "type": "row", "title": row.title, "gridPos": {"h": 1, "w": 24, "x": 0, "y": y}, "panels": []}
        )
        y += 1
        for index, panel in enumerate(row.panels):
            place = {"h": _HEIGHT, "w": _WIDTH, "x": index % _COLUMNS * _WIDTH, "y": y + index // _COLUMNS * _HEIGHT}
            panels.append(_panel(len(panels) + 1, panel, place))
        y += -(-len(row.panels) // _COLUMNS) * _HEIGHT
    names = ["model"] + (["shard"] if uid == "mesh-shards" else [])
    return {
        "uid": uid,
        "title": title,
        "tags": ["mesh"],
        "schemaVersion": 38,
        "version": 1,
        "editable": True,
        "refresh": "15s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [_SOURCE, *(_variable(name, uid) for name in names)]},
        "panels": panels,
    }


_SOURCE: Final = {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}
_FROM: Final = {"type": "prometheus", "uid": "${datasource}"}


def _variable(name: str, uid: str) -> dict[str, Any]:
    query = f"label_values({'mesh_shard_rows' if uid == 'mesh-shards' else 'mesh_coordinator_serving'}, {name})"
    return {
        "name": name,
        "type": "query",
        "datasource": _FROM,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "includeAll": True,
        "multi": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panel(id: int, panel: Panel, place: dict[str, int]) -> dict[str, Any]:
    custom: dict[str, Any] = {"fillOpacity": 20 if panel.stack else 0, "showPoints": "never"}
    if panel.stack:
        custom["stacking"] = {"mode": "normal"}
    return {
        "id": id,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.help,
        "datasource": _FROM,
        "gridPos": place,
        "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0, "custom": custom}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
        "targets": [
            {"refId": chr(ord("A") + index), "datasource": _FROM, "expr": query, "legendFormat": legend}
            for index, (query, legend) in enumerate(panel.queries)
        ],
    }


def files() -> dict[str, str]:
    """File name -> content."""
    return {f"{uid}.json": json.dumps(dashboard(uid, title, rows), indent=1) + "\n" for uid, (title, rows) in ALL.items()}


if __name__ == "__main__":
    DASHBOARDS.mkdir(exist_ok=True)
    for name, content in files().items():
        (DASHBOARDS / name).write_text(content)
