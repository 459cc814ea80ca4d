from __future__ import annotations

import os

# Thread pools would only compete with each other here; set before onnxruntime and XLA start theirs.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How much of the ONNX backend suite passes, as one figure."""

    def count(outcome: str, test: str) -> int:
        reports = terminalreporter.stats.get(outcome, [])
        return sum(1 for report in reports if f"test_onnx_backend.py::{test}[" in report.nodeid)

    passed, failed = count("passed", "test_backend_case"), count("failed", "test_backend_case")
    excluded = count("passed", "test_excluded_case_does_not_pass")
    if passed or failed:
        terminalreporter.write_line(f"ONNX backend node cases: {passed} pass, {failed} fail, {excluded} excluded with a reason")
