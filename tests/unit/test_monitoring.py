"""What deploy/monitoring ships: rules, dashboards, and that they name metrics that exist."""

from __future__ import annotations

import re
from pathlib import Path

import dashboards
import pytest
import yaml

from mesh.telemetry.metrics import METRICS

ROOT = Path(__file__).parents[2]
HERE = ROOT / "deploy" / "monitoring"
RULES = [rule for group in yaml.safe_load((HERE / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
ALERTS = [rule for rule in RULES if "alert" in rule]
RECORDED = {rule["record"] for rule in RULES if "record" in rule}
QUERIES = [query for _, rows in dashboards.ALL.values() for row in rows for panel in row.panels for query, _ in panel.queries]
NAMES = {metric.name for metric in METRICS} | {
    f"{m.name}_{end}" for m in METRICS if m.kind == "histogram" for end in ("bucket", "sum", "count")
}
OTHERS = {"up", "process_start_time_seconds"}
METRIC = re.compile(r"(?<![\w:\"~=])((?:mesh|gen_ai_server|http_server|process)[_:][\w:]+)(?!\")")


def unknown(query: str) -> set[str]:
    labels = {label for metric in METRICS for label in metric.labels}
    return set(METRIC.findall(query)) - NAMES - OTHERS - RECORDED - labels


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in RULES)])
def test_a_query_names_metrics_that_exist(query: str) -> None:
    assert not unknown(query)


def test_a_metric_that_does_not_exist_is_found() -> None:
    assert unknown("rate(mesh_shard_wishes_total[1m])")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_has_a_severity_a_section_and_a_test(alert: dict[str, dict[str, str]]) -> None:
    name = str(alert["alert"])
    assert alert["labels"]["severity"] in ("critical", "warning")
    assert alert["annotations"]["runbook_url"] == f"docs/runbook.md#{name.lower()}"
    assert re.search(rf"^## {name}$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    tests = yaml.safe_load((HERE / "alerts_test.yml").read_text())["tests"]
    assert any(case["alertname"] == name and case["exp_alerts"] for test in tests for case in test["alert_rule_test"]), "no test raises it"


def test_a_section_of_the_runbook_is_of_an_alert() -> None:
    sections = re.findall(r"^## (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(alert["alert"] for alert in ALERTS)


def test_the_dashboards_are_as_their_script_makes_them() -> None:
    written = {path.name: path.read_text() for path in (HERE / "dashboards").iterdir()}
    assert written == dashboards.files(), "run `python deploy/monitoring/dashboards.py`"


def test_the_panels_of_the_deployment_guide_are_there() -> None:
    titles = " ".join(panel.title for _, rows in dashboards.ALL.values() for row in rows for panel in row.panels)
    rows = " ".join(row.title for _, rows in dashboards.ALL.values() for row in rows)
    for words in ("Latency of each shard", "Memory"):
        assert words in rows
    for words in ("Network bandwidth", "GPU use", "GPU memory", "Error rate", "Failovers", "Request throughput"):
        assert words in titles


def test_the_collector_configuration_is_whole() -> None:
    config = yaml.safe_load((HERE / "otel-collector.yaml").read_text())
    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= set(config[kind])
