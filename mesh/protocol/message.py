"""The base of every JSON message, and the types that several messages share.

Frames (mesh/protocol/frame_codec.py) carry what is computed. JSON messages carry requests and reports about it; none of them carries a
token from shard to shard.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mesh.errors import MessageRejected
from mesh.protocol import subjects

__all__ = ["Epoch", "Message", "Natural", "Seconds", "SessionId", "Token", "TokenId"]

M = TypeVar("M", bound="Message")
Token = Annotated[str, Field(pattern=rf"^[A-Za-z0-9_-]{{1,{subjects.MAX_TOKEN}}}$")]
SessionId = Annotated[int, Field(ge=1, lt=2**63)]
Epoch = Annotated[int, Field(ge=0, lt=2**32)]
Natural = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Message(BaseModel):
    """The base class. `to_bytes` and `parse` are inverse. `parse` raises MessageRejected, which names the key that is wrong."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    limit_bytes: ClassVar[int] = 64 * 1024  # longer messages of this type are refused unread

    def to_bytes(self) -> bytes:
        return orjson.dumps(self.model_dump(mode="json"))

    @classmethod
    def parse(cls: type[M], data: bytes) -> M:
        if len(data) > cls.limit_bytes:
            raise MessageRejected(f"a {cls.__name__} of {len(data):,} bytes: at most {cls.limit_bytes:,} are read")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = min(error.errors(include_url=False, include_context=False), key=lambda problem: problem["type"] != "extra_forbidden")
            field = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
            if first["type"] == "json_invalid":
                message = "this is not JSON: send one JSON object"
            elif first["type"] == "extra_forbidden":
                message = f"is not a key here: there are {', '.join(cls.model_fields)}"
            raise MessageRejected(f"{field}: {message}" if field else message, field=field) from None
