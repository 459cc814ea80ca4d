#!/opt/mesh/bin/python
"""Whether the process of this container is well, for the probes of Docker and Kubernetes; exit code 1 and the reason if not.

    mesh-health ready    it serves: a coordinator whose mesh answers, a shard that has loaded, a server whose JetStream works
    mesh-health live     it need not be started again: it answers, and a shard's compute thread does

A shard that loads, or whose NATS server is away, is live and not ready: starting it again would only make it later. MESH_HEALTH_URL is
what is asked: the default is a coordinator's or a shard's own address, and /healthz of nats-server's monitoring port is another.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import urllib.error
import urllib.request

DEFAULT_URL = "http://127.0.0.1:8080/api/v1/health"
WITHIN_S = 3.0
STUCK = "the compute thread"


def asked(url: str) -> tuple[int, str]:
    """(status, why it is not well): status 0 where nothing answers."""
    context = ssl._create_unverified_context() if url.startswith("https://127.0.0.1") else None  # its name is not this address
    try:
        with urllib.request.urlopen(url, timeout=WITHIN_S, context=context) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        return error.code, reason(error.read())
    except OSError as error:
        return 0, str(error)


def reason(body: bytes) -> str:
    try:
        document = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")[:200]
    return str(document.get("reason") or document) if isinstance(document, dict) else str(document)


def is_well(question: str, status: int, why: str) -> bool:
    if question == "live":
        return status != 0 and not why.startswith(STUCK)
    return status == 200


def main() -> int:
    question = sys.argv[1] if len(sys.argv) > 1 else "ready"
    if question not in ("ready", "live"):
        print(f"{question!r} is no question: ask `mesh-health ready` or `mesh-health live`", file=sys.stderr)
        return 2
    status, why = asked(os.environ.get("MESH_HEALTH_URL", DEFAULT_URL))
    if is_well(question, status, why):
        return 0
    print(why or f"HTTP {status}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
