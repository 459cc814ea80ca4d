"""What gateways say of the subjects that use the mesh: spending that all gateways count, and usage that operators read."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final

from pydantic import Field

from mesh.protocol.message import Integer, Label, Message, Natural, Positive, Token

__all__ = ["MAX_SPENDING", "MAX_SUBJECTS", "Spending", "SubjectUsage", "UsageQuery", "UsageReport", "UsageSpent"]

MAX_SPENDING: Final = 256
MAX_SUBJECTS: Final = 2000


class Spending(Message):
    """What a subject has spent at a gateway since the gateway's last message: negative where more was given back than taken. The limits
    are those that it was measured by; None: the subject has no such limit. sessions: those that run at the gateway now."""

    subject: Label
    requests: Integer = 0
    tokens: Integer = 0
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    sessions: Natural = 0


class UsageSpent(Message):
    """A gateway tells the others what its callers have spent."""

    limit_bytes: ClassVar[int] = 512 * 1024

    gateway: Token
    spending: Annotated[tuple[Spending, ...], Field(max_length=MAX_SPENDING, fail_fast=True)]


class UsageQuery(Message):
    """Ask every gateway for the usage of one subject, or of all."""

    subject: Label | None = None


class SubjectUsage(Message):
    """What a subject has used at a gateway since the gateway started. requests: generations, without those of batches that are kept;
    of these `batch_requests`, for which `batch_tokens` were set aside. refused: calls that a limit has refused. sessions: those that
    run now."""

    subject: Label
    requests: Natural = 0
    prompt_tokens: Natural = 0
    completion_tokens: Natural = 0
    batch_requests: Natural = 0
    batch_tokens: Natural = 0
    refused: Natural = 0
    sessions: Natural = 0


class UsageReport(Message):
    """The usage at one gateway; of too many subjects, those with the most tokens, and `omitted` others."""

    limit_bytes: ClassVar[int] = 2 * 1024 * 1024

    gateway: Token
    since_unix_s: float
    subjects: Annotated[tuple[SubjectUsage, ...], Field(max_length=MAX_SUBJECTS, fail_fast=True)] = ()
    omitted: Natural = 0
