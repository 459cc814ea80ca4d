"""Versions of Python packages as NATS's micro services take them."""

from __future__ import annotations

import pytest
from nats.micro.service import ServiceConfig

from mesh.bus.service import semantic


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.1.0", "0.1.0"),
        ("0.1.0.post1", "0.1.0+post1"),
        ("0.2.0rc1", "0.2.0-rc1"),
        ("0.2.0a1", "0.2.0-a1"),
        ("0.2.0.dev3", "0.2.0-dev3"),
        ("0.2.0rc1.post2.dev3", "0.2.0-rc1.post2.dev3"),
        ("0.2.0+team.1", "0.2.0+team.1"),
    ],
)
def test_any_version_of_a_package_is_one_of_a_service(version: str, expected: str) -> None:
    assert semantic(version) == expected
    ServiceConfig(name="shard", version=semantic(version), description="d")  # refuses what is none
