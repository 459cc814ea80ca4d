"""A moto server with two of its faults mended: `moto_server.py PORT`, run by moto's Python.

moto 5.2 keeps the description of a security group's rule and tells it only of rules with addresses, so Terraform would see a change in
every plan. And it cannot remove the last version of an object that was deleted, so a bucket with versions could never be destroyed.
"""

from __future__ import annotations

import sys

from moto.ec2.models.security_groups import SecurityGroupRule
from moto.s3.models import FakeDeleteMarker
from moto.server import main


def _description(rule: SecurityGroupRule) -> str | None:
    return rule.ip_range.get("Description") or (rule.source_group or {}).get("Description")


SecurityGroupRule.description = property(_description)
FakeDeleteMarker.dispose = lambda marker: None
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
