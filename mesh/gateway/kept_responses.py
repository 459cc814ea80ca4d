"""Responses that are kept for a while, so that a later request goes on with them, at any gateway.

    KV mesh_responses       OWNER.RESPONSE    the response, and the messages up to and with it, compressed

OWNER is a digest of the subject that asked for it. Another subject that learns the id of a response looks below another key, where there
is nothing. What is kept is bounded by its age, by the size of each response and of all together, and for each subject by number and
size: the gateway that kept too much of a subject's forgets the oldest.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import zlib
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import orjson

from mesh.bus import Bucket
from mesh.client import AsyncMeshClient
from mesh.errors import MeshError, Unavailable
from mesh.protocol import subjects
from mesh.telemetry.seldom import Seldom

__all__ = ["KeptResponse", "KeptResponses", "pack", "unpack"]

seldom = Seldom(logging.getLogger("mesh.http"))

KEPT_S: Final = 3600.0
STORE_BYTES: Final = 128 * 1024 * 1024
RESPONSE_BYTES: Final = 512 * 1024
"""Of one response, compressed."""
OWNER_RESPONSES: Final = 1000
OWNER_BYTES: Final = 16 * 1024 * 1024
_OWNERS: Final = 10_000
_MOST_BYTES: Final = 32 * 1024 * 1024
"""Of a response that is read, before it was compressed."""


@dataclass(frozen=True, slots=True)
class KeptResponse:
    """document: the response. messages: those of the conversation up to and with its answer, without instructions."""

    document: dict[str, Any]
    messages: list[dict[str, Any]]


@dataclass(slots=True)
class _Owned:
    """What this gateway has kept of a subject's, the oldest first: keys and sizes."""

    entries: deque[tuple[str, int]] = field(default_factory=deque)
    size: int = 0

    def add(self, key: str, size: int) -> list[str]:
        """The keys to forget, now that one more is kept."""
        self.entries.append((key, size))
        self.size += size
        over = []
        while len(self.entries) > OWNER_RESPONSES or self.size > OWNER_BYTES:
            oldest, freed = self.entries.popleft()
            self.size -= freed
            over.append(oldest)
        return [key for key in over if all(key != other for other, _ in self.entries)]


class KeptResponses:
    """`owner`: the subject of a caller; empty where no token is required."""

    def __init__(self, client: AsyncMeshClient) -> None:
        self._client = client
        self._owned: OrderedDict[str, _Owned] = OrderedDict()

    @cached_property
    def _bucket(self) -> Bucket:
        bus = self._client.connection()
        if bus is None:
            raise Unavailable("the gateway is not connected to the mesh")
        return Bucket(
            bus,
            subjects.KV_RESPONSES,
            ttl_s=KEPT_S,
            durable=True,
            max_value_bytes=RESPONSE_BYTES,
            max_bytes=STORE_BYTES,
            secret_keys=True,
        )

    async def keep(self, owner: str, id: str, response: KeptResponse) -> bool:
        """False: it is too large, or cannot be kept now. The log says so."""
        key = _key(owner, id)
        data = await asyncio.to_thread(pack, response)
        if len(data) > RESPONSE_BYTES:
            return False
        try:
            await self._bucket.put(key, data)
            for old in self._of(owner).add(key, len(data)):
                await self._bucket.delete(old)
        except MeshError as error:
            seldom.error("keeping a response", error)
            return False
        return True

    async def get(self, owner: str, id: str) -> KeptResponse | None:
        """None: there is none, or it is another subject's."""
        entry = await self._bucket.get(_key(owner, id))
        return None if entry is None or not entry.value else await asyncio.to_thread(unpack, entry.value)

    async def forget(self, owner: str, id: str) -> bool:
        """False: there was none, or it is another subject's."""
        key = _key(owner, id)
        if await self._bucket.get(key) is None:
            return False
        await self._bucket.delete(key)
        return True

    def _of(self, owner: str) -> _Owned:
        found = self._owned.setdefault(owner, _Owned())
        self._owned.move_to_end(owner)
        if len(self._owned) > _OWNERS:
            self._owned.popitem(last=False)
        return found


def _key(owner: str, id: str) -> str:
    return f"{hashlib.sha256(owner.encode()).hexdigest()[:32]}.{hashlib.sha256(id.encode()).hexdigest()[:32]}"


def pack(response: KeptResponse) -> bytes:
    return zlib.compress(orjson.dumps({"response": response.document, "messages": response.messages}), 1)


def unpack(data: bytes) -> KeptResponse | None:
    """None: another program wrote it."""
    reader = zlib.decompressobj()
    try:
        document = orjson.loads(reader.decompress(data, _MOST_BYTES))
        response, messages = document["response"], document["messages"]
    except (zlib.error, orjson.JSONDecodeError, LookupError, TypeError):
        return None
    whole = isinstance(response, dict) and isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    return KeptResponse(response, messages) if whole else None
