"""What the documents of both HTTP APIs have in common: how strict a request is, what a response is, and the count of tokens."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

__all__ = ["RequestBody", "ResponseBody", "Usage"]


class RequestBody(BaseModel):
    """Strict: a text is not taken for a number, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ResponseBody(BaseModel):
    model_config = ConfigDict(frozen=True)


class Usage(ResponseBody):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
