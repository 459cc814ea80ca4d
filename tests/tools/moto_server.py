"""A moto server that tells the description of a rule between two security groups: `moto_server.py PORT`, run by moto's Python.

moto 5.2 keeps the description and tells it only of rules with addresses, so Terraform would see a change in every plan.
"""

from __future__ import annotations

import sys

from moto.ec2.models.security_groups import SecurityGroupRule
from moto.server import main


def _description(rule: SecurityGroupRule) -> str | None:
    return rule.ip_range.get("Description") or (rule.source_group or {}).get("Description")


SecurityGroupRule.description = property(_description)
main(["-H", "127.0.0.1", "-p", sys.argv[1]])
