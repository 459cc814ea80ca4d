"""What a machine says of itself is the same each time it is asked."""

from __future__ import annotations

from mesh.host.processor import machine_id, processor_features, processor_name


def test_the_processor_has_a_name_and_the_machine_an_identity() -> None:
    assert processor_name()
    assert machine_id() == machine_id() != ""
    assert all(line.startswith(("model name", "flags", "Features")) for line in processor_features())
