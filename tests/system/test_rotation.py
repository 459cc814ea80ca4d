"""Certificates and the authority are renewed while 8 streams run on a secure mesh of processes. Every connection is ended and made anew
with the new files, and no request is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest
from running import Run
from waiting import until

from mesh.bus import Bus
from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children die with their parent by PR_SET_PDEATHSIG, which is Linux's")

STREAMS, TOKENS = 8, 40
PROMPTS = [[5 + index, 17, 33] for index in range(STREAMS)]


async def end_connections(mesh: LocalMesh) -> int:
    """Let the server end every connection but this one; returns how many it ended."""
    assert mesh.site is not None
    async with await Bus.connect(mesh.site.bus("system", mesh.url), name="test-system") as bus:
        answer = orjson.loads((await bus.ask("$SYS.REQ.SERVER.PING.CONNZ", b"{}", timeout_s=30)).data)
        others = [one["cid"] for one in answer["data"]["connections"] if one["name"] != "test-system"]
        for cid in others:
            await bus.ask(f"$SYS.REQ.SERVER.{answer['server']['id']}.KICK", orjson.dumps({"cid": cid}), timeout_s=30)
        return len(others)


def test_certificates_and_the_authority_change_under_8_streams_and_no_request_is_lost(model: Path, run: Run) -> None:
    expected = [
        list(Pipeline.load(model, context=64).complete(prompt, SamplingParams(temperature=0.0), max_tokens=TOKENS).ids)
        for prompt in PROMPTS
    ]

    async def work(mesh: LocalMesh) -> None:
        assert mesh.site is not None and mesh.server is not None
        server, pki = mesh.server, mesh.site.pki
        answers = 0
        changing = True

        async def reload() -> None:
            said = sum("Reloaded server configuration" in line for line in server.log)
            os.kill(server.pid, signal.SIGHUP)
            await until(
                lambda: sum("Reloaded server configuration" in line for line in server.log) > said, because="the server's log says it"
            )

        async with AsyncMeshClient(options=mesh.bus, model="tiny") as client:

            async def stream(index: int) -> None:
                nonlocal answers
                again = True
                while again:
                    again = changing  # one more after the last change
                    async for _ in (made := client.stream(tokens=PROMPTS[index], max_tokens=TOKENS, ignore_eos=True, temperature=0.0)):
                        pass
                    result = made.completion
                    assert result is not None and list(result.tokens) == expected[index]
                    answers += 1

            async def change() -> None:
                nonlocal changing
                steps: list[Callable[[], object]] = [pki.renew, pki.new_authority, pki.renew, pki.finish]
                for step in steps:
                    wanted = answers + 1
                    await until(lambda wanted=wanted: answers >= wanted, because="streams run meanwhile")  # type: ignore[misc]
                    step()
                    await reload()
                    assert await end_connections(mesh) >= 4  # two shards, the coordinator, this client
                changing = False

            async with asyncio.TaskGroup() as group:
                group.create_task(change())
                for index in range(STREAMS):
                    group.create_task(stream(index))
        assert answers >= 2 * STREAMS

    with LocalMesh(LocalOptions(model, shards=2, rows=8, context=64, http=False, secure=True)) as mesh:
        run(work(mesh))
