"""Whether the user of this connection may do what its role needs: every subject is tried."""

from __future__ import annotations

from collections.abc import AsyncIterator

from mesh.bus import Bus
from mesh.bus.inspect import denied
from mesh.doctor.findings import Finding, error, ok
from mesh.doctor.needs import Role, needs_of
from mesh.protocol.rights import Binding

__all__ = ["check_rights"]

_SHOWN = 6
_ANY = Binding()


async def check_rights(bus: Bus, role: Role, bound: Binding = _ANY) -> AsyncIterator[Finding]:
    needs = needs_of(role, inbox=bus.new_inbox(), bound=bound)
    publish, subscribe = await denied(bus, publish=needs.publish, subscribe=needs.subscribe)
    for what, refused, key in (("publish to", publish, "publish"), ("subscribe to", subscribe, "subscribe")):
        if refused:
            shown = ", ".join(refused[:_SHOWN]) + (f" and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else "")
            yield error(
                "permissions",
                f"this user may not {what} {shown}",
                f"a {role} needs that: make the server's configuration anew with `mesh nats config`, or add the subjects to `{key}` of the "
                "user, connect as another user, or name the role that is meant with --role",
            )
    if not publish and not subscribe:
        count = len(needs.publish) + len(needs.subscribe)
        yield ok("permissions", f"this user may do what a {role} needs ({count} subjects tried)")
