"""The lines of a file of requests, and the lines of results: the mesh's own form, and the one of OpenAI's batches.

own       "a prompt", or {"prompt" | "messages" | "tokens", "max_tokens", "temperature" ...}
OpenAI's  {"custom_id", "method": "POST", "url": "/v1/chat/completions" | "/v1/completions", "body": {...}}
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from mesh.errors import BadRequest, Cancelled, MeshError

if TYPE_CHECKING:
    from mesh.client import BatchResult, BatchStatus

__all__ = ["RequestLine", "at_its_line", "read_lines", "result_line"]

_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_PLAIN: Final = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "max_tokens")
_IGNORED: Final = ("model", "user", "metadata", "store", "service_tier", "parallel_tool_calls", "prompt_cache_key", "safety_identifier")
_OFF: Final = {"stream": False, "n": 1, "logprobs": False, "echo": False, "tools": [], "logit_bias": {}}
"""Keys that may be there with this value, which changes nothing."""
_AT: Final = re.compile(r"^requests\.(\d+)[.:]? ?")


@dataclass(frozen=True)
class RequestLine:
    """`number`: of the line, from 1. `url`: None for the mesh's own form."""

    number: int
    request: str | dict[str, Any]
    custom_id: str | None = None
    url: str | None = None


def read_lines(name: str) -> list[RequestLine]:
    """The requests of a file, or of standard input for `-`. BadRequest names the line that is wrong."""
    try:
        text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{name}: {error}: give a file with one request a line, or - for standard input", field="file") from None
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                lines.append(_line(number, line))
            except ValueError as error:
                raise BadRequest(f"{name}, line {number}: {error}", field="file") from None
    named = Counter(line.custom_id for line in lines)
    for line in lines:
        if line.custom_id is not None and named[line.custom_id] > 1:
            raise BadRequest(f"{name}, line {line.number}: the custom_id {line.custom_id} is that of another line too", field="file")
    return lines


def _line(number: int, text: str) -> RequestLine:
    try:
        said = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{error}: give a JSON string or object") from None
    if not isinstance(said, (str, dict)):
        raise ValueError("neither a JSON string nor an object")
    if isinstance(said, str) or "body" not in said:
        return RequestLine(number, said)
    url, body = said.get("url", _CHAT), said["body"]
    if url not in (_CHAT, _TEXT) or said.get("method", "POST") != "POST":
        raise ValueError(f"{said.get('method', 'POST')} {url}: give POST {_CHAT} or {_TEXT}")
    if not isinstance(body, dict):
        raise ValueError("body is no object")
    return RequestLine(number, _own_form(body, url), str(said.get("custom_id", f"request-{number}")), url)


def _own_form(body: dict[str, Any], url: str) -> dict[str, Any]:
    """The request of an OpenAI body in the mesh's own form. ValueError: it asks for what a batch does not do."""
    given = {name: value for name, value in body.items() if value is not None and name not in _IGNORED}
    request: dict[str, Any] = {"temperature": 1.0, **{name: given.pop(name) for name in _PLAIN if name in given}}
    if "max_completion_tokens" in given:
        request["max_tokens"] = given.pop("max_completion_tokens")
    if "stop" in given:
        stop = given.pop("stop")
        request["stop"] = [stop] if isinstance(stop, str) else stop
    if url == _CHAT:
        if given.pop("logprobs", False):
            request["logprobs"] = given.pop("top_logprobs", 0)
        request["messages"] = [_message(message) for message in given.pop("messages", [])]
    else:
        if "logprobs" in given:
            request["logprobs"] = given.pop("logprobs")
        request |= {"prompt": given.pop("prompt", ""), "raw": True}
        request.setdefault("max_tokens", 16)
    for name, value in given.items():
        if name not in _OFF or value != _OFF[name]:
            raise ValueError(f"body.{name}: a line of a batch cannot have it: leave it out")
    return request


def _message(message: Any) -> Any:
    """A message whose content is a text."""
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise ValueError("body.messages: a content has a part that is no text: leave it out")
        content = "".join(str(part.get("text", "")) for part in content)
    role = "system" if message.get("role") == "developer" else message.get("role")
    return {"role": role, "content": content or ""}


def at_its_line(error: MeshError, name: str, lines: Sequence[RequestLine]) -> MeshError:
    """An error about a request of a batch, with the line of the file instead of the request's index."""
    found = _AT.match(str(error))
    if found is None or int(found[1]) >= len(lines):
        return error
    return BadRequest(f"{name}, line {lines[int(found[1])].number}: {_AT.sub('', str(error))}", field="file")


def result_line(result: BatchResult, line: RequestLine | None, batch: BatchStatus) -> dict[str, Any]:
    """A result as one object: in OpenAI's form where its request was in it, else in the mesh's own."""
    if line is not None and line.url is not None:
        return _openai_result(result, line, batch)
    failed = "cancelled" if isinstance(result.error, Cancelled) else "failed"
    document: dict[str, Any] = {"index": result.index, "state": "done" if result.error is None else failed}
    if result.completion is not None:
        document |= {name: value for name, value in result.completion.document().items() if name not in ("request", "timing")}
    if result.error is not None:
        document |= {"error": str(result.error), "code": result.error.code}
    return document


def _openai_result(result: BatchResult, line: RequestLine, batch: BatchStatus) -> dict[str, Any]:
    from mesh.client.openai_shapes import ChatShape, TextShape

    error = None if result.error is None else {"code": result.error.code, "message": str(result.error)}
    response = None
    if result.completion is not None:
        shape = (ChatShape if line.url == _CHAT else TextShape)(batch.model, int(batch.submitted_unix_s), choices=1, usage_is_null=False)
        shape.name(result.completion.request)
        response = {"status_code": 200, "request_id": result.completion.request, "body": shape.whole([result.completion])}
    return {"id": f"batch_req_{result.index}", "custom_id": line.custom_id, "response": response, "error": error}
