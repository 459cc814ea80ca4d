"""Requests of JetStream's API, where nats-py has none for it or hides what is needed."""

from __future__ import annotations

from typing import Any, Final

import orjson

from mesh.bus.connection import Bus
from mesh.errors import ServiceError

__all__ = ["API", "ApiRefused", "answer_of", "ask_api", "passing_consumer"]

API: Final = "$JS.API"


class ApiRefused(ServiceError):
    """JetStream's own error. `status`: as in HTTP. `number`: which of JetStream's errors it is; 0: it does not say."""

    def __init__(self, what: str, error: dict[str, Any]) -> None:
        self.status, self.number = int(error.get("code", 0)), int(error.get("err_code", 0))
        self.description = str(error.get("description") or self.number or "refused")
        super().__init__(f"JetStream: {what}: {self.description} ({self.number or self.status})")


async def ask_api(bus: Bus, what: str, body: dict[str, Any] | None = None, *, timeout_s: float) -> dict[str, Any]:
    """The answer to `what`, such as STREAM.INFO.NAME. ApiRefused: it is an error. ServiceError: it cannot be read."""
    answer = await bus.ask(f"{API}.{what}", b"" if body is None else orjson.dumps(body), timeout_s=timeout_s)
    return answer_of(answer.data, what)


def passing_consumer(name: str, unused_s: float, **more: Any) -> dict[str, Any]:
    """The configuration of a consumer in the memory of one server, which forgets it once unused for so long. Nothing is acknowledged."""
    config = {"name": name, "ack_policy": "none", "deliver_policy": "all", "num_replicas": 1, "mem_storage": True}
    return {**config, "inactive_threshold": round(unused_s * 1e9), **more}


def answer_of(data: bytes, what: str) -> dict[str, Any]:
    """The document in an answer; it is empty where the answer is. The errors are those of `ask_api`."""
    try:
        said: dict[str, Any] = orjson.loads(data) if data else {}
        error = said.get("error")
    except (orjson.JSONDecodeError, AttributeError):
        raise ServiceError(f"JetStream: {what}: the server's answer is no JSON object") from None
    if error is not None:
        raise ApiRefused(what, error)
    return said
