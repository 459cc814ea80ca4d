"""Which Host a listener answers to that no token protects.

A web page can let its own name lead to 127.0.0.1 after it was loaded (DNS rebinding). Its requests then reach a listener on its visitor's
machine, and it may read the answers. They name the page's host, which has a dot and is no address.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any

__all__ = ["host_of", "is_plain"]


def is_plain(host: str) -> bool:
    """Whether a Host header is an address, or a name without a dot."""
    name = host.rpartition(":")[0] if re.search(r":\d*$", host) and not host.endswith("]") else host
    if "." not in name:
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def host_of(scope: Any) -> str:
    """The Host header of an ASGI request; empty without one."""
    return next((value for name, value in scope["headers"] if name == b"host"), b"").decode("latin-1")
