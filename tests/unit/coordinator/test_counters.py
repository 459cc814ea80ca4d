"""What the core counts reaches those who read a coordinator's statistics."""

from __future__ import annotations

from mesh.coordinator.core.state import CoreCounters
from mesh.protocol.status import CoordinatorStats


def test_a_coordinator_reports_everything_that_its_core_counts() -> None:
    """A reader ignores keys that its message does not have, so a counter without a field would be lost silently."""
    assert CoreCounters().as_dict().keys() <= CoordinatorStats.model_fields.keys()
