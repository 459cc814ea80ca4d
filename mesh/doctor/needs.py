"""The subjects that each role publishes to and subscribes to, as `mesh doctor` tries them.

They are those of its rights (mesh/protocol/rights.py), with the name of a process that does not exist in each place of a wildcard, so that
trying one disturbs nobody. What a role writes to a bucket is tried with a message that the bucket never stores. Subjects whose bare name
makes every service answer, and those that empty a stream, are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from mesh.protocol import subjects
from mesh.protocol.rights import Binding, rights_of
from mesh.protocol.roles import ROLES as ALL
from mesh.protocol.roles import Role

__all__ = ["NOBODY", "ROLES", "Needs", "Role", "needs_of"]

ROLES: Final[tuple[Role, ...]] = tuple(role for role in ALL if role != "system")
"""Those with rights in the account of the mesh."""

_ANY: Final = Binding()
NOBODY: Final = "doctor-nobody"
_LEFT_OUT: Final = (
    *(f"$SRV.{verb}" for verb in ("PING", "INFO", "STATS")),
    *(f"$JS.API.STREAM.PURGE.{name}" for name in (subjects.STREAM_BATCH, f"OBJ_{subjects.OBJECTS_MODELS}")),
)


@dataclass(frozen=True, slots=True)
class Needs:
    """Subjects that a role publishes to, and subscribes to."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def needs_of(role: Role, *, inbox: str, bound: Binding = _ANY) -> Needs:
    """`inbox`: a subject for answers of this connection. `bound`: the shard to which the user is bound. An operator needs what every other
    role needs, the inboxes apart."""
    publish: dict[str, None] = {}
    subscribe: dict[str, None] = {inbox: None}
    for each in [one for one in ROLES if one != "operator"] if role == "operator" else [role]:
        rights = rights_of(each, replace(bound, inbox=inbox))
        publish |= {_of_nobody(subject): None for subject in rights.publish if subject not in _LEFT_OUT}
        subscribe |= {_of_nobody(subject): None for subject in rights.subscribe if not subject.startswith(inbox)}
    return Needs(tuple(publish), tuple(subscribe))


def _of_nobody(pattern: str) -> str:
    return ".".join(NOBODY if word in ("*", ">") else word for word in pattern.split("."))
