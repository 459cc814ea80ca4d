"""The roles of the processes and people of a mesh. Each is a user of NATS with rights of its own; mesh/protocol/rights.py derives them."""

from __future__ import annotations

from typing import Final, Literal

__all__ = ["PURPOSES", "ROLES", "Role"]

Role = Literal["coordinator", "shard", "gateway", "client", "monitor", "provisioner", "operator", "system"]

PURPOSES: Final[dict[Role, str]] = {
    "coordinator": "a coordinator, and the HTTP that it serves",
    "shard": "a shard; its own name alone, and with a range no other range",
    "gateway": "a gateway: requests of its users, batches, events",
    "client": "a program that asks for answers",
    "monitor": "reads the state of the mesh, and changes nothing",
    "provisioner": "pushes models; drains, loads and forgets shards",
    "operator": "everything in the account of the mesh",
    "system": "the account of the servers themselves, and nothing of the mesh",
}
"""Role -> who has it."""

ROLES: Final[tuple[Role, ...]] = tuple(PURPOSES)
