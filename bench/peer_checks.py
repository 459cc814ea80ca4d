"""What an answer of each API must be, whatever its words: used by the cases of several suites (peer_cases.py)."""

from __future__ import annotations

import base64
import math
import struct
from typing import Any

from peer_asking import Check

__all__ = [
    "TALK",
    "all_the_same",
    "counted",
    "is_message",
    "is_response",
    "only_input",
    "output_text",
    "packed",
    "tool_or_text",
    "usage_at_start",
    "vectors",
    "whole_message",
    "whole_response_stream",
    "whole_stream",
]

TALK = [{"role": "user", "content": "A."}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C."}]


def vectors(count: int, *, unit: bool = True) -> Check:
    def check(status: int, body: Any) -> bool:
        data = body.get("data", ())
        lengths = [math.fsum(x * x for x in each["embedding"]) for each in data]
        return status == 200 and len(data) == count and all(not unit or abs(length - 1) < 1e-3 for length in lengths)

    return check


def all_the_same(status: int, body: Any) -> bool:
    first, *others = [each["embedding"] for each in body["data"]]
    return status == 200 and all(abs(a - b) < 1e-3 for other in others for a, b in zip(first, other, strict=True))


def counted(times: int) -> Check:
    def check(status: int, body: Any) -> bool:
        usage = body["usage"]
        return status == 200 and usage["prompt_tokens"] == usage["total_tokens"] and usage["prompt_tokens"] % times == 0

    return check


def packed(status: int, body: Any) -> bool:
    data = base64.b64decode(body["data"][0]["embedding"])
    numbers = struct.unpack(f"<{len(data) // 4}f", data)
    return status == 200 and abs(math.fsum(x * x for x in numbers) - 1) < 1e-3


def is_message(status: int, body: Any) -> bool:
    return status == 200 and body["type"] == "message" and body["role"] == "assistant" and bool(body["content"])


def whole_message(status: int, body: Any) -> bool:
    usage = body["usage"]
    numbers = all(isinstance(usage[name], int) for name in ("cache_read_input_tokens", "input_tokens", "output_tokens"))
    ends = body["stop_reason"] in ("end_turn", "max_tokens") and "timings" not in body
    return is_message(status, body) and body["content"][0]["type"] == "text" and ends and numbers and usage["output_tokens"] > 0


def tool_or_text(status: int, body: Any) -> bool:
    calls = [block for block in body["content"] if block["type"] == "tool_use"]
    right = all(block["name"] == "get_weather" and isinstance(block["input"], dict) and block["id"] for block in calls)
    return is_message(status, body) and right and (not calls or body["stop_reason"] == "tool_use")


def whole_stream(status: int, events: Any) -> bool:
    kinds = {each["type"] for each in events}
    wanted = {"message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"}
    starts = [each["index"] for each in events if each["type"] == "content_block_start"]
    stops = {each["index"] for each in events if each["type"] == "content_block_stop"}
    last = next(each for each in events if each["type"] == "message_delta")
    return wanted <= kinds and starts == list(range(len(starts))) and set(starts) == stops and last["usage"]["output_tokens"] > 0


def usage_at_start(status: int, events: Any) -> bool:
    return bool(events[0]["message"]["usage"]["input_tokens"] > 0)


def only_input(status: int, body: Any) -> bool:
    return status == 200 and body["input_tokens"] > 0 and "output_tokens" not in body


def output_text(body: Any) -> str:
    """Of a response."""
    return "".join(part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"])


def is_response(status: int, body: Any) -> bool:
    """Cut by max_output_tokens or not."""
    ended = body["status"] in ("completed", "incomplete") and (body["status"] == "incomplete") == (body["incomplete_details"] is not None)
    named = body["id"].startswith("resp_") and all(item["id"] for item in body["output"]) and body["object"] == "response"
    return status == 200 and ended and named and bool(body["output"]) and body["error"] is None and body["usage"]["total_tokens"] > 0


_ENDS = {
    "response.output_item.done": "response.output_item.added",
    "response.content_part.done": "response.content_part.added",
    "response.output_text.done": "response.output_text.delta",
    "response.function_call_arguments.done": "response.function_call_arguments.delta",
}


def whole_response_stream(status: int, events: Any) -> bool:
    """The events nest, belong together, and add up to the response that the last one has."""
    if status != 200:
        return False
    first, *inner, last = events
    open_: list[str] = []
    for event in inner[1:]:
        kind = event["type"]
        if kind in _ENDS:
            if not open_ or open_.pop() != _ENDS[kind]:
                return False
        elif not (kind.endswith(".delta") and open_[-1:] == [kind]):
            open_.append(kind)
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    begins = [first["type"], inner[0]["type"]] == ["response.created", "response.in_progress"]
    same = {event["response"]["id"] for event in (first, inner[0], last)} == {last["response"]["id"]}
    return begins and same and not open_ and text == output_text(last["response"]) and is_response(200, last["response"])
