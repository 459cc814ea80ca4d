"""Responses that are kept in JetStream: a real server, and one without JetStream."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest
from running import Run

from mesh.client import AsyncMeshClient
from mesh.errors import ServiceError
from mesh.gateway.kept_responses import RESPONSE_BYTES, KeptResponse, KeptResponses
from mesh.local.nats_server import NatsServer

KEPT = KeptResponse({"id": "resp_1", "output": []}, [{"role": "user", "content": "a"}])


def test_a_response_is_found_by_its_own_subject_at_any_gateway_until_it_is_forgotten(run: Run) -> None:
    async def work(url: str) -> None:
        async with AsyncMeshClient(url) as one, AsyncMeshClient(url) as other:
            here, there = KeptResponses(one), KeptResponses(other)
            assert await here.get("ann", "resp_1") is None
            assert await here.keep("ann", "resp_1", KEPT)
            assert await there.get("ann", "resp_1") == KEPT
            assert await there.get("bob", "resp_1") is None and not await there.forget("bob", "resp_1")
            assert await there.forget("ann", "resp_1") and not await there.forget("ann", "resp_1")
            assert await here.get("ann", "resp_1") is None

    with NatsServer.start() as server:
        run(work(server.url))


def test_one_that_is_too_large_is_not_kept(run: Run) -> None:
    async def work(url: str) -> None:
        async with AsyncMeshClient(url) as client:
            kept = KeptResponses(client)
            large = KeptResponse({"id": "resp_1"}, [{"role": "user", "content": secrets.token_hex(RESPONSE_BYTES + 1)}])
            assert not await kept.keep("ann", "resp_1", large)
            assert await kept.get("ann", "resp_1") is None

    with NatsServer.start() as server:
        run(work(server.url))


def test_without_jetstream_nothing_is_kept_and_the_answer_is_not_lost(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "plain.conf"
    config.write_text("max_payload: 1MB\n")

    async def work(url: str) -> None:
        async with AsyncMeshClient(url) as client:
            kept = KeptResponses(client)
            assert not await kept.keep("ann", "resp_1", KEPT)
            with pytest.raises(ServiceError):
                await kept.get("ann", "resp_1")

    with NatsServer.start(config=config) as server:
        run(work(server.url))
