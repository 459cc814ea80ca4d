"""What each subject has used, at all gateways: an admin sees every subject, others see themselves."""

from __future__ import annotations

from typing import Annotated

import orjson
from fastapi import Depends, Query
from starlette.requests import Request
from starlette.responses import Response

from mesh.errors import Denied
from mesh.gateway.bodies import ResponseBody
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.guard import caller_of, guarded
from mesh.http.tokens import MAX_SUBJECT

__all__ = ["usage"]

usage = guarded("", tags=["usage"])


class UsageOfSubject(ResponseBody):
    """What a subject has used since the gateways started. requests: generations, without those of batches that are kept; of these
    `batch_requests`, for which `batch_tokens` were set aside. refused: calls that a limit has refused. sessions: those that run now."""

    subject: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    batch_requests: int
    batch_tokens: int
    refused: int
    sessions: int


class UsageResponse(ResponseBody):
    """gateways: how many have answered. since_unix_s: when the first of them started. omitted: subjects that are not shown."""

    gateways: int
    since_unix_s: float | None
    omitted: int
    subjects: list[UsageOfSubject]


@usage.get("/api/v1/usage", response_model=UsageResponse)
async def read(
    request: Request,
    subject: Annotated[str | None, Query(max_length=MAX_SUBJECT)] = None,
    gateway: Gateway = Depends(gateway_of),  # noqa: B008
) -> Response:
    """Tokens, requests and running generations of each subject, summed over all gateways. Without the scope admin: of the caller alone."""
    caller = caller_of(request)
    if not caller.may("admin"):
        if subject not in (None, caller.name):
            raise Denied("this token may read its own usage alone: it needs the scope admin for that of others")
        subject = caller.name
    found = await gateway.client.usage(subject)
    return Response(orjson.dumps(found.document()), media_type="application/json")
