"""Batches over HTTP that are kept in the mesh."""

from __future__ import annotations

from typing import Any

import httpx
from edge_tools import bearer, edge, token, verifier
from oracle import Oracle
from waiting import until_true

from mesh.local.mesh import LocalMesh


def until_done(http: httpx.Client, location: str, **options: Any) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        found = http.get(location, **options).json()
        return found if found["state"] in ("done", "failed") else None

    return until_true(ended, because="a gateway says how a batch is when it is asked")


def test_a_batch_that_is_kept_is_answered_when_it_is_asked_for(mesh: LocalMesh, oracle: Oracle) -> None:
    prompts = [[number, 5, 9] for number in range(12)]
    requests: list[dict[str, Any]] = [{"tokens": prompt, "max_tokens": 6, "ignore_eos": True} for prompt in prompts]
    with edge(mesh.url) as url, httpx.Client(base_url=url, timeout=60) as http:
        accepted = http.post("/api/v1/batch", json={"requests": [*requests, {"tokens": [96]}], "async": True})
        job = accepted.json()
        assert accepted.status_code == 202 and job["total"] == 13 and job["model"] == "tiny"
        assert accepted.headers["location"] == f"/api/v1/batch/{job['id']}"
        with edge(mesh.url) as another:  # any gateway will do
            done = until_done(http, f"{another}{accepted.headers['location']}")
        assert (done["done"], done["failed"], done["running"], done["next"]) == (12, 1, 0, None)
        assert [result["index"] for result in done["results"]] == list(range(13))
        for prompt, result in zip(prompts, done["results"], strict=False):
            assert result["result"]["tokens"] == oracle.greedy(prompt, 6)
        assert "not in the vocabulary" in done["results"][12]["error"]["message"]
        part = http.get(accepted.headers["location"], params={"offset": 4, "limit": 3}).json()
        assert [result["index"] for result in part["results"]] == [4, 5, 6] and part["next"] == 7
        unknown = http.get("/api/v1/batch/nothing")
        assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "batch_not_found"
        wrong = http.post("/api/v1/batch", json={"requests": [{"prompt": "a", "model": "tiny"}, {}], "async": True})
        assert wrong.json()["error"]["field"] == "requests.1.prompt"


def test_a_batch_is_its_submitters(mesh: LocalMesh) -> None:
    with edge(mesh.url, verifier=verifier()) as url, httpx.Client(base_url=url, timeout=60) as http:
        mine, admin = bearer(token("batch")), bearer(token("admin"))
        other = bearer(token("batch", subject="another"))
        body = {"requests": [{"tokens": [1], "max_tokens": 2}], "async": True}
        assert http.post("/api/v1/batch", json=body).status_code == 401
        location = http.post("/api/v1/batch", json=body, headers=mine).headers["location"]
        assert until_done(http, location, headers=mine)["done"] == 1
        assert http.get(location, headers=admin).status_code == 200
        assert http.get(location, headers=other).status_code == 404
        assert http.get(location, headers=bearer(token("generate"))).status_code == 403


def test_what_a_token_may_not_have_is_not_queued(mesh: LocalMesh) -> None:
    """A call is refused for good where a minute never has so much, and until later where it has not so much left; nothing is lent."""
    with edge(mesh.url, verifier=verifier()) as url, httpx.Client(base_url=url, timeout=60) as http:
        poor = bearer(token("batch", "generate", requests_per_minute=2, tokens_per_minute=50))
        item: dict[str, Any] = {"tokens": [1], "max_tokens": 10, "ignore_eos": True}

        def ask(path: str, **body: Any) -> httpx.Response:
            return http.post(path, json=body, headers=poor)

        for requests, field in (([{**item, "max_tokens": 3_000_000}] * 2, "max_tokens"), ([item] * 3, "requests")):
            for kept in (True, False):
                refused = ask("/api/v1/batch", requests=requests, **{"async": kept})
                assert (refused.status_code, refused.json()["error"]["field"]) == (400, field), refused.text
        assert ask("/api/v1/inference", **{**item, "max_tokens": 51}).status_code == 400
        many = ask("/v1/completions", model="tiny", prompt=[1], n=3, max_tokens=1)
        assert many.status_code == 400 and "3 requests" in many.text
        assert ask("/api/v1/batch", requests=[item] * 2, **{"async": True}).status_code == 202
        busy = ask("/api/v1/inference", **item)
        assert busy.status_code == 429 and int(busy.headers["retry-after"]) >= 1
        streamed = ask("/api/v1/inference", **item, stream=True)
        assert streamed.status_code == 429


def test_a_batch_can_be_taken_back(mesh: LocalMesh) -> None:
    with edge(mesh.url, verifier=verifier()) as url, httpx.Client(base_url=url, timeout=60) as http:
        mine, other = bearer(token("batch")), bearer(token("batch", subject="another"))
        body = {"requests": [{"tokens": [1], "max_tokens": 60, "ignore_eos": True}] * 200, "async": True}
        location = http.post("/api/v1/batch", json=body, headers=mine).headers["location"]
        assert http.delete(location, headers=other).status_code == 404
        assert http.delete("/api/v1/batch/nothing", headers=mine).status_code == 404
        cancelled = http.delete(location, headers=mine)
        assert cancelled.status_code == 200
        job = cancelled.json()
        assert job["state"] == "cancelled" and job["cancelled"] > 0 and job["done"] + job["cancelled"] == 200
        last = http.get(location, params={"offset": 199}, headers=mine).json()["results"]
        assert [(result["index"], result["error"]["code"]) for result in last] == [(199, "cancelled")]
