"""`mesh trace` in front of a real mesh."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest
from running import Run
from serving import coordinator, shards

from mesh import cli
from mesh.client import AsyncMeshClient
from mesh.local.nats_server import NatsServer
from mesh.types import even_ranges

TOKENS = 12


def test_a_request_is_shown_by_any_of_its_ids(
    server: NatsServer, model: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def look() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 3)) as running,
            coordinator(server.url, model),
            AsyncMeshClient(server.url) as client,
        ):
            done = await client.generate(tokens=[5, 17, 33], max_tokens=TOKENS, ignore_eos=True)

            async def said(*arguments: str) -> tuple[int, str, str]:
                code = await asyncio.to_thread(cli.main, ["trace", "--nats", server.url, *arguments])
                out, error = capsys.readouterr()
                return code, out, error

            ids: list[tuple[str, ...]] = [(), ("--last",), ("--slow",), (done.request,), (f"chatcmpl-{done.request}",), (done.session,)]
            for arguments in ids:
                code, out, error = await said(*arguments)
                assert code == 0, error
                assert f"request {done.request} of {client._model}" in out and f"{TOKENS} tokens in" in out
                assert "\nBound by " in out
            code, out, _ = await said("--json", done.request)
            document = orjson.loads(out)
            assert document["bound"]["sentence"].startswith("Bound by ") and document["tokens"] == TOKENS
            assert [stage["shard"] for stage in document["legs"][0]["stages"]] == [shard.options.name for shard in running]
            names = {span["name"] for span in document["spans"]}
            assert {"queue", "open rows", "prefill chunk", "decode step", "frame", "stage", "compute"} <= names
            code, out, _ = await said(document["trace"])
            assert code == 0 and f"request {done.request}" in out and "  decode step 0" in out and "    compute" in out
            for format, key in (("perfetto", "traceEvents"), ("otlp-json", "resourceSpans")):
                code, out, error = await said(done.request, "--export", format, str(tmp_path / format))
                assert code == 0 and f"wrote {len(document['spans'])} spans" in out, error
                assert orjson.loads((tmp_path / format).read_bytes())[key]
            wrong: list[tuple[tuple[str, ...], str]] = [
                (("unknown",), "no coordinator knows request unknown"),
                (("a.b",), "is no id of a request"),
                (("--failed",), "no coordinator has a request that failed"),
                ((done.request, "--last"), "give either an ID or --last"),
                ((done.request, "--export", "jaeger", "x"), "the formats are otlp-json and perfetto"),
            ]
            for arguments, words in wrong:
                code, out, error = await said(*arguments)
                assert code == 2 and words in error and not out and error.count("\n") == 1

    run(look())


def test_without_a_coordinator_it_says_what_to_start(server: NatsServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", "--nats", server.url]) == 2
    assert "no coordinator answers: start a mesh with `mesh up`" in capsys.readouterr().err
