"""Durable batches: many requests that are kept in the mesh and answered once each."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mesh.protocol.failures import ErrorReply
from mesh.protocol.generation import Generate
from mesh.protocol.message import Label, Line, Message, Natural, Subject

__all__ = ["MAX_BATCH", "BatchId", "BatchItem", "BatchQuery", "BatchResults", "BatchState", "BatchStatus", "BatchSubmit", "DeadMessage"]

MAX_BATCH = 10_000
MAX_RESULTS = 1000
BatchId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,48}$")]
BatchState = Literal["queued", "running", "done", "failed", "cancelled"]


class BatchSubmit(Message):
    """Requests to be answered later, whichever processes die meanwhile. `id`: the caller's own name for the batch."""

    limit_bytes: ClassVar[int] = 8 * 1024 * 1024
    null_is_absent: ClassVar[bool] = True

    requests: Annotated[tuple[Generate, ...], Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)]
    id: BatchId | None = None


class BatchQuery(Message):
    """Ask for a batch. Where results are asked for: those from `offset` on, `limit` at most."""

    id: BatchId
    offset: Natural = 0
    limit: Annotated[int, Field(ge=1, le=MAX_RESULTS)] = 100


class BatchStatus(Message):
    """`total` = waiting + `running` + `done` + `failed` + `cancelled`. `state`: done when all have ended, failed if all have failed,
    cancelled from the moment when the batch was taken back before all had ended. `digest`: of the
    requests. `complete`: all of them are in the queue."""

    id: BatchId
    model: Label
    state: BatchState
    total: Natural
    running: Natural
    done: Natural
    failed: Natural
    cancelled: Natural = 0
    submitted_unix_s: float
    digest: Label = ""
    complete: bool = True


class BatchItem(Message):
    """A request of a batch that has ended. `answer`: the last document of its generation. `error`: why it `failed`, or was cancelled."""

    limit_bytes: ClassVar[int] = 8 * 1024 * 1024

    index: Natural
    state: Literal["done", "failed", "cancelled"]
    answer: Annotated[dict[Label, Any], Field(max_length=64)] | None = None
    error: ErrorReply | None = None


class DeadMessage(Message):
    """A message of a queue that no coordinator could handle: where it was, why it was set aside, how large it was, and when."""

    subject: Subject
    reason: Line
    size_bytes: Natural
    at_unix_s: float


class BatchResults(Message):
    """`items`: those of the requested results that have ended. `next`: the offset of the next results, None at the end."""

    limit_bytes: ClassVar[int] = 8 * 1024 * 1024

    id: BatchId
    items: Annotated[tuple[BatchItem, ...], Field(max_length=MAX_RESULTS, fail_fast=True)]
    next: Natural | None
