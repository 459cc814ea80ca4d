"""/openapi.json is true: right and wrong requests are generated from it, and every answer is compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import hypothesis
import pytest
import schemathesis
from edge_tools import edge
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from mesh.local.mesh import LocalMesh

EXAMPLES = 15
OPERATIONS = [
    ("GET", "/api/v1/health"),
    ("GET", "/api/v1/health/live"),
    ("GET", "/api/v1/health/ready"),
    ("GET", "/api/v1/stats"),
    ("GET", "/api/v1/usage"),
    ("POST", "/api/v1/batch"),
    ("GET", "/api/v1/batch/{id}"),
    ("DELETE", "/api/v1/batch/{id}"),
    ("POST", "/api/v1/inference"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/responses/{id}"),
    ("DELETE", "/v1/responses/{id}"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/messages/count_tokens"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]


@pytest.fixture(scope="module")
def url(mesh: LocalMesh) -> Iterator[str]:
    with edge(mesh.url, limits={"default_max_tokens": 4}) as running:
        yield running


@pytest.fixture(scope="module")
def api(url: str) -> Any:
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["right", "wrong"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS, ids=lambda part: part.strip("/").replace("/", "."))
def test_every_answer_is_as_described(api: Any, method: str, path: str, mode: GenerationMode) -> None:
    """No 5xx, no status, header or body that is not described. What a schema cannot say (exactly one of three keys, a model that
    is there, a prompt that fits) may be refused though the schema allows it."""
    operation = api[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
        pytest.skip("there is nothing to get wrong")

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Any) -> None:
        if isinstance(case.body, dict):
            _keep_short(case.body)
        case.call_and_validate(excluded_checks=[positive_data_acceptance], timeout=60)

    ask()


def _keep_short(body: dict[str, Any]) -> None:
    """A small mesh answers these: no generation needs to be long."""
    inner = body.get("requests")
    for part in [body, *(inner if isinstance(inner, list) else [])]:
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(part, dict) and isinstance(part.get(name), int) and part[name] > 8:
                part[name] = 8


def test_what_is_tried_is_all_there_is(url: str) -> None:
    paths = httpx.get(f"{url}/openapi.json").json()["paths"]
    assert sorted((method.upper(), path) for path, operations in paths.items() for method in operations) == sorted(OPERATIONS)
