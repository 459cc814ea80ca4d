"""Several tenants at several gateways: quotas hold at all of them together, usage is counted, and nobody reaches another's work."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from edge_tools import SECRET, bearer, events, token
from gateway_process import Gateway
from waiting import until_true

from mesh.local.mesh import LocalMesh

SHORT: dict[str, Any] = {"tokens": [5], "max_tokens": 3, "ignore_eos": True}
LONG: dict[str, Any] = {"tokens": [5], "max_tokens": 50, "ignore_eos": True, "stream": True}
MESH = [sys.executable, "-m", "mesh.cli"]


def mesh_command(*arguments: str) -> str:
    return subprocess.run([*MESH, *arguments], capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text("# keys\n")
    return path


@pytest.fixture(scope="module")
def gateways(mesh: LocalMesh, keys_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, httpx.Client]]:
    """Two processes."""
    content = {
        "gateway": {"listen_port": 0},
        "authentication": {
            "enabled": True,
            "secret_key": SECRET.decode(),
            "api_keys_file": str(keys_file),
            "subjects": {"small-batches": {"requests_per_batch": 1}},
        },
    }
    with (
        Gateway(tmp_path_factory.mktemp("one"), mesh.url, content) as one,
        Gateway(tmp_path_factory.mktemp("two"), mesh.url, content) as two,
        httpx.Client(base_url=one.url(), timeout=60) as first,
        httpx.Client(base_url=two.url(), timeout=60) as second,
    ):
        yield first, second


def ask(gateway: httpx.Client, text: str, body: dict[str, Any] = SHORT) -> int:
    return gateway.post("/api/v1/inference", json=body, headers=bearer(text)).status_code


def ask_briefly(gateway: httpx.Client, text: str) -> int:
    """0 where it was admitted, because then no answer comes."""
    try:
        return gateway.post("/api/v1/inference", json=SHORT, headers=bearer(text), timeout=0.3).status_code
    except httpx.TimeoutException:
        return 0


def sessions(gateway: httpx.Client, subject: str) -> dict[str, Any] | None:
    found = gateway.get("/api/v1/usage", params={"subject": subject}, headers=bearer(token("admin", subject="root"))).json()
    return next(iter(found["subjects"]), None)


def test_requests_a_minute_hold_at_two_gateways_together(gateways: tuple[httpx.Client, httpx.Client]) -> None:
    """What one gateway admitted is refused at the other, and a burst at both may pass the quota once."""
    first, second = gateways
    text = token("generate", subject="minute", requests_per_minute=4)
    assert [ask(first, text) for _ in range(4)] == [200] * 4
    assert until_true(lambda: ask(second, text) == 429, because="the gateways tell each other a little later")
    burst = token("generate", subject="burst", requests_per_minute=5)
    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda number: ask(gateways[number % 2], burst), range(20)))
    assert 5 <= answers.count(200) <= 10 and set(answers) == {200, 429}
    for _ in range(3):
        assert ask(first, burst) == ask(second, burst) == 429  # a debt is paid before anything is admitted


def test_tokens_a_minute_hold_at_two_gateways_together(gateways: tuple[httpx.Client, httpx.Client]) -> None:
    first, second = gateways
    text = token("generate", subject="tokens", tokens_per_minute=40)
    assert ask(first, text, {**SHORT, "max_tokens": 30}) == 200
    assert until_true(lambda: ask(second, text, {**SHORT, "max_tokens": 20}) == 429, because="the gateways tell each other a little later")


def test_sessions_at_once_hold_at_two_gateways_together(gateways: tuple[httpx.Client, httpx.Client], mesh: LocalMesh) -> None:
    """The generation does not end while a shard stands still."""
    first, second = gateways
    text = token("generate", subject="sessions", concurrent_sessions=1)
    shard = next(process for name, process in mesh.processes.items() if "shard" in name)
    with ThreadPoolExecutor(1) as pool:
        shard.send_signal(signal.SIGSTOP)
        try:
            running = pool.submit(ask, first, text)
            until_true(lambda: (sessions(second, "sessions") or {}).get("sessions") == 1, because="the gateway is asked for it")
            until_true(lambda: ask_briefly(second, text) == 429, because="the gateways tell each other a little later")
            assert ask_briefly(first, text) == 429
        finally:
            shard.send_signal(signal.SIGCONT)
        assert running.result(60) == 200
    until_true(lambda: ask(second, text) == 200, because="the gateways tell each other a little later")
    until_true(lambda: ask(first, text) == 200, because="the gateways tell each other a little later")


def test_a_batch_is_bounded_by_the_quota_of_its_subject(gateways: tuple[httpx.Client, httpx.Client]) -> None:
    first, _ = gateways
    for kept in (False, True):
        for subject, status in (("small-batches", {400}), ("others", {200, 202})):
            sent = first.post(
                "/api/v1/batch", json={"requests": [SHORT, SHORT], "async": kept}, headers=bearer(token("batch", subject=subject))
            )
            assert sent.status_code in status


def test_an_api_key_works_at_once_and_not_after_its_entry_is_gone(gateways: tuple[httpx.Client, httpx.Client], keys_file: Path) -> None:
    first, second = gateways
    before = keys_file.read_text()
    key = mesh_command("token", "key", "--subject", "by-key", "--keys-file", str(keys_file), "--requests-per-minute", "60")
    assert keys_file.read_text().startswith(before) and key not in keys_file.read_text()
    until_true(lambda: ask(first, key) == ask(second, key) == 200, because="the file is looked at once a second")
    assert first.post("/api/v1/batch", json={"requests": [SHORT]}, headers=bearer(key)).status_code == 403
    keys_file.write_text(before)
    until_true(lambda: ask(first, key) == ask(second, key) == 401, because="the file is looked at once a second")


def test_usage_is_counted_over_all_gateways_and_others_do_not_see_it(gateways: tuple[httpx.Client, httpx.Client], mesh: LocalMesh) -> None:
    first, second = gateways
    mine, other = token("generate", subject="metered"), token("batch", subject="curious")
    assert ask(first, mine) == ask(second, mine) == 200
    with second.stream("POST", "/api/v1/inference", json={**LONG, "max_tokens": 5}, headers=bearer(mine)) as answer:
        list(events(answer))
    for where, text in ((first, mine), (second, mine), (first, token("admin", subject="root"))):
        found = where.get("/api/v1/usage", params={"subject": "metered"}, headers=bearer(text)).json()
        (used,) = found["subjects"]
        assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (3, 3, 3 + 3 + 5)
        assert found["gateways"] >= 2
    assert first.get("/api/v1/usage", params={"subject": "metered"}, headers=bearer(other)).status_code == 403
    assert "metered" not in first.get("/api/v1/usage", headers=bearer(other)).text
    assert first.get("/api/v1/usage").status_code == 401
    seen = json.loads(mesh_command("usage", "--json", "--nats", mesh.url))
    assert {each["subject"]: each["requests"] for each in seen["subjects"]}["metered"] == 3
    assert "metered" in mesh_command("usage", "--subject", "metered", "--nats", mesh.url)
    metrics = first.get("/metrics", headers=bearer(token("admin", subject="root"))).text
    assert 'mesh_gateway_tokens_total{kind="completion"}' in metrics and "metered" not in metrics


def test_another_subject_neither_resumes_a_stream_nor_reaches_a_batch(gateways: tuple[httpx.Client, httpx.Client]) -> None:
    """It knows the ids and the bodies. A resumed stream of another subject is a generation of its own."""
    first, second = gateways
    mine, other = (bearer(token("batch", "generate", subject=subject)) for subject in ("owner", "thief"))
    body = {**LONG, "temperature": 1.0, "max_tokens": 30}

    def stream(where: httpx.Client, headers: dict[str, str], most: int = 100) -> tuple[list[int], str]:
        got: list[int] = []
        last = ""
        with where.stream("POST", "/api/v1/inference", json=body, headers=headers) as answer:
            assert answer.status_code == 200
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    last = line.removeprefix("id: ")
                elif line.startswith("data: ") and not (document := json.loads(line.removeprefix("data: ")))["done"]:
                    got.append(document["token"])
                    if len(got) == most:
                        break
        return got, last

    begun, id = stream(first, mine, 10)
    stolen, _ = stream(second, {**other, "last-event-id": id})
    rest, _ = stream(second, {**mine, "last-event-id": id})
    again, _ = stream(first, {**mine, "last-event-id": id.split(".")[0] + ".0"})
    assert again == begun + rest and len(again) == 30
    assert stolen != rest
    batch = first.post("/api/v1/batch", json={"requests": [SHORT], "async": True}, headers=mine).json()["id"]
    for call in (second.get, second.delete):
        assert call(f"/api/v1/batch/{batch}", headers=other).status_code == 404
    assert second.get(f"/api/v1/batch/{batch}", headers=mine).json()["state"] != "cancelled"
