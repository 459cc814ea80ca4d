"""The base of every JSON message, and the types that several messages share.

Frames (mesh/protocol/frame_codec.py) carry what is computed. JSON messages carry requests and reports about it; none of them carries a
token from shard to shard.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, TypeVar

import orjson
import pydantic_core
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mesh.errors import MessageRejected
from mesh.protocol import documents, subjects

__all__ = [
    "MAX_INT",
    "MAX_LINE",
    "MAX_STOPS",
    "MAX_STOP_CHARACTERS",
    "MAX_TOKENS",
    "AnswerEpoch",
    "Counts",
    "Epoch",
    "Integer",
    "Label",
    "Line",
    "Message",
    "Natural",
    "Positive",
    "Seconds",
    "SessionId",
    "Subject",
    "Token",
    "TokenId",
    "TokenIds",
]

MAX_INT: Final = 2**63 - 1
"""The largest integer of a message: JSON libraries and the numbers of a frame hold 64 bits."""
MAX_TOKENS: Final = 1_000_000
"""The most token ids in one message; the context is a tighter bound, which the coordinator knows."""
MAX_STOPS: Final = 16
MAX_STOP_CHARACTERS: Final = 1000
MAX_LINE: Final = 4096
"""The longest text for people, such as an error."""

M = TypeVar("M", bound="Message")
Token = Annotated[str, Field(pattern=rf"^[A-Za-z0-9_-]{{1,{subjects.MAX_TOKEN}}}$")]
SessionId = Annotated[int, Field(ge=1, lt=2**63)]
Epoch = Annotated[int, Field(ge=0, lt=2**32)]
"""Of a session's route."""
AnswerEpoch = Annotated[int, Field(ge=0, lt=2**53)]
"""Of the documents of an answer: milliseconds since 1970 when its coordinator began with it, or more."""
Integer = Annotated[int, Field(ge=-MAX_INT - 1, le=MAX_INT)]
Natural = Annotated[int, Field(ge=0, le=MAX_INT)]
Positive = Annotated[int, Field(ge=1, le=MAX_INT)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[tuple[TokenId, ...], Field(max_length=MAX_TOKENS, fail_fast=True)]
Label = Annotated[str, Field(max_length=256)]
Line = Annotated[str, Field(max_length=MAX_LINE)]
Subject = Annotated[str, Field(max_length=4096)]  # a server takes no longer line
Counts = Annotated[dict[Label, Natural], Field(max_length=1024)]


class Message(BaseModel):
    """The base class. `to_bytes` and `parse` are inverse. `parse` raises MessageRejected, which names the key that is wrong,
    or BadRequest for sampling parameters out of their range.

    Every integer, text, list and dict of a message has a bound, and every list ends at its first wrong entry
    (tests/unit/protocol/test_bounds.py).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    limit_bytes: ClassVar[int] = 64 * 1024  # longer messages of this type are refused unread
    null_is_absent: ClassVar[bool] = False  # of what clients write: null stands for a key that is left out

    def to_bytes(self) -> bytes:
        return orjson.dumps(self.model_dump(mode="json"))

    @classmethod
    def parse(cls: type[M], data: bytes, *, limit_bytes: int | None = None) -> M:
        """The message in `data`. `limit_bytes`: refuse more than this unread, where the reader knows a tighter bound than the type's."""
        limit = cls.limit_bytes if limit_bytes is None else min(limit_bytes, cls.limit_bytes)
        document = documents.read(cls, data, limit_bytes=limit)
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = error
        if cls.null_is_absent and b"null" in data:
            try:
                return cls.model_validate_json(pydantic_core.to_json(document))
            except ValidationError as error:
                first = error
        field, _, message = documents.problem(first)
        raise MessageRejected(f"{field}: {message}" if field else message, field=field) from None
