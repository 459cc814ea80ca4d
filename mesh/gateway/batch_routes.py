"""Batches: answered while the caller waits, or kept in the mesh until the caller asks for the results.

A batch that is kept belongs to its submitter. Where tokens are required, its id begins with a mark of the submitter, and other callers
get the answer that there is no such batch.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from typing import Annotated, Any

import orjson
from fastapi import Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from mesh.client import BatchStatus, Completion, Usage
from mesh.errors import BadRequest, MeshError
from mesh.gateway.auth import Caller
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.errors import HttpError, error_body
from mesh.gateway.events import until_gone
from mesh.gateway.generation import check_length, cost_of, patiently, paying
from mesh.gateway.guard import caller_of, guarded
from mesh.gateway.native import answer_document, check_input
from mesh.gateway.schema import BatchJob, BatchProgress, BatchRequest, BatchResponse, ErrorResponse

__all__ = ["batch"]

batch = guarded("batch", tags=["inference"])

_KEPT_MAX_TOKENS = 128
_ACCEPTED: dict[int | str, dict[str, Any]] = {202: {"model": BatchJob, "description": "Kept; its results are at Location"}}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse, "description": "There is no such batch"}}


@batch.post("/api/v1/batch", response_model=BatchResponse, responses=_ACCEPTED)
async def submit(body: BatchRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """Generate for many requests. Each has its result or its error, in its place. With `async` the answer is an id, at once, and the
    batch survives the end of any process of the mesh."""
    names = {}
    for item in body.requests:
        if item.model not in names:
            names[item.model] = await gateway.models.resolve(item.model)
    for index, item in enumerate(body.requests):
        check_input(item, f"requests.{index}.")
    caller = caller_of(request)
    caller.check_batch(len(body.requests))
    if body.kept:
        status = await _submit(gateway, caller, body, set(names.values()))
        return _json(_job(status), 202, {"location": f"/api/v1/batch/{status.id}"})
    return await _answer_now(gateway, caller, body, [names[item.model] for item in body.requests], request)


@batch.get("/api/v1/batch/{id}", response_model=BatchProgress, responses=_UNKNOWN)
async def progress(
    id: str,
    request: Request,
    offset: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    gateway: Gateway = Depends(gateway_of),  # noqa: B008
) -> Response:
    """The progress of a batch, and the results of those requests that have ended, among at most `limit` from `offset` on."""
    _require_own(id, caller_of(request))
    try:
        status = await gateway.client.batch_status(id)
        ended = await gateway.client.batch_results(id, offset=offset, limit=limit)
    except BadRequest:
        raise _unknown(id) from None
    results: list[dict[str, Any]] = []
    for item in ended:
        if item.completion is not None:
            results.append({"index": item.index, "result": answer_document(item.completion, status.model)})
        elif item.error is not None:
            results.append({"index": item.index, "error": error_body(item.error)})
    following = offset + limit
    return _json({**_job(status), "results": results, "next": following if following < status.total else None})


@batch.delete("/api/v1/batch/{id}", response_model=BatchJob, responses=_UNKNOWN)
async def cancel(id: str, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """Take a batch back: what has not begun is not begun, what runs is cancelled, what has ended keeps its result."""
    _require_own(id, caller_of(request))
    try:
        return _json(_job(await gateway.client.cancel_batch(id)))
    except BadRequest:
        raise _unknown(id) from None


def _unknown(id: str) -> HttpError:
    return HttpError(f"there is no batch {id[:64]}", status=404, code="batch_not_found")


def _require_own(id: str, caller: Caller) -> None:
    if not id.startswith(_mark(caller)):
        raise _unknown(id)


async def _submit(gateway: Gateway, caller: Caller, body: BatchRequest, models: set[str]) -> BatchStatus:
    if len(models) > 1:
        raise BadRequest(f"requests are for {', '.join(sorted(models))}: a batch that is kept is for one model", field="requests")
    model, made = models.pop(), []
    for item in body.requests:
        fields = {**item.generate_fields(), "cache_salt": caller.cache_salt}
        fields.setdefault("max_tokens", _KEPT_MAX_TOKENS)
        check_length(fields, gateway.settings.limits, gateway.models.max_prompt_characters(model))
        made.append(fields)
    cost = cost_of(made, gateway.settings.limits)
    caller.charge(cost.tokens, requests=cost.requests, prompt=cost.prompt)
    status = await gateway.client.submit_batch(made, id=_mark(caller) + secrets.token_hex(12), model=model)
    caller.used_batch(cost.requests, cost.tokens + cost.prompt)
    return status


async def _answer_now(gateway: Gateway, caller: Caller, body: BatchRequest, models: list[str], request: Request) -> Response:
    limits = gateway.settings.limits
    if len(body.requests) > limits.max_batch:
        raise BadRequest(
            f"requests has {len(body.requests)} entries: at most {limits.max_batch} are answered at once, send more with async: true",
            field="requests",
        )
    at_once = min(len(body.requests), limits.batch_concurrency, caller.quota.concurrent_sessions or limits.batch_concurrency)
    gate = asyncio.Semaphore(at_once)
    with paying(caller, cost_of([item.generate_fields() for item in body.requests], limits), at_once=at_once) as bill:

        async def one(index: int) -> Completion | MeshError:
            async with gate:
                try:
                    return await patiently(gateway, bill, models[index], body.requests[index].generate_fields())
                except MeshError as error:
                    return error

        answers = await until_gone(request.receive, _all([one(index) for index in range(len(models))]))
    results = []
    used: list[Usage] = []
    for index, answer in enumerate(answers):
        if isinstance(answer, MeshError):
            results.append({"index": index, "error": error_body(answer)})
            continue
        results.append({"index": index, "result": answer_document(answer, models[index])})
        used.append(answer.usage)
    return _json({"results": results, "usage": Usage.total(used).document()})


async def _all(work: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*work))


def _mark(caller: Caller) -> str:
    """The beginning of the ids of a caller's batches. Admins see all batches; so does every caller where no token is required."""
    if caller.claims is None or caller.may("admin"):
        return ""
    return hashlib.sha256(caller.name.encode()).hexdigest()[:12] + "-"


def _job(status: BatchStatus) -> dict[str, Any]:
    return status.model_dump(mode="json", exclude={"digest", "complete"})


def _json(document: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(document), status, headers, media_type="application/json")
